"""Each distinct answer is scored once, in the same forwards however many processes there are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.errors import UserError
from modern_llm.data.batch.order import Sharing
from modern_llm.distributed.runtime import start
from modern_llm.models.load import make_scorer
from modern_llm.reference.answers import MAX_RESPONSES, Answers
from modern_llm.reference.commands import fill_reference
from modern_llm.reference.scoring import Scoring, score_everywhere
from modern_llm.reference.store.store import ReferenceStore
from tests.helpers.models import Table, make_model
from tests.helpers.ranks import run_ranks


def config(folder: Path = Path("unused"), **changes) -> TrainingConfig:
    return TrainingConfig(**({"run_name": "s", "output_dir": folder, "batch_size": 2} | changes))


class Named(Table):
    def origin(self, index: int) -> str:
        return f"pairs:{index}"


def shared_answers() -> Named:
    """Six prompts of unequal lengths, one empty; ten pairs over four answers of each."""
    rng = np.random.default_rng(3)
    rows = []
    for prompt_length in (5, 0, 9, 2, 14, 1):
        prompt = rng.integers(3, 97, prompt_length).tolist()
        answers = [rng.integers(3, 97, n).tolist() for n in (3, 7, 1, 12)]
        pairs = [(a, b) for a in range(4) for b in range(4) if a != b][:10]
        rows += [[prompt, answers[a], answers[b]] for a, b in pairs]
    return Named(rows)


def plain(model, table: Named, pair: int, side: str) -> torch.Tensor:
    """Log-probs of one answer's tokens by the model's own forward."""
    prompt, answer = table.ids(pair, "prompt").tolist(), table.ids(pair, side).tolist()
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1)[max(len(prompt) - 1, 0) :]


@pytest.mark.parametrize("name", ["llama", "falcon"], ids=["trees", "separate rows"])
@pytest.mark.parametrize("budget", [20, 4000])
def test_sums_counts_and_tokens_are_the_models_own(name, budget):
    table, runtime = shared_answers(), start(config())
    scorer = make_scorer(make_model(name))
    assert scorer.capabilities.trees == (name == "llama")
    settings = config(tokens_per_micro_batch=budget)
    scoring = Scoring(
        runtime, scorer, settings, shared=Sharing(scorer.capabilities.trees), tokens=True
    )
    answers = Answers(table)
    assert len(answers) == 24 and len(table) == 60
    found = score_everywhere(runtime, scoring, answers)
    starts = np.cumsum(found.counts) - found.counts
    model = make_model(name)
    for pair in range(len(table)):
        for column, side in enumerate(("chosen", "rejected")):
            entry = answers.of_pairs[pair, column]
            expected = plain(model, table, pair, side)
            assert found.counts[entry] == answers.targets[entry] == len(expected)
            at = slice(starts[entry], starts[entry] + found.counts[entry])
            assert np.abs(found.tokens[at] - expected.numpy()).max(initial=0) < 1e-4
            assert found.sums[entry] == pytest.approx(float(expected.sum()), abs=1e-3)
            assert (
                answers.origin(entry)
                == f"pairs:{min(np.argwhere(answers.of_pairs == entry)[:, 0])}"
            )


def test_an_answer_is_computed_once_and_its_prompt_once_a_tree():
    table, runtime = shared_answers(), start(config())
    scorer = make_scorer(make_model("llama"))
    scoring = Scoring(runtime, scorer, config(tokens_per_micro_batch=4000), shared=Sharing.ROWS)
    trees = scoring.lay_out(Answers(table))
    real = sum(trees.collate(group).real_tokens for group in trees.groups())
    assert MAX_RESPONSES >= 4
    assert real == sum((5, 0, 9, 2, 14, 1)) + 6 * (3 + 7 + 1 + 12)


def test_many_answers_of_one_prompt_are_several_trees():
    answers = [[i + 3] * (1 + i % 5) for i in range(40)]
    table = Named([[[1, 2], answers[i], answers[i + 1]] for i in range(0, 40, 2)])
    trees = Scoring(
        start(config()), make_scorer(make_model("llama")), config(), shared=Sharing.ROWS
    ).lay_out(Answers(table))
    sizes = [trees.responses(item) for group in trees.groups() for item in group]
    assert sum(sizes) == 40 and max(sizes) <= MAX_RESPONSES


def test_forwards_are_halved_until_they_fit(caplog):
    """A module that refuses more than 60 tokens: the rest of the pass is planned smaller."""
    table, runtime = shared_answers(), start(config())
    scorer = make_scorer(make_model("llama"))
    expected = score_everywhere(runtime, Scoring(runtime, scorer, config(), shared=Sharing.ROWS),
                                Answers(table))  # fmt: skip
    forwards = []

    class Small(torch.nn.Module):
        def forward(self, ids, *rest):
            forwards.append(ids.numel())
            if ids.numel() > 60:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return scorer(ids, *rest)

    scoring = Scoring(runtime, Small(), config(tokens_per_micro_batch=4000), shared=Sharing.ROWS)
    found = score_everywhere(runtime, scoring, Answers(table))
    assert np.abs(found.sums - expected.sums).max() < 1e-4
    assert scoring.budget <= 60 < max(forwards)
    assert "out of memory: forwards of" in caplog.text
    tiny = Scoring(runtime, Small(), config(tokens_per_micro_batch=4000), shared=Sharing.ROWS)
    runtime.sequence = object()  # processes that share the rows wait in the forward that failed
    with pytest.raises(UserError, match=r"share its rows .* lower train.tokens_per_micro_batch"):
        score_everywhere(runtime, tiny, Answers(table))
    runtime.sequence = None
    long = Named([[list(range(3, 70)), [3], [4]]])
    with pytest.raises(UserError, match=r"pairs:0: its forward alone does not fit"):
        score_everywhere(runtime, tiny, Answers(long))


def node(folder: Path, checkpoint: Path, pairs: Path) -> dict:
    """Each rank on a machine with a disk of its own: another folder of stores."""
    os.environ["MODERN_LLM_CACHE"] = str(folder / f"disk-{os.environ['RANK']}")
    report = fill_reference(
        checkpoint,
        config(folder / "run"),
        DPOConfig(max_length=96, flush_every=3),
        PreferenceDatasetConfig(dataset_name=str(pairs)),
    )
    assert torch.distributed.get_world_size() == 2
    return report


@pytest.mark.slow
def test_nodes_without_a_shared_disk_and_other_worlds_get_the_same_numbers(
    tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch
):
    reports = run_ranks(node, 2, tmp_path, tiny_checkpoint, tiny_pairs, timeout=200)
    assert [r["scored"] for r in reports] == [60, 60]
    assert not (tmp_path / "disk-1" / "references").exists(), "rank 0 alone decides and writes"
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "alone"))
    monkeypatch.setenv("RANK", "0")
    alone = fill_reference(
        tiny_checkpoint,
        config(tmp_path / "one"),
        DPOConfig(max_length=96, flush_every=3),
        PreferenceDatasetConfig(dataset_name=str(tiny_pairs)),
    )
    one, two = (ReferenceStore.open(Path(r["store"])) for r in (alone, reports[0]))
    keys = np.concatenate([s.rows(0, len(s), tokens=False).keys for s in one.shards])
    assert len(keys) == 60
    assert np.abs(one.find(keys).sums - two.find(keys).sums).max() < 1e-4
    assert (one.find(keys).counts == two.find(keys).counts).all()
