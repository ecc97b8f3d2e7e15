"""Capabilities of a model, measured at load: trees, padded rows, the fused head, fused CPU layers.

Two models are measured: the loaded one, in short rows, and its `twin`, a small one of the same
architecture in rows longer than all its windows and other special lengths, with gradients. Each is
run by its own plain forward, one unpadded sequence at a time, and again as training runs it. A
feature whose results differ on either model is turned off, and the log says so in one line.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from modern_llm.config.errors import UserError
from modern_llm.models.attention import agreement
from modern_llm.models.attention.prefix_tree import (
    Backend,
    backends,
    register_tree_attention,
)
from modern_llm.models.attention.sequence import SequenceGroup
from modern_llm.models.cpu.fused_ops import patch_cpu_ops, restore_ops
from modern_llm.models.cpu.last_layer import narrow_last_layer
from modern_llm.models.logits import bounds_of, fuse
from modern_llm.models.mixers import gather_mixers, restore_mixers
from modern_llm.models.modes import settle
from modern_llm.models.quantized import product_dtype
from modern_llm.models.row_split import check_split
from modern_llm.models.scorer import Capabilities
from modern_llm.models.subject import LONG, ROW, SHORT, TOLERANCE, TWIN_TOLERANCE, Subject
from modern_llm.models.twin import twin_of

log = logging.getLogger(__name__)


# Gradients of the twin are measured even if the caller is in inference mode.
@torch.inference_mode(False)
def probe(
    model: PreTrainedModel,
    *,
    trees: bool = True,
    tried: tuple[Backend, ...] | None = None,
    lean: bool = True,
    dropout: bool | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    sequence: SequenceGroup | None = None,
) -> Capabilities:
    """Measure the capabilities of `model` and set it up to use them.

    Args:
        trees: False skips the measurement of trees: the user requested separate rows.
        tried: backends of the tree attention; the first exact one is used. Default: by device.
        lean: on a CPU, use the functions of `cpu.fused_ops`.
        dropout: whether the model trains with dropout; None if it is only scored.
        device, dtype: of the attention in the run; default: the model's. Sharded weights are probed
            on the host before, and the kernels of the attention on the device.
        sequence: the processes that share the rows of the run; they probe together.

    Side effects: sets the fused head and the tree attention in `model` where they are exact.

    Raises:
        UserError: a token's log-prob depends on later tokens, or rows cannot be split.
    """
    training = model.training
    model.eval()
    device, dtype = device or model.device, dtype or model.dtype
    twin = _on_device(twin_of(model, 1 if sequence is None else sequence.size), device)
    # Long rows of the model itself: on a GPU they are cheap, without a twin the only evidence.
    long = twin is None or model.device.type == "cuda"
    tolerance = TOLERANCE[product_dtype(model, model.dtype)]
    modes = []
    if dropout is not None:
        asked = [(model, 2 * ROW, tolerance)]
        asked += [] if twin is None else [(twin, sum(LONG[0][:2]), TWIN_TOLERANCE)]
        modes = settle(asked, dropout=dropout)
    subjects = [Subject(model, LONG if long else SHORT, tolerance)]
    if subjects[0].looks_ahead():
        raise UserError(
            f"{type(model).__name__}: a token's log-prob depends on later tokens (an encoder, or a "
            "configuration without is_decoder: true); give a decoder"
        )
    if twin is not None:
        subjects.append(Subject(twin, LONG, TWIN_TOLERANCE, gradients=True))
    trial = _Trial(subjects)
    trial.notes += modes
    trial.patch_cpu_ops(lean and model.device.type == "cpu")
    trial.pad()
    trial.fuse()
    if trees:
        trial.share(tried or backends(device), device, dtype)
    check_split(trial.subjects, trial.capabilities, trial.notes, sequence)
    model.train(training)
    trial.log(type(model).__name__)
    return replace(trial.capabilities, windows=subjects[0].windows, notes=tuple(trial.notes))


def _on_device(twin: PreTrainedModel | None, device: torch.device) -> PreTrainedModel | None:
    """Return the twin on a GPU, where FlexAttention has a backward; a CPU's twin stays."""
    return twin.to(device) if twin is not None and device.type == "cuda" else twin


