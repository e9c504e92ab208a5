"""Attention of a few new tokens over a cache of keys and values, for generation. Not differentiable.

Shapes: B sequences, H query heads, G key-value heads (H = G R: query head h looks at h // R), T new tokens, S places
in the cache, K head size. A sequence's keys are divided over programs, see decode_kernels.py; the same bits each time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from paracomm.errors import InvalidArgument
from paracomm.kernels import derivatives, reference_decode, select
from paracomm.kernels.arguments import expect_indices, expect_positive, expect_tensors, expect_window, is_integer
from paracomm.kernels.attention import NO_CAP, NO_WINDOW, check_heads
from paracomm.kernels.autocast import autocast_dtype, autocast_off, cast


def decode(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    lengths: Tensor | int | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """(out_BHTK of q's dtype, lse_BHT float32, natural): softmax(scale q k^T) v over the places of the cache in use.

    Args:
        k_BGSK, v_BGSK: the cache, which holds the new tokens already; any strides whose last is 1.
        lengths: how many places are in use, the T new ones among them: int32 [B], or one number for all; None: S. A
            number is known here and is cheaper; of a tensor, which is not looked at here, what is above S counts as S.
            Places that are not in use hold any finite numbers.
        scale: more than 0; None: 1 / sqrt(K).
        window, softcap: as attention()'s. Token t looks at places up to length - T + t.
        need_lse: without it lse is empty, which on a CPU is faster.

    A token that sees no place has an out of 0 and an lse of -inf. Differentiable in all but lse, by the twin. Under
    autocast q, k and v are cast to its dtype. Raises InvalidArgument for what does not fit.
    """
    expect_tensors("decode", {"q": q_BHTK, "k": k_BGSK, "v": v_BGSK})
    if (lower := autocast_dtype(q_BHTK)) is not None:
        q_BHTK, k_BGSK, v_BGSK = cast(lower, q_BHTK, k_BGSK, v_BGSK)
        with autocast_off(q_BHTK):
            return decode(
                q_BHTK, k_BGSK, v_BGSK, lengths, scale=scale, window=window, softcap=softcap, need_lse=need_lse
            )
    _check(q_BHTK, k_BGSK, v_BGSK, lengths)
    scale = 1 / math.sqrt(q_BHTK.shape[-1]) if scale is None else scale
    expect_positive("decode", scale=scale, softcap=softcap)
    expect_window("decode", window)
    if lengths is not None and not isinstance(lengths, Tensor):
        k_BGSK, v_BGSK, lengths = k_BGSK[:, :, :lengths], v_BGSK[:, :, :lengths], None
    if select.runs(q_BHTK):
        out, lse = _decode_op(
            q_BHTK, k_BGSK, v_BGSK, lengths, scale, NO_WINDOW if window is None else window,
            NO_CAP if softcap is None else softcap,
        )  # fmt: skip
    else:
        out, lse = reference_decode.decode(
            q_BHTK, k_BGSK, v_BGSK, lengths, scale=scale, window=window, softcap=softcap, need_lse=need_lse
        )
    return out, lse if need_lse else lse.new_empty(0)


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | int | None) -> None:
    check_heads("decode", q, k, v)
    if isinstance(lengths, Tensor):
        expect_indices("decode", "lengths", lengths, torch.int32, tuple(q.shape[:1]), q)
    elif lengths is not None and not is_integer(lengths):
        raise InvalidArgument(f"decode: lengths is {lengths!r}, expected int32 [{q.shape[0]}] or an integer")
    elif lengths is not None and not 0 <= lengths <= k.shape[2]:
        raise InvalidArgument(f"decode: length {lengths}, expected 0 to {k.shape[2]}, the places of the cache")


@torch.library.custom_op("paracomm::decode", mutates_args=())
def _decode_op(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    if select.runs(q):
        from paracomm.kernels.decode_launch import launch_decode

        return launch_decode(q, k, v, lengths, scale, window, softcap)
    out, lse = _twin(q, k, v, lengths, scale, window, softcap)
    return out.contiguous(), lse.to(torch.float32)


def _twin(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    return reference_decode.decode(
        q, k, v, lengths, scale=scale, window=None if window == NO_WINDOW else window,
        softcap=None if softcap == NO_CAP else softcap, need_lse=True,
    )  # fmt: skip


@_decode_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lengths, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, lengths)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, lengths = ctx.saved_tensors
    with autocast_off(q):
        found = derivatives.pull_back(
            lambda q, k, v: _twin(q, k, v, lengths, *ctx.options), (q, k, v), (grad,), ctx.needs_input_grad[:3]
        )
    return *found, None, None, None, None


_decode_op.register_autograd(_differentiate, setup_context=_save)
