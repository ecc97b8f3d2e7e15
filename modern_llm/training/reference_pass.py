"""The reference pass of a DPO run: whose values, how they are scored, and the check before step
1."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import StorageError
from modern_llm.data.batches import collate
from modern_llm.data.plan import Budget, place
from modern_llm.distributed.runtime import Runtime
from modern_llm.models.scorer import TokenScorer
from modern_llm.reference.fill import fill
from modern_llm.reference.keys import scoring_recipe, weights_digest
from modern_llm.reference.store import ReferenceStore, cache_root
from modern_llm.training.batch_source import BatchSource
from modern_llm.training.dpo_config import DPOConfig

log = logging.getLogger(__name__)

# How far the loss of a pair may be from ln 2 when policy and reference are the same weights: what
# other micro-batches do to the rounding of sums over some hundred tokens, by precision of the
# forward. For beta up to 0.1: above, the same rounding moves the loss in proportion.
LN2_BOUND = {"no": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
SELF_CHECK_PAIRS = 16
# Tokens of one forward where the user says nothing. No activations are kept for a backward, so on a
# GPU it may hold more than training does; on a CPU what stays in the caches is fastest (seen on two
# cores: 800 tokens 34 pairs/s, 2,048 tokens 26, 6,000 tokens 27).
FORWARD_TOKENS = {"cpu": 768, "cuda": 32_768}


class ReferencePass:
    """Scores pairs with the scorer as it stands, before training has changed it."""

    def __init__(
        self, runtime: Runtime, scorer: TokenScorer, train_config: TrainingConfig, config: DPOConfig
    ):
        self._runtime, self._scorer = runtime, scorer
        self._train_config, self._config = train_config, config
        self.digest: str | None = None
        if config.needs_reference:
            precision = train_config.precision
            recipe = scoring_recipe(scorer.config, "float32" if precision == "no" else precision)
            self.digest = weights_digest(scorer.model)
            runtime.agree(self.digest, "the reference's weights")
            self._store = ReferenceStore(cache_root(), self.digest, recipe)
        elif runtime.is_main:
            log.info("reference: loss_type %s uses none", config.loss_type)

    def values(self, source: BatchSource, what: str) -> NDArray[np.float32] | None:
        """Return the reference's sums (P, 2) for every pair of `source`; None for a loss without
        one."""
        if not self._config.needs_reference:
            return None
        score = Scoring(self._runtime, self._scorer, source, self._train_config)
        values, report = fill(self._runtime, source.examples.table, self._store, score)
        if self._runtime.is_main:
            pairs = report.scored / 2 / max(report.seconds, 1e-9)
            log.info(
                "reference pass over %s: needed %d, found %d, scored %d in %.1f s%s",
                what,
                report.needed,
                report.found,
                report.scored,
                report.seconds,
                f" ({pairs:.1f} pairs/s)" if report.scored else "; nothing was computed",
            )
        return values

    def check(self, source: BatchSource, values: NDArray[np.float32] | None) -> None:
        """Score a sample of the stored values again: the loss of each of these pairs must be ln 2.

        Raises:
            StorageError: a stored value is not what these weights give; names the worst pair.
        """
        if values is None:
            return
        count = min(self._config.self_check_pairs or SELF_CHECK_PAIRS, len(values))
        sample = np.unique(np.linspace(0, len(values) - 1, count).astype(np.int64))
        score = Scoring(self._runtime, self._scorer, source, self._train_config)
        worst = (0.0, -1)
        for indices, sums, _ in score(sample):
            log_ratios = sums.double().cpu() - torch.from_numpy(values[indices]).double()
            losses = -logsigmoid(self._config.beta * (log_ratios[:, 0] - log_ratios[:, 1]))
            off = (losses - math.log(2)).abs()
            if len(off):
                off = off.nan_to_num(nan=math.inf)
                worst = max(worst, (float(off.max()), int(indices[int(off.argmax())])))
        distance, index = max(self._runtime.gather(worst))
        bound = LN2_BOUND[self._train_config.precision] * max(1.0, self._config.beta / 0.1)
        if not distance <= bound:
            raise StorageError(
                f"{source.examples.table.origin(index)}: policy and reference are the same "
                "weights, but the loss "
                f"of this pair is off ln 2 by {distance:.3g} (bound {bound:g}): the stored "
                "reference values are not "
                f"this model's; remove {self._store.folder} and run again"
            )
        if self._runtime.is_main:
            log.info(
                "reference check: %d pairs within %.1e of ln 2 (bound %g)", count, distance, bound
            )


class Scoring:
    """Forward-only scoring of given pairs, this rank's share of them."""

    def __init__(
        self, runtime: Runtime, scorer: TokenScorer, source: BatchSource, config: TrainingConfig
    ):
        self._runtime, self._scorer, self._source = runtime, scorer, source
        automatic = FORWARD_TOKENS.get(runtime.device.type, 8192)
        self._budget = Budget(tokens=config.tokens_per_micro_batch or automatic)

    def __call__(
        self, pairs: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
        examples, shared = self._source.examples, self._source.shared
        ranks = place(
            pairs, examples.sizes, world=self._runtime.world, budget=self._budget, shared=shared
        )
        training = self._scorer.training
        self._scorer.eval()
        for part in ranks[self._runtime.rank]:
            batch = collate(examples, part, shared=shared).to(self._runtime.device)
            with torch.inference_mode(), self._runtime.accelerator.autocast():
                output = self._scorer(batch.ids, batch.positions, batch.segments, batch.targets)
            yield batch.examples, batch.sums(output.logprobs), batch.lengths
        self._scorer.train(training)
