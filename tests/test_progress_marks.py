"""What takes long marks its progress, and nothing long runs within a step or a forward."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.imports import Source, read_package
from tests.helpers.progress_marks import unmarked

ROOT = Path(__file__).resolve().parents[1]
# These may not import the marks: they call a `check` that their callers give them, or are called
# in a phase of an hour.
LAYERS = ("modern_llm/models/", "modern_llm/data/", "modern_llm/objectives/", "modern_llm/config/")
# In a thread of its own, or a few numbers, or before a watchdog: nobody waits for these.
ALONE = (
    "modern_llm/demo/",
    "modern_llm/storage/lease.py",
    "modern_llm/verbs/doctor_checks.py",
    "modern_llm/distributed/rendezvous/input_files.py",
    "modern_llm/reference/keys.py",
)


def test_long_work_is_marked_and_never_within_a_step():
    sources = [s for s in read_package(ROOT) if not s.path.startswith(LAYERS + ALONE)]
    assert len(sources) > 50
    found = [problem for source in sources for problem in unmarked(source)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("while block:\n    digest.update(block)", "without heartbeat.tick()"),
        ("for path in paths:\n    hashlib.file_digest(path)", "without heartbeat.tick()"),
        ("for batch in batches:\n    task.run(model, batch)", "without heartbeat.tick()"),
        ("with around('collective.sum'):\n    pass", "without waiting()"),
        ("heartbeat.quick('forward')", "outside a `with`"),
        ("with heartbeat.phase(name()):\n    pass", "without a name"),
        ("with heartbeat.phase('saving'):\n    heartbeat.enter('x')", "within a phase"),
        ("with heartbeat.quick('step'):\n    runtime.prepare(model)", "no time for it"),
        ("with heartbeat.quick('step'):\n    self._metrics.append(x)", "no time for it"),
        ("with heartbeat.quick('step'):\n    load_model(place)", "no time for it"),
    ],
)
def test_the_rule_refuses(text, said):
    (problem,) = unmarked(Source("modern_llm.x", "modern_llm/x.py", text))
    assert said in problem


@pytest.mark.parametrize(
    "text",
    [
        "while block:\n    digest.update(block)\n    heartbeat.tick()",
        "for batch in batches:\n    with heartbeat.quick('evaluation'):\n        task.run(batch)",
        "with heartbeat.quick('step'):\n    for batch in batches:\n        task.run(batch)",
        "with around('collective.sum'), waiting():\n    pass",
        "with heartbeat.quick('step'):\n    task.prepare(model)\n    losses.append(x)",
        "heartbeat.enter('reading')\nload_model(place)",
        "with heartbeat.quick('step'):\n    f = lambda: load_model(place)",
    ],
)
def test_the_rule_allows(text):
    assert unmarked(Source("modern_llm.x", "modern_llm/x.py", text)) == []
