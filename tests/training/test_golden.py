"""Log-probs, losses and gradient norms of the golden pairs equal those computed elsewhere, in
float64 or by TRL."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from modern_llm.config.dpo import DPOConfig
from modern_llm.data.batch.collate import collate
from modern_llm.data.batch.micro_batches import BatchSource
from modern_llm.data.batch.order import Budget, Order, Sharing
from modern_llm.data.batch.prefix_tree import Examples
from modern_llm.models.attention.flex import SIDE
from modern_llm.models.load import inspect_checkpoint, load_model, make_scorer
from modern_llm.training.tasks.preference import PreferenceTask
from tests.helpers.models import Table

LAYOUTS = {
    "blocks, one line": ("blocks", Sharing.LINE, Budget(tokens=4096)),
    "blocks, lines of 700 tokens": ("blocks", Sharing.LINE, Budget(tokens=700)),
    "mask, rows, one forward": ("mask", Sharing.ROWS, Budget(tokens=4096)),
    "mask, rows, a budget of 700 tokens": ("mask", Sharing.ROWS, Budget(tokens=700)),
    "trees, a row each": ("auto", Sharing.ALONE, Budget(examples=5)),
    "separate rows": ("separate", Sharing.ALONE, Budget(examples=4)),
}


class OneProcess:
    data_rank, world = 0, 1

    def gather_data(self, value):
        return [value]


@pytest.fixture(scope="session")
def golden(shared):
    folder = shared / "golden" / "llama"
    pairs = json.loads((folder / "pairs.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())
    table = Table([[p["prompt_ids"], p["chosen_ids"], p["rejected_ids"]] for p in pairs])
    sums = {
        name: np.array([[p[f"{name}_chosen"], p[f"{name}_rejected"]] for p in expected["per_pair"]])
        for name in ("policy", "reference")
    }
    return folder, table, sums, expected["losses"]


@pytest.fixture(scope="session", params=LAYOUTS)
def layout(request, golden):
    attention, packed, budget = LAYOUTS[request.param]
    folder, table, _, _ = golden
    scorer = make_scorer(load_model(inspect_checkpoint(folder / "policy")), attention)
    examples = Examples(table, trees=scorer.capabilities.trees)
    order = Order(len(table), len(table), seed=0)
    return scorer, BatchSource(examples, order, budget, rank=0, world=1, shared=packed)


def test_per_pair_logprobs(golden, layout):
    _, table, sums, _ = golden
    scorer, source = layout
    ours = np.zeros((len(table), 2))
    for batch in source.micro_batches(0):
        output = scorer(batch.ids, batch.positions, batch.segments, batch.targets)
        ours[batch.examples] = batch.sums(output.logprobs).detach().numpy()
    assert np.abs(ours - sums["policy"]).max() < 1e-3


def test_per_pair_logprobs_by_flex_attention(golden):
    """Forward only: on a CPU the backend has no backward."""
    folder, table, sums, _ = golden
    with torch.inference_mode():
        scorer = make_scorer(load_model(inspect_checkpoint(folder / "policy")), "flex")
        assert scorer.capabilities.backend == "flex"
        examples = Examples(table, trees=True)
        batch = collate(examples, np.arange(len(table)), shared=Sharing.LINE, align=SIDE)
        assert batch.ids.shape[1] % SIDE == 0
        output = scorer(batch.ids, batch.positions, batch.segments, batch.targets)
    assert np.abs(batch.sums(output.logprobs).numpy() - sums["policy"]).max() < 1e-3


def test_losses_and_gradient_norms(golden, layout):
    """All losses for one layout; for the others one loss of each kind, because the log-prob sums
    were already compared."""
    _, table, sums, rows = golden
    scorer, source = layout
    reference = sums["reference"].astype(np.float32)
    assert len({row["loss_type"] for row in rows}) >= 13
    if len(source.micro_batches(0)) > 1:
        rows = [r for r in rows if r["loss_type"] in ("sigmoid", "ipo", "aot_unpaired")]
        rows = [r for r in rows if r["beta"] == 0.1]
    norms = 0
    for row in rows:
        config = DPOConfig(
            beta=row["beta"], loss_type=row["loss_type"], label_smoothing=row["label_smoothing"]
        )
        task = PreferenceTask(OneProcess(), config, source, reference, None, None, 0.0)
        scorer.zero_grad()
        loss = 0.0
        for batch in task.prepare(scorer, 0, task.micro_batches(0)):
            result = task.run(scorer, batch)
            (result.loss / task.denominator(0)).backward()
            loss += float(result.statistics["loss"])
        assert loss / len(table) == pytest.approx(row["loss"], rel=1e-4), row
        if "grad_norm" in row:
            norm = torch.nn.utils.get_total_norm([p.grad for p in scorer.parameters()])
            assert float(norm) == pytest.approx(row["grad_norm"], rel=1e-3), row
            norms += 1
    assert norms >= (26 if len(source.micro_batches(0)) == 1 else 3)
