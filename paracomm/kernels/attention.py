"""Attention: the operations that run the kernels of attention_{forward,backward}_kernels.py, or their eager twin.

Shapes: B batch, H query heads, G key-value heads (H = G R: query head h looks at h // R), T queries, S keys, K head
size. Strides may be any whose last one is 1. Everything is deterministic: the same bits from run to run.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paracomm.errors import InvalidArgument
from paracomm.kernels import derivatives, reference, select
from paracomm.kernels.arguments import (
    expect_indices,
    expect_positive,
    expect_tensors,
    expect_window,
    is_integer,
    readable,
    without_values,
)
from paracomm.kernels.autocast import autocast_dtype, autocast_off, cast

HEAD_SIZES = (1, 256)
WIDEST_FLOAT32 = 128
"""Wider heads in float32 are computed by the twin on every device."""
NO_WINDOW = -1
NO_CAP = 0.0


@dataclass(frozen=True)
class Dropout:
    """Which weights of attention are dropped: a function of the element's place in the whole batch, see philox.py.

    seed: 64 bits; step, stream: 32 bits; p: 0 <= p < 1. rows: int64 [B], of the samples in the global batch.
    heads: (first head of this tensor, heads in all). q_positions [T], k_positions [S]: int64, below 2^20;
    None: 0, 1, ...
    """

    seed: int
    step: int
    stream: int
    p: float
    rows: Tensor
    heads: tuple[int, int]
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None

    @property
    def threshold(self) -> int:
        """Words below it are dropped."""
        return reference.threshold(self.p)


def attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    dropout: Dropout | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    max_q: int | None = None,
    max_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out_BHTK of q's dtype, lse_BHT float32, natural, without a gradient): softmax(scale q k^T) v.

    Sequences of different lengths lie behind each other with `cu_q` and `cu_k`: int32 [B + 1], where they begin and the
    last one ends; q is [1, H, sum T, K] then, k and v [1, G, sum S, K], and max_q, max_k are at least the longest T and
    S. Tokens that belong to no sequence, as those after the last, have an out of 0, an lse of -inf and gradients of 0.

    Args:
        causal: query t looks at keys up to t + S - T (both sequences end together).
        scale: more than 0; None: 1 / sqrt(K).
        window: query t looks at keys from t + S - T - window + 1 on.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2).
        key_mask: bool [B, S], False for a key that nobody looks at; not with cu_q.
        dropout: of the weights.

    A query that sees no key has an out of 0 and an lse of -inf. Under autocast q, k and v are cast to its dtype. Raises
    InvalidArgument for what does not fit; cu_q and cu_k that do not rise within their tokens, by max_q and max_k at
    most, are refused where they lie on a CPU.
    """
    expect_tensors("attention", {"q": q_BHTK, "k": k_BGSK, "v": v_BGSK})
    if (lower := autocast_dtype(q_BHTK)) is not None:
        q_BHTK, k_BGSK, v_BGSK = cast(lower, q_BHTK, k_BGSK, v_BGSK)
        with autocast_off(q_BHTK):
            return attention(
                q_BHTK, k_BGSK, v_BGSK, causal=causal, scale=scale, window=window, softcap=softcap,
                key_mask=key_mask, dropout=dropout, cu_q=cu_q, cu_k=cu_k, max_q=max_q, max_k=max_k,
            )  # fmt: skip
    options = _Options.of(
        q_BHTK, k_BGSK, v_BGSK, causal, scale, window, softcap, key_mask, dropout, cu_q, cu_k, max_q, max_k
    )
    if _runs(q_BHTK):
        return _forward_op(q_BHTK, k_BGSK, v_BGSK, *options.flat())
    return _eager(q_BHTK, k_BGSK, v_BGSK, options)


