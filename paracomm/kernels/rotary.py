"""Rotary embedding: the operation that runs the kernel of rotary_kernels.py, or its eager twin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paracomm.errors import InvalidArgument
from paracomm.kernels import reference_rotary, select
from paracomm.kernels.arguments import expect_tensors
from paracomm.kernels.autocast import autocast_dtype, autocast_off, widest


def rotary(x_BHTK: Tensor, cosine_TK: Tensor, sine_TK: Tensor) -> Tensor:
    """x cosine + [-high, low] sine, where low and high are the halves of the features of x [B, H, T, K].

    Su et al., "RoFormer", 2021, with the pairs laid out as in Llama. Differentiable in all three; where a table
    requires a gradient, the twin computes. Raises InvalidArgument unless K is even, the tables are [T, K] and all have
    one dtype and device; under autocast the result is of the widest dtype.
    """
    tensors = {"x": x_BHTK, "cosine": cosine_TK, "sine": sine_TK}
    expect_tensors("rotary", tensors)
    if autocast_dtype(x_BHTK) is not None:
        with autocast_off(x_BHTK):
            wide = widest(*tensors.values())
            return rotary(*(x.to(wide) for x in tensors.values()))
    _check(x_BHTK, cosine_TK, sine_TK)
    learned = torch.is_grad_enabled() and (cosine_TK.requires_grad or sine_TK.requires_grad)
    if not select.runs(x_BHTK) or learned:
        return reference_rotary.rotary(x_BHTK, cosine_TK, sine_TK)
    return _op(x_BHTK, cosine_TK, sine_TK, False)


def _check(x: Tensor, cosine: Tensor, sine: Tensor) -> None:
    if x.dim() != 4 or x.shape[3] % 2 or not x.shape[3]:
        raise InvalidArgument(f"rotary: x {list(x.shape)}, expected [B, H, T, K] with an even K")
    for name, table in (("cosine", cosine), ("sine", sine)):
        if table.shape != x.shape[2:]:
            raise InvalidArgument(
                f"rotary: {name} {list(table.shape)}, expected {list(x.shape[2:])} for x {list(x.shape)}"
            )
        if table.dtype != x.dtype or table.device != x.device:
            raise InvalidArgument(
                f"rotary: {name} is {table.dtype} on {table.device}, expected {x.dtype} on {x.device} as x"
            )


@torch.library.custom_op("paracomm::rotary", mutates_args=())
def _op(x: Tensor, cosine: Tensor, sine: Tensor, transposed: bool) -> Tensor:
    """Transposed: the map of gradients."""
    if select.runs(x):
        from paracomm.kernels import rotary_kernels

        return rotary_kernels.launch(x, cosine, sine, transposed)
    return reference_rotary.rotary(x, cosine, sine, transposed).contiguous()


@_op.register_fake
def _(x: Tensor, cosine: Tensor, sine: Tensor, transposed: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cosine, sine, transposed = inputs
    ctx.save_for_backward(cosine, sine)
    ctx.transposed, ctx.backend = transposed, select.current()


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with select.backend(ctx.backend):
        return _op(grad, *ctx.saved_tensors, not ctx.transposed), None, None, None


_op.register_autograd(_differentiate, setup_context=_save)
