"""Every write, flush, rename and collective of the package is inside a named fault point."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.fault_points import points, unguarded
from tests.helpers.imports import Source, read_package

ROOT = Path(__file__).resolve().parents[1]
# Functions of layers that may not import the points; their callers are held to enclose the calls.
BY_CALLERS = frozenset(
    {
        "modern_llm.models.pt_checkpoint:save_model",
        "modern_llm.models.adapters:write_adapters",
        "modern_llm.models.adapters:write_adapter_config",
    }
)
# Where a person looks on, not a file: nothing is kept of it.
SHOWN = ("modern_llm/verbs/generate.py",)


def test_nothing_is_written_or_met_outside_a_fault_point():
    sources = [source for source in read_package(ROOT) if source.path not in SHOWN]
    assert len(sources) > 50
    found = [problem for source in sources for problem in unguarded(source, BY_CALLERS)]
    assert not found, "\n" + "\n".join(found)


def test_points_have_names_that_the_variable_can_say():
    named = [(name, source.path) for source in read_package(ROOT) for name, _ in points(source)]
    assert len({name for name, _ in named}) > 30
    for name, path in named:
        assert re.fullmatch(r"[a-z]+\.[a-z]+|[a-z]+", name), (name, path)


@pytest.mark.parametrize(
    "text",
    [
        "path.write_text('x')",
        "def f(path):\n    path.open('w')",
        "open(path, mode='ab')",
        "open(path, 'r+')",
        "os.fsync(1)",
        "os.replace(a, b)",
        "path.replace(other)",
        "a.rename(b)",
        "to.hardlink_to(path)",
        "save_file(tensors, path)",
        "model.save_pretrained(folder)",
        "json.dump(x, file)",
        "import torch.distributed as dist\ndist.all_reduce(x)",
        "accelerator.wait_for_everyone()",
        "with path.open('w') as f, around('x.y'):\n    pass",
        "with around('x.y'):\n    def f():\n        path.write_text('x')",
        "with other('x.y'):\n    path.write_text('x')",
    ],
)
def test_the_rule_refuses(text):
    (problem,) = unguarded(Source("modern_llm.x", "modern_llm/x.py", text))
    assert "outside a fault point" in problem


@pytest.mark.parametrize(
    "text",
    [
        "with around('x.y'):\n    path.write_text('x')",
        "with around('x.y'), path.open('w') as f:\n    f.write('x')",
        "with suppress(OSError), around('x.y'):\n    os.link(a, b)",
        "path.open('rb').read()\nopen(path)\npath.open(encoding='utf-8')",
        "text.replace('a', 'b')\ndataclasses.replace(config, a=1)\nreplace(config, a=1)",
        "runtime.gather(1)\nfunctools.reduce(f, x)\nself.reduce(x)",
        "def save_model(path):\n    torch.save(1, path)",
    ],
)
def test_the_rule_allows(text):
    exempt = frozenset({"modern_llm.x:save_model"})
    assert unguarded(Source("modern_llm.x", "modern_llm/x.py", text), exempt) == []
