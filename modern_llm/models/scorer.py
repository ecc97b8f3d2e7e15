"""`TokenScorer`: log-probs of target tokens under any causal LM of `transformers`.

It is the only module given to `accelerator.prepare`, so that DDP, ZeRO and FSDP always see a whole
forward. Logits never leave it. `probe` measures the `Capabilities` of the model.

Letters: R rows, L tokens of a row, N target tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from modern_llm.models.attention.cpu_blocks import MERGE_BELOW
from modern_llm.models.attention.flex import SIDE
from modern_llm.models.attention.prefix_tree import (
    Backend,
    Parts,
    SplitRows,
    TreeMask,
    TreeMasks,
)
from modern_llm.models.attention.sequence import SequenceGroup, joined
from modern_llm.models.cpu.last_layer import narrows, needed_of
from modern_llm.models.exact_parts import join, split
from modern_llm.models.head import FusedHead, target_logprobs
from modern_llm.models.mixers import Routes, routed
from modern_llm.models.routers import RouterLoss, has_experts, without_router_loss


class ScorerOutput(NamedTuple):
    """Result of one forward."""

    parts: Tensor
    """(3, N) log-probs of the targets in parts, which a wrapper may cast to bfloat16."""
    aux_loss: Tensor | None
    """() load-balancing loss of the routers over the real tokens; None if the run has none."""
    log_squares: Tensor | None = None
    """(N,) log of the sum of squared probabilities where each target is predicted, without
    gradient; None unless `TokenScorer.log_squares` is set."""

    @property
    def logprobs(self) -> Tensor:
        """(N,) natural-log probabilities of the targets, float32 (float64 for a float64 model)."""
        return join(self.parts)


@dataclass(frozen=True)
class Capabilities:
    """Features that a model supports exactly, as measured by `probe`."""

    trees: bool
    """A row may hold several trees, in which answers share their prompt."""
    fused: bool
    """The head may be computed in chunks, on target positions only."""
    padded: bool = True
    """Rows of several lengths may share a forward; otherwise one row per forward."""
    backend: Backend = "mask"
    """Backend of the tree attention."""
    windows: tuple[int | None, ...] = ()
    """Sliding windows of the layers; None is full attention."""
    mixers: tuple[str, ...] = ()
    """Classes of layers with a state, which run on one sequence per response (`models.mixers`)."""
    notes: tuple[str, ...] = ()
    """Reasons why a feature is off, one line each."""


class TokenScorer(nn.Module):
    """Scorer of target tokens: (ids, positions, segments, targets) -> log-probs.

    Args:
        router_loss: see `routers.router_loss_of`; None computes none.
        sequence: the processes that call this scorer with the same rows and compute a part of their
            tokens each; all of them get all log-probs. None computes alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capabilities: Capabilities,
        router_loss: RouterLoss | None = None,
        sequence: SequenceGroup | None = None,
    ):
        super().__init__()
        self.model = model
        self.capabilities = capabilities
        self.merge_below = MERGE_BELOW
        self.log_squares = False
        """Whether a forward also returns `ScorerOutput.log_squares`, which WPO weighs pairs by."""
        self._router_loss = router_loss
        self.sequence = sequence
        # A process of a group may have no state that predicts a target.
        self.narrows = capabilities.fused and narrows(model) and sequence is None
        """Whether the last layer computes only the states that predict a target."""

    @property
    def config(self):  # noqa: ANN201
        """The model's configuration; DeepSpeed reads it."""
        return self.model.config

    @property
    def _no_split_modules(self):  # noqa: ANN202
        """The classes of the decoder layers that FSDP wraps; Accelerate reads it."""
        return self.model._no_split_modules

    @property
    def has_experts(self) -> bool:
        """Whether tokens choose among experts."""
        return has_experts(self.model)

    @property
    def aux_coefficient(self) -> float:
        """Weight of the routers' load-balancing loss in the gradient; 0 if the run has none."""
        return 0.0 if self._router_loss is None else self._router_loss.coefficient

    def forward(
        self, ids: Tensor, positions: Tensor, segments: Tensor, targets: Tensor
    ) -> ScorerOutput:
        """Score the targets.

        Args:
            ids: (R, L) int64 token ids; padding may have any valid id.
            positions: (R, L) int64.
            segments: (R, L, 2) int64, [tree, branch]; branch 0 is the prefix, tree -1 is padding.
                Without trees, each row holds one sequence with padding at its end. (R, L, 3) is
                for responses that share more than the prefix, see `attention.visible`.
            targets: (2, N) int64: flat index into R * L of the state that predicts the target, and
                the target's token id.
        """
        tree_shapes = [(*ids.shape, width) for width in (2, 3)]
        if ids.ndim != 2 or positions.shape != ids.shape or segments.shape not in tree_shapes:
            raise ValueError(
                f"ids and positions must be (R, L), segments (R, L, 2), got {tuple(ids.shape)}, "
                f"{tuple(positions.shape)}, {tuple(segments.shape)}"
            )
        blocks = SIDE if self.capabilities.trees and self.capabilities.backend == "flex" else 1
        parts = 1 if self.sequence is None else self.sequence.size
        whole = _padded(math.lcm(blocks, parts), ids, positions, segments, targets)
        ids, positions, segments, targets = whole
        real = segments[..., 0] >= 0
        if self.sequence is not None:
            return self._forward_part(self.sequence, ids, positions, segments, targets)
        if self.capabilities.trees:
            tree = self._masks(segments, positions, targets[0])
            with routed(Routes(segments) if self.capabilities.mixers else None):
                return self._forward_once(ids, real, targets, position_ids=positions, tree=tree)
        if self.capabilities.padded:
            # The model computes positions itself: some models do not start at 0.
            return self._forward_once(ids, real, targets, attention_mask=real.long())
        return self._forward_row_by_row(ids, real, targets)

    def _forward_part(
        self,
        group: SequenceGroup,
        ids: Tensor,
        positions: Tensor,
        segments: Tensor,
        targets: Tensor,
    ) -> ScorerOutput:
        """Compute this process's part of every row; return the log-probs of all targets."""
        rows, length = ids.shape
        part = length // group.size
        here = slice(group.rank * part, (group.rank + 1) * part)
        sources, labels = targets.unbind(0)
        row, at = sources // length, sources % length - here.start
        mine = ((at >= 0) & (at < part)).nonzero().flatten()
        own = torch.stack([(row * part + at)[mine], labels[mine]])
        tree = self._masks(segments, positions, sources)
        more = {"position_ids": positions[:, here], "tree": tree}
        output = self._forward_once(ids[:, here], segments[..., 0] >= 0, own, **more)
        logprobs, squares = (
            None if found is None else joined(found, mine, len(sources), group)
            for found in (output.logprobs, output.log_squares)
        )
        return ScorerOutput(split(logprobs), output.aux_loss, squares)

    def _forward_row_by_row(self, ids: Tensor, real: Tensor, targets: Tensor) -> ScorerOutput:
        """Run one forward per row, without padding."""
        width = ids.shape[1]
        sizes = real.sum(1).tolist()
        order, logprobs, squares, losses = [], [], [], []
        for row, size in enumerate(sizes):
            here = (targets[0] // width == row).nonzero().flatten()
            sources, labels = targets[:, here].unbind(0)
            one = slice(row, row + 1)
            part = torch.stack([sources - row * width, labels])
            output = self._forward_once(ids[one, :size], real[one, :size], part)
            order.append(here)
            logprobs.append(output.logprobs)
            squares.append(output.log_squares)
            losses.append(output.aux_loss)
        back = torch.cat(order).argsort()
        found = torch.cat(logprobs)[back]
        log_squares = torch.cat(squares)[back] if self.log_squares else None
        if self._router_loss is None:
            return ScorerOutput(split(found), None, log_squares)
        weighted = [loss * size for loss, size in zip(losses, sizes, strict=True)]
        return ScorerOutput(split(found), torch.stack(weighted).sum() / sum(sizes), log_squares)

    def _forward_once(
        self, ids: Tensor, real: Tensor, targets: Tensor, **more: object
    ) -> ScorerOutput:
        """Run one forward of the model."""
        inputs: dict[str, object] = {"input_ids": ids, "use_cache": False, **more}
        sources, labels = targets.unbind(0)
        if self._router_loss is not None:
            inputs["output_router_logits"] = True
        else:
            inputs |= without_router_loss(self.model)
        if self.capabilities.fused:
            outputs = self.model.base_model(**inputs)
            hidden = outputs.last_hidden_state.flatten(0, 1).index_select(0, sources)
            head = self.model.get_output_embeddings()
            if self.log_squares:
                logprobs, squares = head(hidden, labels, squares=True)
            else:
                logprobs, squares = head(hidden, labels), None
        else:
            outputs = self.model(**inputs)
            logprobs, squares = _plain_logprobs(outputs.logits, sources, labels, self.log_squares)
        aux = None
        if self._router_loss is not None:
            logits = outputs.router_logits
            if self.sequence is not None:
                logits = tuple(_whole_rows(each, real.shape, self.sequence) for each in logits)
            aux = self._router_loss(logits, real)
        return ScorerOutput(split(logprobs), aux, squares)

    def _masks(
        self, segments: Tensor, positions: Tensor, sources: Tensor
    ) -> dict[int | None, TreeMask] | Parts | SplitRows:
        device = segments.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.model.dtype
        masks = TreeMasks(segments, positions, dtype, self.capabilities.backend, self.merge_below)
        if self.narrows:
            masks.needed = needed_of(masks, sources, segments.shape[:2])
        if not self.capabilities.windows:
            self.asked = masks  # the probe reads the model's windows from it
            return masks if self.sequence is None else SplitRows(masks, self.sequence)
        if masks.needed is not None:
            return masks
        known = {window: masks[window] for window in self.capabilities.windows}
        if self.sequence is not None:
            return SplitRows(known, self.sequence)
        return Parts(known) if self.capabilities.backend == "blocks" else known


def _padded(
    multiple: int, ids: Tensor, positions: Tensor, segments: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pad rows to a multiple of FlexAttention's blocks, whose kernels then need no bounds checks
    and see few lengths, and to parts of equal length. Batches for training are padded already; rows
    that callers make are not.
    """
    length = ids.shape[1]
    short = -length % multiple
    if not short:
        return ids, positions, segments, targets
    sources, labels = targets.unbind(0)
    sources = sources + sources // length * short
    return (
        F.pad(ids, (0, short)),
        F.pad(positions, (0, short)),
        F.pad(segments, (0, 0, 0, short), value=-1),
        torch.stack([sources, labels]),
    )


def _whole_rows(values: Tensor, shape: torch.Size, group: SequenceGroup) -> Tensor:
    """Return (R * L, ...) of all processes from the (R * l, ...) of this one."""
    rows, length = shape
    part = length // group.size
    own = torch.arange(group.rank * part, (group.rank + 1) * part, device=values.device)
    starts = torch.arange(rows, device=values.device)[:, None] * length
    return joined(values, (starts + own).flatten(), rows * length, group)


def _plain_logprobs(
    logits: Tensor, sources: Tensor, labels: Tensor, squares: bool
) -> tuple[Tensor, Tensor | None]:
    """Return log-probs (N,) from full logits (R, L, V), for models whose head cannot be fused, and
    with `squares` the logs of the sums of squared probabilities."""
    chosen = logits.flatten(0, 1).index_select(0, sources)
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32)).log_softmax(-1)
    found = chosen.gather(-1, labels[:, None]).squeeze(-1)
    return found, (2 * chosen.detach()).logsumexp(-1) if squares else None


__all__ = ["Capabilities", "FusedHead", "ScorerOutput", "TokenScorer", "target_logprobs"]