def attention_forward(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """As attention(), by the kernel, and not differentiable: for blocks of keys that are put together by lse."""
    with torch.no_grad():
        return attention(q_BHTK, k_BGSK, v_BGSK, **options)


def attention_backward(
    grad_BHTK: Tensor, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, out_BHTK: Tensor, lse_BHT: Tensor, *,
    causal: bool = False, scale: float | None = None, window: int | None = None, softcap: float | None = None,
    key_mask: Tensor | None = None, dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) of a block of keys, given `out` and `lse` over all blocks that the queries look at.

    Not differentiable: what is asked to go back through them raises Error.
    """
    expect_tensors("attention_backward", {"grad": grad_BHTK, "q": q_BHTK, "k": k_BGSK, "v": v_BGSK, "out": out_BHTK})
    for name, given, expected in (("grad", grad_BHTK, q_BHTK.shape), ("out", out_BHTK, q_BHTK.shape)):
        if given.shape != expected:
            raise InvalidArgument(f"attention_backward: {name} {list(given.shape)}, expected {list(expected)} as q")
    options = _Options.of(q_BHTK, k_BGSK, v_BGSK, causal, scale, window, softcap, key_mask, dropout)
    return _backward_op(grad_BHTK, q_BHTK, k_BGSK, v_BGSK, out_BHTK, lse_BHT, *options.flat())


@dataclass(frozen=True)
class _Options:
    """Everything but q, k and v, in the order of the operations' arguments."""

    causal: bool
    scale: float
    window: int
    softcap: float
    key_mask: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    max_q: int
    max_k: int
    p: float
    seed: int
    stream: int
    step: int
    rows: Tensor | None
    head_offset: int
    heads_total: int
    q_positions: Tensor | None
    k_positions: Tensor | None

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, window: int | None,
        softcap: float | None, key_mask: Tensor | None, dropout: Dropout | None, cu_q: Tensor | None = None,
        cu_k: Tensor | None = None, max_q: int | None = None, max_k: int | None = None,
    ) -> _Options:  # fmt: skip
        _check(q, k, v, key_mask, cu_q, cu_k, max_q, max_k)
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        expect_positive("attention", scale=scale, softcap=softcap)
        expect_window("attention", window)
        rest: tuple[Any, ...] = (0.0, 0, 0, 0, None, 0, 0, None, None)
        if dropout is not None:
            _check_dropout(dropout, q, k, cu_q)
            rest = (
                dropout.p, reference.signed(dropout.seed), dropout.stream, dropout.step, dropout.rows, *dropout.heads,
                dropout.q_positions, dropout.k_positions,
            )  # fmt: skip
        return cls(
            causal, scale, NO_WINDOW if window is None else window, NO_CAP if softcap is None else softcap, key_mask,
            cu_q, cu_k, q.shape[2] if max_q is None else max_q, k.shape[2] if max_k is None else max_k, *rest,
        )  # fmt: skip

    def flat(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def dropout(self) -> Dropout | None:
        if self.rows is None:
            return None
        heads = (self.head_offset, self.heads_total)
        return Dropout(
            self.seed % (1 << 64), self.step, self.stream, self.p, self.rows, heads, self.q_positions, self.k_positions
        )


def check_heads(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises InvalidArgument where queries [B, H, T, K] cannot look at keys and values [B, G, S, K]."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise InvalidArgument(
            f"{name}: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, expected q [B, H, T, K] and k, v "
            "[B, G, S, K]"
        )
    if not HEAD_SIZES[0] <= q.shape[3] <= HEAD_SIZES[1]:
        raise InvalidArgument(f"{name}: head size {q.shape[3]}, expected {HEAD_SIZES[0]} to {HEAD_SIZES[1]}")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise InvalidArgument(f"{name}: {q.shape[1]} heads are not a multiple of {k.shape[1]} key-value heads")
    if len({x.dtype for x in (q, k, v)}) > 1 or len({x.device for x in (q, k, v)}) > 1:
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise InvalidArgument(f"{name}: q, k, v are {kinds}, expected one dtype and device")


def _check(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
    max_q: int | None, max_k: int | None,
) -> None:  # fmt: skip
    check_heads("attention", q, k, v)
    if key_mask is not None:
        expect_indices("attention", "key_mask", key_mask, torch.bool, (k.shape[0], k.shape[2]), q)
    for longest, most in (("max_q", max_q), ("max_k", max_k)):
        if most is not None and (not is_integer(most) or most < 0):
            raise InvalidArgument(f"attention: {longest} is {most!r}, expected an integer, at least 0")
    if cu_q is None and cu_k is None:
        return
    if cu_q is None or cu_k is None or max_q is None or max_k is None or key_mask is not None:
        raise InvalidArgument("attention: variable lengths need cu_q, cu_k, max_q and max_k, and take no key_mask")
    for name, cu in (("cu_q", cu_q), ("cu_k", cu_k)):
        if not isinstance(cu, Tensor) or cu.dtype != torch.int32 or cu.dim() != 1 or len(cu) < 1:
            kind = f"{cu.dtype} {list(cu.shape)}" if isinstance(cu, Tensor) else type(cu).__name__
            raise InvalidArgument(f"attention: {name} is {kind}, expected int32 [B + 1], equally long")
        expect_indices("attention", name, cu, torch.int32, tuple(cu_q.shape), q)
    if q.shape[0] != 1:
        raise InvalidArgument(f"attention: q {list(q.shape)} with cu_q, expected [1, H, sum of lengths, K]")
    for name, cu, total, most in (("cu_q", cu_q, q.shape[2], max_q), ("cu_k", cu_k, k.shape[2], max_k)):
        if readable(cu):
            _check_edges(name, cu.tolist(), total, most)


def _check_edges(name: str, edges: list[int], total: int, most: int) -> None:
    """Raises InvalidArgument unless they rise within 0..total, by `most` at most."""
    if edges[0] < 0 or edges[-1] > total:
        raise InvalidArgument(f"attention: {name} is {edges[0]}..{edges[-1]}, expected within 0..{total}, the tokens")
    for b, (begin, end) in enumerate(itertools.pairwise(edges)):
        if not 0 <= end - begin <= most:
            raise InvalidArgument(
                f"attention: {name} has {begin}, {end} at sequence {b}, a length of {end - begin}, expected 0 to {most}"
                f", which is max_{name[-1]}"
            )


def _check_dropout(dropout: Dropout, q: Tensor, k: Tensor, cu_q: Tensor | None) -> None:
    B = q.shape[0] if cu_q is None else len(cu_q) - 1
    if not 0.0 <= dropout.p < 1.0:
        raise InvalidArgument(f"attention: dropout p is {dropout.p}, expected 0 <= p < 1")
    expect_indices("attention", "dropout rows", dropout.rows, torch.int64, (B,), q)
    if cu_q is not None and (dropout.q_positions is not None or dropout.k_positions is not None):
        raise InvalidArgument("attention: dropout of variable lengths counts positions from 0 in each sequence")
    if (dropout.q_positions is None) != (dropout.k_positions is None):
        raise InvalidArgument("attention: dropout has q_positions or k_positions, expected both or none")
    for name, places, count in (("q", dropout.q_positions, q.shape[2]), ("k", dropout.k_positions, k.shape[2])):
        if places is not None:
            expect_indices("attention", f"dropout {name}_positions", places, torch.int64, (count,), q)


def _runs(q: Tensor) -> bool:
    """Whether kernels compute. Not for wide heads in float32: three parts of each operand do not fit registers."""
    return select.runs(q) and (q.dtype != torch.float32 or q.shape[3] <= WIDEST_FLOAT32)


# --- the twin ---
def _choices(o: _Options) -> dict[str, Any]:
    return {
        "causal": o.causal, "scale": o.scale, "window": None if o.window == NO_WINDOW else o.window,
        "softcap": None if o.softcap == NO_CAP else o.softcap,
    }  # fmt: skip


def _sequences(q: Tensor, k: Tensor, o: _Options) -> list[tuple[slice, slice, Dropout | None]]:
    """Of sequences behind each other: (queries, keys, dropout) of each, at least one, which may be empty."""
    assert o.cu_q is not None and o.cu_k is not None
    found, dropout = [], o.dropout()
    edges_q, edges_k = [0, q.shape[2]], [0, k.shape[2]]  # of which shapes follow, where there are no values
    if not without_values(o.cu_q):
        edges_q, edges_k = o.cu_q.tolist(), o.cu_k.tolist()
        _check_edges("cu_q", edges_q, q.shape[2], o.max_q)
        _check_edges("cu_k", edges_k, k.shape[2], o.max_k)
    for b, ((q0, q1), (k0, k1)) in enumerate(
        zip(itertools.pairwise(edges_q), itertools.pairwise(edges_k), strict=True)
    ):
        own = None if dropout is None else replace(dropout, rows=dropout.rows[b : b + 1])
        found.append((slice(q0, q1), slice(k0, k1), own))
    return found or [(slice(edges_q[0], edges_q[0]), slice(edges_k[0], edges_k[0]), None)]


def _eager(q: Tensor, k: Tensor, v: Tensor, o: _Options) -> tuple[Tensor, Tensor]:
    if o.cu_q is None:
        return reference.attention(q, k, v, key_mask=o.key_mask, dropout=o.dropout(), **_choices(o))
    sequences = _sequences(q, k, o)
    parts = [
        reference.attention(q[:, :, t], k[:, :, s], v[:, :, s], key_mask=None, dropout=dropout, **_choices(o))
        for t, s, dropout in sequences
    ]
    before, after = sequences[0][0].start, q.shape[2] - sequences[-1][0].stop
    out, lse = (torch.cat(list(each), 2) for each in zip(*parts, strict=True))
    return F.pad(out, (0, 0, before, after)), F.pad(lse, (before, after), value=-torch.inf)


def _eager_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, o: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    if o.cu_q is None:
        rest: dict[str, Any] = {"key_mask": o.key_mask, "dropout": o.dropout(), **_choices(o)}
        return reference.attention_backward(grad, q, k, v, out, lse, **rest)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for t, s, dropout in _sequences(q, k, o):
        dq[:, :, t], dk[:, :, s], dv[:, :, s] = reference.attention_backward(
            grad[:, :, t], q[:, :, t], k[:, :, s], v[:, :, s], out[:, :, t], lse[:, :, t], key_mask=None,
            dropout=dropout, **_choices(o),
        )  # fmt: skip
    return dq, dk, dv


# --- the operations ---
@torch.library.custom_op("paracomm::attention_forward", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int, softcap: float, key_mask: Tensor | None,
    cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int, p: float, seed: int, stream: int, step: int,
    rows: Tensor | None, head_offset: int, heads_total: int, q_positions: Tensor | None, k_positions: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = _Options(
        causal, scale, window, softcap, key_mask, cu_q, cu_k, max_q, max_k, p, seed, stream, step, rows, head_offset,
        heads_total, q_positions, k_positions,
    )  # fmt: skip
    if _runs(q):
        from paracomm.kernels.attention_launch import launch_forward

        return launch_forward(q, k, v, options)
    with torch.no_grad():
        out, lse = _eager(q, k, v, options)
    return out.contiguous(), lse.to(torch.float32).contiguous()


@_forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("paracomm::attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float, window: int,
    softcap: float, key_mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int, p: float,
    seed: int, stream: int, step: int, rows: Tensor | None, head_offset: int, heads_total: int,
    q_positions: Tensor | None, k_positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    options = _Options(
        causal, scale, window, softcap, key_mask, cu_q, cu_k, max_q, max_k, p, seed, stream, step, rows, head_offset,
        heads_total, q_positions, k_positions,
    )  # fmt: skip
    if _runs(q):
        from paracomm.kernels.attention_launch import launch_backward

        return launch_backward(grad, q, k, v, out, lse, options)
    grads = _eager_backward(grad, q, k, v, out, lse, options)
    return tuple(x.contiguous() for x in grads)  # type: ignore[return-value]


@_backward_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))  # type: ignore[return-value]


_backward_op.register_autograd(derivatives.refused("attention_backward"))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *options = inputs
    out, lse = output
    tensors = [x for x in options if isinstance(x, Tensor)]
    ctx.save_for_backward(q, k, v, out, lse, *tensors)
    ctx.options = [None if isinstance(x, Tensor) else (x,) for x in options]
    ctx.backend = select.current()
    ctx.mark_non_differentiable(lse)


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    left = iter(tensors)
    options = [next(left) if place is None else place[0] for place in ctx.options]
    rest = [None] * len(options)
    with select.backend(ctx.backend), autocast_off(q):
        if derivatives.wanted():
            found = derivatives.pull_back(
                lambda q, k, v: _eager(q, k, v, _Options(*options)), (q, k, v), (grad,), ctx.needs_input_grad[:3]
            )
            return *found, *rest
        return *_backward_op(grad, q, k, v, out, lse, *options), *rest


_forward_op.register_autograd(_differentiate, setup_context=_save)


# --- dropout's mask alone ---
def keep_mask(seed: int, stream: int, step: int, base: Tensor, offsets: Tensor, p: float) -> Tensor:
    """bool [..., J] on the device of `base` (int64 [...]): which elements base[..., None] + offsets (int64 [J]) stay.

    The same bits as paracomm.parallel.rng.keep_mask. Raises InvalidArgument unless 0 <= p < 1.
    """
    if not 0.0 <= p < 1.0:
        raise InvalidArgument(f"keep_mask: p is {p}, expected 0 <= p < 1")
    for name, given in (("base", base), ("offsets", offsets)):
        expect_indices("keep_mask", name, given, torch.int64, tuple(given.shape), base)
    threshold = reference.threshold(p)
    if base.numel() and len(offsets) and select.runs(torch.empty(0, device=base.device)):
        from paracomm.kernels.attention_launch import launch_keep_mask

        return launch_keep_mask(seed, stream, step, base, offsets, threshold)
    return reference.keep_mask(seed, stream, step, base, offsets, threshold)
