"""Residual and RMSNorm or LayerNorm: the operations that run the kernels of norm_kernels.py, or their eager twin."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from paracomm.errors import InvalidArgument
from paracomm.kernels import derivatives, reference_norm, select
from paracomm.kernels.arguments import expect_tensors
from paracomm.kernels.autocast import autocast_dtype, autocast_off, widest

Kind = Literal["rms", "layer"]


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    kind: Kind = "rms",
) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual) over the last dimension of x [..., D]; without a residual (norm(x), x).

    RMSNorm (Zhang and Sennrich, 2019) or LayerNorm (Ba et al., 2016), times weight [D] plus bias [D]. The sum is
    rounded to x's dtype before its statistics are taken in float32. Differentiable in all four; deterministic.
    Raises InvalidArgument unless the tensors have one dtype and device and these shapes, and eps >= 0.

    Under autocast dtypes may differ, as of torch's own sum and norms: the sum is of the wider of its two, and normed of
    the sum's on a CPU, float32 on a GPU.
    """
    expect_tensors("add_norm", {"x": x, "weight": weight}, {"residual": residual, "bias": bias})
    if autocast_dtype(x) is not None:
        with autocast_off(x):
            return _promoted(x, residual, weight, bias, eps, kind)
    _check(x, residual, weight, bias, eps, kind)
    if not select.runs(x):
        return reference_norm.add_norm(x, residual, weight, bias, eps, kind)
    normed, total, _, _ = _forward_op(x, residual, weight, bias, eps, kind == "layer")
    return normed, x if residual is None else total


def _promoted(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: Kind
) -> tuple[Tensor, Tensor]:
    gpu = x.device.type != "cpu"
    summed, wide = widest(x, residual), widest(x, residual, weight, bias)
    wide = torch.promote_types(wide, torch.float32) if gpu else wide
    if wide != summed and residual is not None:
        x, residual = x + residual, None
    tensors = [None if t is None else t.to(wide) for t in (x, residual, weight, bias)]
    normed, total = add_norm(*tensors, eps=eps, kind=kind)  # type: ignore[arg-type]
    return normed if gpu else normed.to(summed), total if residual is not None else x


def _check(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> None:
    if kind not in get_args(Kind):
        raise InvalidArgument(f"add_norm: kind is {kind!r}, expected one of {', '.join(get_args(Kind))}")
    if not isinstance(eps, (int, float)) or not 0.0 <= eps < math.inf:
        raise InvalidArgument(f"add_norm: eps is {eps}, expected at least 0 and finite")
    if x.dim() < 1 or not x.shape[-1]:
        raise InvalidArgument(f"add_norm: x {list(x.shape)}, expected [..., D] with D at least 1")
    expected = (("residual", residual, x.shape), ("weight", weight, x.shape[-1:]), ("bias", bias, x.shape[-1:]))
    for name, given, shape in expected:
        if given is None:
            continue
        if given.shape != shape:
            raise InvalidArgument(f"add_norm: {name} {list(given.shape)}, expected {list(shape)} for x {list(x.shape)}")
        if given.dtype != x.dtype or given.device != x.device:
            raise InvalidArgument(
                f"add_norm: {name} is {given.dtype} on {given.device}, expected {x.dtype} on {x.device} as x"
            )


@torch.library.custom_op("paracomm::add_norm_forward", mutates_args=())
def _forward_op(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, layer: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(normed, sum, mean, rstd), see norm_kernels.launch_forward."""
    if select.runs(x):
        from paracomm.kernels import norm_kernels

        return norm_kernels.launch_forward(x, residual, weight, bias, eps, layer)
    return reference_norm.forward(x, residual, weight, bias, eps, layer)


@_forward_op.register_fake
def _(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, layer: bool) -> Any:
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    total = torch.empty_like(normed) if residual is not None else x.new_empty(0)
    return normed, total, torch.empty_like(rstd) if layer else rstd.new_empty(0), rstd


@torch.library.custom_op("paracomm::add_norm_backward", mutates_args=())
def _backward_op(
    grad: Tensor, grad_sum: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), see norm_kernels.launch_backward."""
    if select.runs(total):
        from paracomm.kernels import norm_kernels

        return norm_kernels.launch_backward(grad, grad_sum, total, weight, mean, rstd, has_bias)
    return reference_norm.backward(grad, grad_sum, total, weight, mean, rstd, has_bias)


@_backward_op.register_fake
def _(grad: Tensor, _: Any, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool) -> Any:
    dx = torch.empty_like(total, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight), weight.new_empty(len(weight) if has_bias else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, ctx.eps, ctx.layer = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, bias, mean, rstd)
    ctx.has_residual, ctx.has_bias, ctx.backend = residual is not None, bias is not None, select.current()
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd, *(() if ctx.has_residual else (total,)))


def _differentiate(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    total, weight, bias, mean, rstd = ctx.saved_tensors
    if grad is None:
        return grad_sum, grad_sum, None, None, None, None
    if derivatives.wanted():
        return *_differentiable(ctx, grad, grad_sum, total, weight, bias), None, None
    with select.backend(ctx.backend), autocast_off(total):
        dx, dweight, dbias = _backward_op(
            grad, grad_sum if ctx.has_residual else None, total, weight, mean, rstd, ctx.has_bias
        )
    return dx, dx if ctx.has_residual else None, dweight, dbias if ctx.has_bias else None, None, None


def _differentiable(
    ctx: Any, grad: Tensor, grad_sum: Tensor | None, total: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    with autocast_off(total):
        dx, dweight, dbias = derivatives.pull_back(
            lambda x, w, b: reference_norm.plain(x, w, b, ctx.eps, "layer" if ctx.layer else "rms"),
            (total, weight, bias), (grad,), (needed[0] or needed[1], needed[2], needed[3]),
        )  # fmt: skip
        if dx is not None and ctx.has_residual and grad_sum is not None:
            dx = dx + grad_sum
    return dx, dx if ctx.has_residual else None, dweight, dbias


_forward_op.register_autograd(_differentiate, setup_context=_save)
