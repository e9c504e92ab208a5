"""Eager twin of norm.py."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paracomm.kernels import derivatives, select
from paracomm.kernels.autocast import autocast_off


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual), by torch's own norms where these are fused."""
    total = x if residual is None else x + residual
    if kind == "layer":
        return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total
    fused = total.device.type != "cpu" or total.dtype not in (torch.float32, torch.float64) or select.plain()
    normed = F.rms_norm(total, total.shape[-1:], weight, eps) if fused else _RMSNorm.apply(total, weight, eps)
    return normed if bias is None else normed + bias, total


def plain(total: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """norm(total), by operations that torch can differentiate as often as asked."""
    if kind == "layer":
        return F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return (normed if bias is None else normed + bias).to(total.dtype)


class _RMSNorm(torch.autograd.Function):
    """On a CPU torch's own is made of smaller operations, and takes 1.7 times as long (1536 x 128, both ways)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps = eps
        return (x * rstd).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        with autocast_off(x):
            if derivatives.wanted():
                norm = functools.partial(plain, bias=None, eps=ctx.eps, kind="rms")
                return *derivatives.pull_back(norm, (x, weight), (grad,), ctx.needs_input_grad[:2]), None
            D = len(weight)
            h = x * rstd
            gh = (grad * h).reshape(-1, D)
            along = gh.mv(weight).view(rstd.shape)
            dx = (grad * weight).addcmul_(h, along, value=-1 / D).mul_(rstd)
            return dx, gh.sum(0), None


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, layer: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernel gives: (normed, sum or empty, mean [N] or empty, rstd [N])."""
    normed, total = add_norm(x, residual, weight, bias, eps, "layer" if layer else "rms")
    rows = total.float().flatten(0, -2) if total.dim() > 1 else total.float()[None]
    mean = rows.mean(1) if layer else rows.new_empty(0)
    off = rows - mean[:, None] if layer else rows
    rstd = (off.square().mean(1) + eps).rsqrt()
    return normed.contiguous(), x.new_empty(0) if residual is None else total.contiguous(), mean, rstd


def backward(
    grad: Tensor, grad_sum: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias or empty)."""
    g, s = (t.reshape(-1, t.shape[-1]).float() for t in (grad, total))
    h = (s - mean[:, None] if len(mean) else s) * rstd[:, None]
    wg = g * weight.float()
    dx = wg - h * (wg * h).mean(1, keepdim=True)
    if len(mean):
        dx -= wg.mean(1, keepdim=True)
    dx = (dx * rstd[:, None]).reshape(total.shape)
    if grad_sum is not None:
        dx = dx + grad_sum.float()
    dbias = g.sum(0).to(weight.dtype) if has_bias else weight.new_empty(0)
    return dx.to(total.dtype).contiguous(), (g * h).sum(0).to(weight.dtype), dbias
