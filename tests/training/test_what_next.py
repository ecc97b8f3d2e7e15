"""The message at the end names the next step, and never a missing checkpoint."""

from __future__ import annotations

from modern_llm.config import TrainingConfig
from modern_llm.training.run.folder import RunFolder


def test_it_names_the_newest_checkpoint_or_that_there_is_none_or_that_nothing_is_kept(tmp_path):
    run = RunFolder(TrainingConfig(run_name="r", output_dir=tmp_path), {})
    assert "no checkpoint yet" in run.what_next() and "from the beginning" in run.what_next()
    for step in (2, 10):
        (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    (run.checkpoints / ".tmp-step-00000012-1").mkdir()
    assert run.what_next() == "the same command resumes from step-00000010"
    run = RunFolder(run.config, {}, dry_run=True)
    assert run.what_next() == "nothing was kept: the same command tries again"
