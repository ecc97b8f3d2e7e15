"""The import table of the design, kept true, and the limits that keep the code readable.

`TABLE` is the contract: to let a layer import something new, change its row here and say why. The
last part shows, on made-up sources, that each rule refuses what it should.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.helpers.imports import (
    Layer,
    Source,
    cycles,
    heavy_at_start,
    read_package,
    sizes,
    table_violations,
    unsafe_loading,
    work_at_import,
)

CORE = frozenset(
    "loop accumulation best callbacks context optim optimizers prefetch task trainer_callbacks "
    "window checkpointing guards "
    "monitoring.diagnostics monitoring.metrics monitoring.monitor monitoring.profiler "
    "monitoring.trackers run.config_changes run.folder run.lock".split()
)
"""Modules of `training` that know an Accelerator and a Task, not data, models or losses."""


def row(project: str = "", third_party: str = "", **options) -> Layer:
    return Layer(frozenset(project.split()), frozenset(third_party.split()), **options)


# The order of a pair's path: each layer may import the ones before it, where its row says so.
BELOW = "config storage models distributed data setup reference"
TABLE = {
    # layer: what it may import of the project; of others, besides the standard library
    # Names alone: each module is imported when one of its names is first used.
    "package": Layer(
        frozenset(
            "api config data models objectives reference setup stages training.callbacks".split()
        ),
        frozenset({"(a computed name)"}),
    ),
    # A computed name: a user's own modules (`--plugins`).
    "config": row(
        "objectives.catalogue objectives.labelled_catalogue",
        "pydantic",
        only_in={"(a computed name)": frozenset({"config.plugins"})},
    ),
    "objectives": row("", "torch"),
    # config.printable: names of files in messages. heartbeat: a leaf; a long write shows that it
    # makes progress. yaml: bounded reading of files that somebody else has written.
    "storage": row(
        "config.errors config.printable distributed.health.heartbeat",
        "torch safetensors xxhash yaml",
    ),
    # storage: weights, configurations and adapters are files. huggingface_hub: the configuration
    # alone of a model on the Hub.
    "models": row("config storage", "torch transformers peft safetensors huggingface_hub"),
    # huggingface_hub: whether the Hub answers. yaml: nodes compare the configuration file. IPython:
    # output in the cell of a notebook, imported only where it runs already.
    "distributed": row(
        "config storage",
        "torch torch.distributed accelerate deepspeed rich yaml huggingface_hub xxhash IPython",
    ),
    # A table of a million pairs is made without torch; only the tensors of one batch need it.
    "data": row(
        "config storage",
        # huggingface_hub: the commit that a streamed data set is read at.
        "numpy datasets tokenizers pyarrow huggingface_hub",
        only_in={
            "torch": frozenset({"data.batch.collate", "data.batch.micro_batches"}),
            # Chat templates are rendered in the environment that transformers makes.
            "transformers": frozenset({"data.encode.rendering"}),
            "jinja2": frozenset({"data.encode.sandbox"}),
        },
    ),
    "setup": row("config storage models distributed data", "torch transformers"),
    "reference": row(BELOW, "torch numpy transformers xxhash"),
    "planning": row(BELOW, "torch transformers accelerate huggingface_hub"),
    "inference": row(BELOW, "torch transformers"),
    "evaluation": row(f"{BELOW} inference", "torch numpy transformers"),
    # report.card: the model card beside exported weights.
    "export": row(
        f"{BELOW} inference report.card", "torch transformers safetensors huggingface_hub"
    ),
    # Pages from plain numbers: a template and a drawing; nothing that computes.
    "report": row("config.printable storage", "jinja2 matplotlib numpy yaml huggingface_hub"),
    # models.out_of_memory: a step that finds no memory is repeated in smaller forwards.
    # models.run_checkpoint: the weights of a checkpoint, which loading a model reads as well.
    "core": row(
        "config storage distributed models.out_of_memory models.run_checkpoint",
        "torch accelerate safetensors yaml",
        only_in={
            "transformers": frozenset({"training.trainer_callbacks"}),
            "bitsandbytes": frozenset({"training.optimizers"}),
        },
    ),
    # train_*.py and what they are made of; a train_*.py itself is imported by cli and demo only.
    "stages": row(f"{BELOW} objectives inference export report core", "torch transformers numpy"),
    "api": row(f"{BELOW} stages", "pydantic"),
    "demo": row(
        f"{BELOW} inference evaluation report core stages",
        "tokenizers transformers rich numpy torch",
    ),
    # One module a verb or a family of them; the command line itself only chooses among these.
    "verbs": row(
        f"{BELOW} planning inference evaluation export report core stages demo",
        "pydantic pydantic_settings yaml shtab rich torch huggingface_hub",
    ),
    # package: the version.
    "cli": row("package config distributed verbs", "pydantic pydantic_settings rich transformers"),
}
STARTS_AT_ONCE = ("modern_llm.__main__", "modern_llm.cli", "modern_llm.config")
SLOW_TO_IMPORT = frozenset("torch transformers accelerate datasets numpy pyarrow pandas".split())
MAX_LINES, MAX_FUNCTION = 400, 60
# In brackets, so that the pattern does not find itself.
MACHINE_PATH = re.compile(
    r"/w[o]rk/|/opt/whe[e]ls|\.l[i]brary|(?<![\w}.$-])/(?:r[o]ot|h[o]me|U[s]ers)/\w"
)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def package() -> list[Source]:
    sources = read_package(ROOT)
    assert len(sources) > 20, "the package was not found"
    return sources


def expect_none(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def test_imports_follow_the_table(package):
    expect_none(table_violations(package, TABLE, CORE))


def test_no_modules_import_each_other_in_a_circle(package):
    expect_none(cycles(package))


@pytest.mark.parametrize("start", STARTS_AT_ONCE)
def test_help_and_configuration_import_nothing_slow(package, start):
    expect_none(heavy_at_start(package, start, SLOW_TO_IMPORT))


def test_nothing_happens_at_import_time(package):
    expect_none([problem for source in package for problem in work_at_import(source)])


def test_nothing_runs_code_that_lies_in_a_file(package):
    expect_none([problem for source in package for problem in unsafe_loading(source)])


def test_functions_of_the_package_and_all_files_are_short(package):
    tests = [
        Source(path.stem, str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "tests").rglob("*.py"))
    ]
    found = [problem for source in package for problem in sizes(source, MAX_LINES, MAX_FUNCTION)]
    found += [problem for source in tests for problem in sizes(source, MAX_LINES, None)]
    expect_none(found)


def test_every_module_says_what_it_is(package):
    expect_none([source.path for source in package if silent(source)])


def test_no_path_of_one_machine_is_written_down():
    folders = ("modern_llm", "tests", "launch", ".ci", "accelerate_configs", "ds_configs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [path for path in ROOT.iterdir() if path.name != ".git"]  # a file, in a worktree
    found = []
    for path in sorted(p for p in files if p.is_file() and "__pycache__" not in p.parts):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for number, line in enumerate(lines, 1)
            if MACHINE_PATH.search(line)
        ]
    expect_none(found)


def silent(source: Source) -> bool:
    """Whether a module with code in it lacks a docstring; an empty package marker needs none."""
    return bool(source.tree.body) and not ast.get_docstring(source.tree)


# The rules themselves, on sources made up for the purpose.


def made_up(module: str, text: str, package: bool = False) -> Source:
    path = module.replace(".", "/") + ("/__init__.py" if package else ".py")
    return Source(module, path, text)


WORLD = [
    made_up("modern_llm", "", package=True),
    made_up("modern_llm.config", "", package=True),
    made_up("modern_llm.data", "", package=True),
    made_up("modern_llm.data.batch.prefix_tree", "import numpy"),
    made_up("modern_llm.data.read.records", ""),
    made_up("modern_llm.models", "", package=True),
    made_up("modern_llm.models.scorer", "import torch"),
    made_up("modern_llm.training", "", package=True),
    made_up("modern_llm.training.loop", ""),
    made_up("modern_llm.training.train_dpo", ""),
]


@pytest.mark.parametrize(
    ("module", "text", "reason"),
    [
        ("config.x", "import torch", "config imports torch: not among"),
        ("config.x", "def f():\n    import torch", "x.py:2: config imports torch"),
        (
            "config.x",
            "from ..data.batch import prefix_tree",
            "config imports modern_llm.data.batch.prefix_tree: not among",
        ),
        (
            "objectives.x",
            "from modern_llm.config import TrainingConfig",
            "modern_llm.config: not among",
        ),
        ("objectives.x", "import numpy as np", "objectives imports numpy"),
        ("models.x", "import torch.distributed as dist", "imports torch.distributed"),
        ("models.x", "from torch import distributed", "imports torch.distributed"),
        ("models.x", "import torch\ndef f():\n    torch.distributed.barrier()", "x.py:3"),
        ("models.x", "from accelerate import Accelerator", "models imports accelerate.Accelerator"),
        (
            "models.x",
            "from modern_llm.data.batch import prefix_tree",
            "modern_llm.data.batch.prefix_tree: not among ['config', 'storage']",
        ),
        ("data.x", "import torch", "only in ['data.batch.collate'"),
        ("data.x", "from torch.nn import Module", "only in ['data.batch.collate'"),
        ("data.x", "from accelerate import Accelerator", "not among"),
        (
            "distributed.x",
            "from modern_llm.models.scorer import TokenScorer",
            "not among ['config', 'storage']",
        ),
        ("reference.x", "from modern_llm.objectives import language", "not among"),
        (
            "reference.x",
            "from modern_llm.training import loop",
            "modern_llm.training.loop: not among",
        ),
        (
            "training.loop",
            "from modern_llm.data.batch.prefix_tree import Rows",
            "core imports modern_llm.data.batch.prefix_tree",
        ),
        ("training.loop", "from modern_llm.training.stage import go", "core imports"),
        ("training.loop", "import torch.distributed", "core imports torch.distributed"),
        ("training.setup", "import deepspeed", "stages imports deepspeed"),
        ("training.setup", "from accelerate import Accelerator", "stages imports accelerate"),
        ("training.setup", "from modern_llm.training import train_dpo", "do not import a stage"),
        ("training.train_sft", "from .train_lm import run_training", "do not import a stage"),
        ("training.train_sft", "from modern_llm.cli import main", "stages imports modern_llm.cli"),
        ("report.x", "from modern_llm.config import TrainingConfig", "report imports"),
        ("demo.x", "from modern_llm.cli import main", "demo imports modern_llm.cli"),
        ("cli", "import importlib\nimportlib.import_module('deepspeed')", "cli imports deepspeed"),
        (
            "data.x",
            "__import__('modern_llm.models.scorer')",
            "data imports modern_llm.models.scorer",
        ),
        ("models.x", "import importlib as i\ni.import_module(name)", "(a computed name)"),
        (
            "models.x",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import datasets",
            "x.py:3",
        ),
        ("novelty.x", "", "layer 'novelty' has no row"),
    ],
)
def test_the_table_refuses(module, text, reason):
    (found,) = table_violations([*WORLD, made_up(f"modern_llm.{module}", text)], TABLE, CORE)
    assert reason in found


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("config.x", "import os\nfrom pydantic import Field\nfrom modern_llm.config import base"),
        ("objectives.x", "from torch import Tensor\nfrom modern_llm.objectives import preference"),
        ("data.batch.collate", "import torch\nfrom modern_llm.data.batch.prefix_tree import Rows"),
        ("distributed.x", "import torch.distributed as dist\ndef f():\n    import deepspeed"),
        (
            "reference.x",
            "from modern_llm.data.read.records import Pair\nfrom modern_llm.models import scorer",
        ),
        (
            "training.loop",
            "from accelerate import Accelerator\nfrom modern_llm.training import task",
        ),
        (
            "training.train_dpo",
            "from modern_llm.data.batch import prefix_tree\nfrom modern_llm.training.loop import f",
        ),
        ("demo.x", "def f():\n    from modern_llm.training.train_lm import run_training"),
        ("verbs.x", "def f():\n    from modern_llm.training.train_dpo import run_dpo"),
    ],
)
def test_the_table_allows(module, text):
    assert table_violations([*WORLD, made_up(f"modern_llm.{module}", text)], TABLE, CORE) == []


def test_a_slow_import_is_found_through_other_modules():
    cli = made_up("modern_llm.cli", "from modern_llm.models.scorer import A")
    assert heavy_at_start([*WORLD, cli], "modern_llm.cli", SLOW_TO_IMPORT) == [
        "modern_llm.cli -> modern_llm.models.scorer -> torch"
    ]
    lazy = made_up("modern_llm.cli", "def f():\n    from modern_llm.models.scorer import A")
    assert heavy_at_start([*WORLD, lazy], "modern_llm.cli", SLOW_TO_IMPORT) == []


@pytest.mark.parametrize(
    "text",
    [
        "print('hello')",
        "import torch\nDEVICE = torch.device('cpu')",
        "A = open('file').read()",
        "class A:\n    x = expensive()",
        "for i in range(3):\n    pass",
        "try:\n    import a\nexcept ImportError:\n    a = None",
        "import os\nos.environ['A'] = str(1)",
        "def f():\n    print(1)\n    return 2\nA = f()",
    ],
)
def test_work_at_import_is_refused(text):
    assert work_at_import(made_up("modern_llm.x", text))


@pytest.mark.parametrize(
    "text",
    [
        "'''Doc.'''\nfrom typing import TypeVar\nT = TypeVar('T')\nA: int = 3\nB = frozenset({1})",
        "class Row:\n    'Doc.'\n    a: int = 1\nTABLE = {'x': Row(a=2)}",
        "from modern_llm.config.base import Row\nTABLE = (Row(1, lambda: open('x')),)",
        "def has(name):\n    return lambda row: name in row\nTABLE = [has('a')]",
        "def main():\n    print(1)\nif __name__ == '__main__':\n    main()",
    ],
)
def test_naming_things_at_import_is_allowed(text):
    assert work_at_import(made_up("modern_llm.x", text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=flag)",
        "from torch import load",
        "f(trust_remote_code=True)",
        "OPTIONS = {'trust_remote_code': True}",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_loading_is_refused(text):
    assert unsafe_loading(made_up("modern_llm.x", text))


def test_safe_loading_is_allowed():
    text = "from pickle import UnpicklingError\nimport torch\ntorch.load(p, weights_only=True)"
    assert unsafe_loading(made_up("modern_llm.x", text)) == []


def test_sizes_are_measured():
    body = "def f():\n" + "    a = 1\n" * 5
    source = made_up("modern_llm.x", body)
    assert sizes(source, max_lines=6, max_function=6) == []
    assert len(sizes(source, max_lines=5, max_function=6)) == 1
    assert "f has 6 lines" in sizes(source, max_lines=6, max_function=5)[0]


def test_a_missing_docstring_is_found():
    assert silent(made_up("modern_llm.x", "import os"))
    assert not silent(made_up("modern_llm.x", "'''Doc.'''\nimport os"))
    assert not silent(made_up("modern_llm.data", "", package=True))


def test_a_machine_path_is_found():
    assert MACHINE_PATH.search("open('" + "/".join(["", "home", "me", "x')"]))
    assert not MACHINE_PATH.search('cd "$root/home/x"')
