"""The fused head: log-probs of target tokens from hidden states, without full logits.

The `(N, V)` logits never exist: chunks of rows are computed and reduced in the forward, and again
in the backward. Those of a head that is not trained (LoRA) are computed once: up to a factor that
the backward brings, the gradient of a state is known in the forward, and as small as the state.
`fuse_head` turns a model's own `lm_head` into this head in place, because ZeRO-3 gathers a weight
only inside the hooks of the module that owns it.

Letters: N target positions, D hidden width, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

# Logits of one chunk, in bytes. 4 MiB stays near the caches of a CPU; a GPU needs larger chunks to
# be busy with one matrix product.
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
# Rows with which a matrix product keeps a GPU busy at a vocabulary of 128,000, and the rows of one
# tile of its kernels: a chunk of 523 rows costs as much as one of 640.
FULL_ROWS, TILE = 1024, 128
# With fewer rows, a CPU spends its time reading the weight of a large vocabulary: with 49,152 x 576
# the four products of 128 rows took 0.88 of the time of twice 64.
LEAST_ROWS = {"cpu": 128}
LEAST_CHUNK = 16 << 20
# In the backward a chunk needs about three more of its size: its gradient, and both in 16 bits.
SHARE_OF_FREE = 1 / 16


@dataclass(frozen=True)
class LogitTransform:
    """Transform of the product of head and hidden state before the softmax.

    logits = softcap * tanh(scale * x / softcap), without the tanh where `softcap` is None.
    Gemma 2/3 cap, Cohere multiplies, Granite divides.
    """

    scale: float = 1.0
    softcap: float | None = None

    def forward_(self, logits: Tensor) -> Tensor:
        """Apply to a chunk (C, V) in place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Turn d/d(logits) (C, V) into d/d(product) in place; `logits` are the transformed ones."""
        if self.softcap is not None:
            # d tanh(u) = 1 - tanh(u)^2, and tanh(u) = logits / softcap
            grad.mul_(1 - (logits / self.softcap).square_())
        if self.scale != 1.0:
            grad.mul_(self.scale)
        return grad


def chunk_rows(vocabulary: int, device: torch.device, itemsize: int) -> int:
    """Return the rows of one chunk.

    On CUDA a chunk has `CHUNK_BYTES` or `FULL_ROWS`, but at most a share of the free memory,
    rounded to a power of two of bytes, so that small differences of free memory do not matter. Its
    rows are a multiple of `TILE`. Call it once per run: the head's gradient is summed by chunk, so
    another size rounds differently.
    """
    size = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    row = vocabulary * max(itemsize, 4)
    if device.type == "cuda":
        share = int(SHARE_OF_FREE * free_memory(device))
        wanted = max(size, FULL_ROWS * row)
        size = max(LEAST_CHUNK, min(wanted, 1 << max(share.bit_length() - 1, 0)))
    rows = max(LEAST_ROWS.get(device.type, 1), size // row)
    return rows if device.type == "cpu" or rows < TILE else rows // TILE * TILE


def free_memory(device: torch.device) -> int:
    """Return the bytes available on a CUDA device, including PyTorch's unused reserve."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


class _TargetLogProbs(torch.autograd.Function):
    """log softmax(transform(h W^T + b))[target] by row.

    The backward recomputes the logits, unless the states alone have a gradient. `master` is the
    weight that gets the gradient, in its own dtype; `weight` is its copy in the dtype of the
    products, without gradient.
    """

    @staticmethod
    def forward(ctx, hidden, master, weight, bias, targets, transform, rows, squares):  # noqa: ANN001
        # At least float32: sums over a vocabulary in bfloat16 are visibly wrong.
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = hidden.new_empty(len(hidden), dtype=dtype)
        normalisers = torch.empty_like(logprobs)
        log_squares = torch.empty_like(logprobs) if squares else None
        needs = ctx.needs_input_grad
        once = needs[0] and not needs[1] and not needs[3]
        slopes = torch.empty_like(hidden) if once else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = transform.forward_(_product(hidden[part], weight, bias).to(dtype))
            chosen = logits.gather(-1, targets[part, None]).squeeze(-1)
            # One pass over memory; `logsumexp` makes four.
            spread = torch.log_softmax(logits, -1)
            logprobs[part] = spread.gather(-1, targets[part, None]).squeeze(-1)
            normalisers[part] = chosen - logprobs[part]
            if log_squares is not None:
                log_squares[part] = (2 * spread).logsumexp(-1)
            if once:
                slope = _slope(spread, targets[part, None], torch.ones_like(chosen)[:, None])
                slope = transform.backward_(slope, logits).to(hidden.dtype)
                torch.mm(slope, weight, out=slopes[part])
        if once:
            ctx.save_for_backward(slopes)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.transform, ctx.rows, ctx.once, ctx.dtype = transform, rows, once, master.dtype
        if log_squares is not None:
            ctx.mark_non_differentiable(log_squares)
        return logprobs, log_squares

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):  # noqa: ANN001
        if ctx.once:
            (slopes,) = ctx.saved_tensors
            return (grad[:, None] * slopes).to(slopes.dtype), *(None,) * 7
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Sums over chunks: in bfloat16 small contributions would be lost.
        grad_weight = torch.zeros_like(weight, dtype=normalisers.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=normalisers.dtype) if needs_bias else None
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            logits = ctx.transform.forward_(
                _product(hidden[part], weight, bias).to(normalisers.dtype)
            )
            upstream = grad[part, None].to(normalisers.dtype)
            kept = ctx.transform.softcap is not None  # its derivative needs them
            spread = logits.clone() if kept else logits
            slope = _slope(spread.sub_(normalisers[part, None]), targets[part, None], upstream)
            slope = ctx.transform.backward_(slope, logits)
            if needs_bias:
                grad_bias += slope.sum(0)
            slope = slope.to(hidden.dtype)
            if needs_hidden:
                torch.mm(slope, weight, out=grad_hidden[part])
            if needs_weight:
                _add_outer_(grad_weight, slope, hidden[part])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(ctx.dtype),
            None,
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _slope(logprobs: Tensor, targets: Tensor, upstream: Tensor) -> Tensor:
    """Turn log-probs (C, V) in place into upstream * d logprob(target) / d logits, for targets and
    upstream (C, 1): the derivative is onehot(target) - softmax."""
    return logprobs.exp_().mul_(-upstream).scatter_add_(-1, targets, upstream)


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(hidden, weight.t()) if bias is None else torch.addmm(bias, hidden, weight.t())