class _Trial:
    """Trial of features on all subjects; a feature that fails on one is off for all."""

    def __init__(self, subjects: list[Subject]):
        self.subjects = subjects
        self.capabilities = Capabilities(trees=False, fused=False)
        self.notes: list[str] = []
        self.refused = ""
        """Why the fastest backend of the tree attention is not used."""
        self._patched = False

    def log(self, name: str) -> None:
        """Write the notes on the model of that name."""
        for note in self.notes:
            if self.refused and note.endswith(self.refused):
                log.warning("warning: %s: %s", name, note)
            else:
                log.info("%s: %s", name, note)

    def _why_not(self, ask: Callable[[Subject], str]) -> str:
        return next(filter(None, map(ask, self.subjects)), "")

    def patch_cpu_ops(self, wanted: bool) -> None:
        """Put the functions of `cpu.fused_ops` into the layers."""
        if not wanted:
            return
        for subject in self.subjects:
            patch_cpu_ops(subject.model)
        why = self._why_not(Subject.differs_plainly)
        if why:
            self._restore_ops(f"their version for a CPU {why}")
            return
        self._patched = True
        for subject in self.subjects:
            narrow_last_layer(subject.model)

    def _restore_ops(self, reason: str) -> None:
        self._patched = False
        for subject in self.subjects:
            restore_ops(subject.model)
        self.notes.append(f"the model's own layers: {reason}")

    def pad(self) -> None:
        """Try rows of several lengths in one forward."""
        why = self._why_not(lambda subject: subject.pads(self.capabilities))
        if why:
            self.capabilities = replace(self.capabilities, padded=False)
            self.notes.append(f"one row at a time: a padded row {why}")

    def fuse(self) -> None:
        """Try the fused head without a bound of the logits, then with the measured bound."""
        why = self._why_not_fused([None] * len(self.subjects))
        if why:
            bounds = bounds_of([subject.last for subject in self.subjects])
            if any(bounds):
                why = self._why_not_fused(bounds)
        if why:
            self.notes.append(f"plain logits: {why}")
        else:
            self.capabilities = replace(self.capabilities, fused=True)

    def _why_not_fused(self, bounds: list[float | None]) -> str:
        pairs = zip(self.subjects, bounds, strict=True)
        if not all([fuse(subject.model, bound) for subject, bound in pairs]):
            return "the head is not a linear layer"
        if not any(subject.last.can_grow for subject in self.subjects):
            return "the bound of the logits cannot be measured: they cannot be enlarged"
        fused = replace(self.capabilities, fused=True)
        why = self._why_not(lambda subject: subject.differs(fused))
        why = why or self._why_not(lambda subject: subject.last.differs(fused))
        return why and f"the fused head {why}"

    def share(self, tried: tuple[Backend, ...], device: torch.device, dtype: torch.dtype) -> None:
        """Try trees, in which answers share their prompt, with the first exact backend.

        A model that is not exact is tried again with its mixers on separate sequences.
        """
        register_tree_attention()
        why = self._first_of(tried, device, dtype)
        if why and self._gather_mixers():
            why = self._first_of(tried, device, dtype)
            if why:
                self._restore_mixers()
        if why and self._patched:
            kept = list(self.notes)
            self._restore_ops(f"with their version for a CPU {why}")
            why = self._first_of(tried, device, dtype)
            if why:  # the CPU functions are not the reason: use them again
                self.notes = kept
                self.patch_cpu_ops(True)
        if why:
            self.notes.append(f"separate rows: {why}")

    def _gather_mixers(self) -> bool:
        """Find the modules that mix tokens themselves, and gather sequences around them."""
        subject = self.subjects[-1]
        kinds = subject.mixers(replace(self.capabilities, trees=True, padded=True))
        if not kinds:
            return False
        for each in self.subjects:
            gather_mixers(each.model, kinds)
        names = tuple(sorted(kind.__name__ for kind in kinds))
        self.capabilities = replace(self.capabilities, mixers=names)
        self.notes.append(
            f"{', '.join(names)}: runs on one sequence per response, because it has a state"
        )
        return True

    def _restore_mixers(self) -> None:
        for subject in self.subjects:
            restore_mixers(subject.model)
        self.capabilities = replace(self.capabilities, mixers=())
        self.notes.pop()

    def _first_of(
        self, tried: tuple[Backend, ...], device: torch.device, dtype: torch.dtype
    ) -> str:
        why, self.refused = "", ""
        for backend in tried:
            capabilities = replace(self.capabilities, trees=True, padded=True, backend=backend)
            why = self._why_not(lambda subject, a=capabilities: subject.shares(a, device))
            if not why and backend == "flex" and device.type == "cuda":
                why = agreement.why_not(backend, self.subjects[0].calls, device, dtype)
            if not why:
                self.capabilities = capabilities
                if self.refused:
                    self.notes.append(f"attention {backend}, which is slower: {self.refused}")
                return ""
            self.refused = self.refused or f"{backend} is refused, because {why}"
        for subject in self.subjects:
            subject.model.set_attn_implementation(subject.native)
        return why
