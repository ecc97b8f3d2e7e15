"""Lists of losses and WPO in the task: equal to full logits, for any micro-batches and ranks."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from modern_llm.config.dpo import DPOConfig
from modern_llm.data.batch.collate import collate
from modern_llm.data.batch.micro_batches import BatchSource
from modern_llm.data.batch.order import Budget, Order, Sharing
from modern_llm.data.batch.prefix_tree import Examples
from modern_llm.models.load import inspect_checkpoint, load_model, make_scorer
from modern_llm.models.logits import fuse
from modern_llm.models.scorer import Capabilities, TokenScorer
from modern_llm.training.tasks.preference import PreferenceTask
from tests.helpers.models import Table

PAIRS, BETA = 6, 0.1
SPLITS = {
    "one forward": (1, Budget(tokens=4096)),
    "a pair a forward": (1, Budget(examples=1)),
    "three ranks": (3, Budget(tokens=600)),
}
CONFIGS = {
    "a list": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "wpo": {"use_weighting": True},
    "wpo of a list": {"use_weighting": True, "loss_type": ["ipo", "sft"], "nll_coefficient": 0.3},
    "a divergence": {"f_divergence": "forward_kl", "loss_type": ["sigmoid", "sft"]},
    "across pairs": {"loss_type": ["aot", "sft"], "loss_weights": [1.0, 0.5]},
}


class Gathered:
    """A runtime of which `gather_data` returns the values of all ranks, if there are several."""

    def __init__(self, rank, world):
        self.data_rank, self.world = rank, world

    def gather_data(self, value):
        assert self.world == 1
        return [value]


@pytest.fixture(scope="module")
def golden(shared):
    folder = shared / "golden" / "llama"
    pairs = json.loads((folder / "pairs.json").read_text())[:PAIRS]
    rows = [[p["prompt_ids"], p["chosen_ids"], p["rejected_ids"]] for p in pairs]
    expected = json.loads((folder / "expected.json").read_text())["per_pair"][:PAIRS]
    reference = [[p["reference_chosen"], p["reference_rejected"]] for p in expected]
    return folder / "policy", rows, np.array(reference, np.float32)


@pytest.fixture(scope="module", params=["auto", "separate"])
def scorer(request, golden):
    return make_scorer(load_model(inspect_checkpoint(golden[0])), request.param)


def step(scorer, table, reference, world, budget, options):
    """Return the metrics of one step over all ranks, and its gradient."""
    examples = Examples(table, trees=scorer.capabilities.trees)
    config = DPOConfig(**options)
    scorer.log_squares = config.use_weighting
    scorer.zero_grad()
    sums: dict[str, float] = {}
    sharing = Sharing.ROWS if scorer.capabilities.trees else Sharing.ALONE
    for rank in range(world):
        order = Order(len(table), len(table), seed=0)
        source = BatchSource(examples, order, budget, rank=rank, world=world, shared=sharing)
        reference = reference if config.needs_reference else None
        task = PreferenceTask(Gathered(rank, world), config, source, reference, None, None, 0.0)
        for batch in task.prepare(scorer, 0, task.micro_batches(0)):
            result = task.run(scorer, batch)
            (result.loss / task.denominator(0)).backward()
            for name, value in result.statistics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
    gradient = torch.cat([p.grad.flatten() for p in scorer.parameters()])
    return task.metrics(sums), gradient.clone()


def plain(golden, options):
    """The same from full logits, in float64, written out loss by loss."""
    from transformers import AutoModelForCausalLM

    folder, rows, reference = golden
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    sums, agreements, lengths = [], [], []
    for prompt, *answers in rows:
        for answer in answers:
            ids = torch.tensor([[*prompt, *answer]])
            logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            mine = logprobs.gather(-1, torch.tensor(answer)[:, None])[:, 0]
            squares = logprobs.exp().square().sum(-1).log()
            sums.append(mine.sum())
            agreements.append((mine - squares).mean().exp().detach())
            lengths.append(len(answer))
    policy, n = torch.stack(sums).view(-1, 2), torch.tensor(lengths).view(-1, 2)
    r = policy - torch.from_numpy(reference).double()
    tokens = n[:, 0].double().mean()
    log_sigmoid = torch.nn.functional.logsigmoid
    if options.get("f_divergence"):
        r = 1 - torch.exp(-r)
    delta = r[:, 0] - r[:, 1]
    u = policy[:, 0] - policy[:, 1]
    v = torch.from_numpy(reference).double()
    terms = {
        "sigmoid": -log_sigmoid(BETA * delta),
        "bco_pair": -log_sigmoid(BETA * r[:, 0]) - log_sigmoid(-BETA * r[:, 1]),
        "sft": -policy[:, 0] / tokens,
        "ipo": (r[:, 0] / n[:, 0] - r[:, 1] / n[:, 1] - 1 / (2 * BETA)) ** 2,
        "aot": -log_sigmoid(BETA * (u.sort().values - (v[:, 0] - v[:, 1]).sort().values)),
        "nll": -policy[:, 0] / n[:, 0],
    }
    if options.get("use_weighting"):
        weight = torch.stack(agreements).view(-1, 2).prod(1)
        terms = {name: term * weight for name, term in terms.items()}
    coefficients = DPOConfig(**options).coefficients
    loss = sum(c * terms[name].mean() for name, c in coefficients.items())
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    parts = {f"loss/{name}": terms[name].mean().item() for name in coefficients}
    return loss.item(), float(norm), parts if len(coefficients) > 1 else {}


@pytest.fixture(scope="module")
def expected(golden):
    return {name: plain(golden, options) for name, options in CONFIGS.items()}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_parts_and_gradient_equal_full_logits(scorer, golden, expected, name, split):
    world, budget = SPLITS[split]
    if name == "across pairs" and world > 1:
        pytest.skip("the ranks of a loss across pairs wait for each other")
    _, rows, reference = golden
    metrics, gradient = step(scorer, Table(rows), reference, world, budget, CONFIGS[name])
    loss, expected_norm, parts = expected[name]
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert float(gradient.norm()) == pytest.approx(expected_norm, rel=1e-3)
    found = {key: value for key, value in metrics.items() if key.startswith("loss/")}
    assert found == pytest.approx(parts, rel=1e-4)


def test_a_single_loss_logs_no_parts(scorer, golden):
    _, rows, reference = golden
    options = {"nll_coefficient": 0.5}
    metrics, _ = step(scorer, Table(rows), reference, 1, Budget(tokens=4096), options)
    assert not [name for name in metrics if name.startswith("loss/")]
    assert math.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    "capabilities", [{"fused": False}, {"fused": True, "padded": False}, {"fused": True}]
)
def test_every_forward_gives_the_sums_of_squares(golden, capabilities):
    model = load_model(inspect_checkpoint(golden[0]))
    scorer = TokenScorer(model, Capabilities(trees=False, **capabilities))
    if capabilities["fused"]:
        fuse(model, None)
    examples = Examples(Table(golden[1]), trees=False)
    batch = collate(examples, np.arange(3), shared=Sharing.ALONE)
    inputs = (batch.ids, batch.positions, batch.segments, batch.targets)
    assert scorer(*inputs).log_squares is None
    scorer.log_squares = True
    found = scorer(*inputs)
    logits = model(batch.ids, attention_mask=(batch.segments[..., 0] >= 0).long()).logits
    plain = logits.flatten(0, 1)[batch.targets[0]].softmax(-1).square().sum(-1).log()
    torch.testing.assert_close(found.log_squares, plain, rtol=1e-4, atol=1e-4)
    assert not found.log_squares.requires_grad and found.logprobs.requires_grad