def _add_outer_(total: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """total (V, D) += slope^T (V, C) hidden (C, D), without a (V, D) temporary where dtypes agree,
    or where one product has operands of 16 bits and a sum in float32."""
    if total.dtype == slope.dtype:
        total.addmm_(slope.t(), hidden)
    elif sums_in_float32(slope.device, slope.dtype):
        torch.ops.aten.addmm.dtype_out(total, slope.t(), hidden, total.dtype, out=total)
    else:
        total += torch.mm(slope.t(), hidden)


@lru_cache
def sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of 16-bit operands may be added to a float32 tensor in one operation.

    Measured once: only some versions and devices have it.
    """
    with torch.no_grad():
        left, right = (torch.full((16, 16), 1 / 3, device=device).to(dtype) for _ in range(2))
        total = torch.full((16, 16), 100.0, device=device)
        expected = total + left.float() @ right.float()
        try:
            torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
        except (AttributeError, NotImplementedError, RuntimeError):
            return False
        return bool(torch.allclose(total, expected, rtol=1e-6, atol=1e-5))


def target_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
    rows: int | None = None,
) -> Tensor:
    """Return log softmax(transform(hidden weight^T + bias)) at `targets`; see `target_and_squares`.

    Returns:
        (N,) natural-log probabilities, float32 (float64 for float64 input).
    """
    return target_and_squares(
        hidden, weight, targets, bias=bias, transform=transform, rows=rows, squares=False
    )[0]


def target_and_squares(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    transform: LogitTransform | None,
    rows: int | None,
    squares: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return log-probs at `targets` and, with `squares`, log sum_v p(v)^2 there.

    Args:
        hidden: (N, D) floating; states that predict the targets.
        weight: (V, D); its gradient is summed in float32 and returned in its dtype.
        targets: (N,) int64, each in [0, V).
        bias: (V,) or None.
        rows: rows of a chunk; default: `chunk_rows`.

    Returns:
        (N,) natural-log probabilities, float32 (float64 for float64 input), and (N,) the logs of
        the sums of squared probabilities without gradient, or None.
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden must be (N, D) and targets (N,), got {hidden.shape} and {targets.shape}"
        )
    master, weight = weight, weight.detach()
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif hidden.dtype != weight.dtype:
        hidden = hidden.to(weight.dtype)
    rows = rows or chunk_rows(len(weight), hidden.device, hidden.element_size())
    with torch.autocast(hidden.device.type, enabled=False):
        return _TargetLogProbs.apply(
            hidden, master, weight, bias, targets, transform or LogitTransform(), rows, squares
        )


class FusedHead(nn.Linear):
    """A model's own `lm_head` that also returns log-probs (N,): `head(hidden, targets)`.

    `fuse_head` makes it by a change of the module's class: parameters, names, ties, hooks and the
    output of `save_pretrained` stay the same.
    """

    transform: LogitTransform
    rows: dict[bool, int]
    """Rows of a chunk with and without gradients, each set in its first forward: the probe and the
    reference pass have more free memory than training."""

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, *, squares: bool = False
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Return logits (..., V) without `targets`, else log-probs (N,) of `targets` (N,).

        With `squares` it is the pair of `target_and_squares`.
        """
        if targets is None:
            return super().forward(hidden)
        training = torch.is_grad_enabled()
        if training not in self.rows:
            size = hidden.element_size()
            self.rows[training] = chunk_rows(len(self.weight), hidden.device, size)
        found = target_and_squares(
            hidden,
            self.weight,
            targets,
            bias=self.bias,
            transform=self.transform,
            rows=self.rows[training],
            squares=squares,
        )
        return found if squares else found[0]


def fuse_head(head: nn.Module, transform: LogitTransform) -> bool:
    """Turn a plain linear head into a `FusedHead` in place; return False for other modules."""
    if type(head) not in (nn.Linear, FusedHead):
        return False
    head.__class__ = FusedHead
    head.transform, head.rows = transform, {}
    return True
