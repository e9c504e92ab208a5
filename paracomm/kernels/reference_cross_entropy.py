"""Eager twin of cross_entropy.py.

Up to WHOLE logits, torch's own F.linear and F.cross_entropy are the fastest. Beyond, chunks of rows (as Liger Kernel's,
Hsu et al., 2024): a chunk's logits become its dlogits and its share of the gradients while they lie in the cache, and
backward only scales. Then C V + N D + V D float32 numbers are held beside the inputs (C: rows of a chunk), not 3 N V.

One thread, float32, with gradients, against F.linear and F.cross_entropy: 1.6 times as fast at N 1024, D 128, V 8192;
1.6 at 2048, 128, 50257; 1.2 at 512, 256, 50257; 0.9 at 1024, 128, 256, which is therefore left to them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paracomm.kernels import derivatives, select
from paracomm.kernels.autocast import autocast_off

WHOLE = 1 << 22
"""Logits: 16 MB of float32."""
IGNORED = -100
CHUNK = 1 << 24
"""Logits of a chunk, at most, if that leaves it 16 rows."""


def logits_of(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """[N, V], float32 or wider."""
    logits = F.linear(x, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(sum, number)."""
    counted = targets != ignore
    if len(x) * len(weight) <= WHOLE or select.transformed():
        return whole(x, weight, bias, targets, ignore, softcap), counted.sum()
    rows = min(256, max(16, CHUNK // len(weight)))
    return _Chunked.apply(x, weight, bias, targets, counted, softcap, rows), counted.sum()


def whole(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore: int, softcap: float | None
) -> Tensor:
    """The sum, with all logits."""
    logits = logits_of(x, weight, bias, softcap)
    return F.cross_entropy(logits, targets, ignore_index=ignore, reduction="sum")


class _Gradients:
    """dx in the dtype, sums of dweight and dbias over chunks in float32 or wider."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype) -> None:
        self.x, self.weight = x, weight
        self.dx, self.dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=wide)
        self.dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)

    def add(self, chunk: slice, dlogits: Tensor) -> None:
        if self.dbias is not None:
            self.dbias += dlogits.sum(0)
        dlogits, own = dlogits.to(self.x.dtype), self.x[chunk]
        torch.mm(dlogits, self.weight, out=self.dx[chunk])
        if self.dweight.dtype == own.dtype:
            self.dweight.addmm_(dlogits.mT, own)
        else:
            self.dweight += dlogits.mT @ own

    def rounded(self) -> tuple[Tensor | None, ...]:
        dtype = self.x.dtype
        return self.dx, self.dweight.to(dtype), None if self.dbias is None else self.dbias.to(dtype)


def _chunk_loss(
    logits: Tensor, targets: Tensor, keep: Tensor, softcap: float | None, gradients: _Gradients | None, chunk: slice
) -> Tensor:
    """Overwrites the logits."""
    at = targets.masked_fill(~keep, 0).unsqueeze(1)
    bend = None if softcap is None or gradients is None else 1 - (logits / softcap).square()
    most = logits.amax(1, keepdim=True)
    logit = logits.gather(1, at)
    s = logits.sub_(most).exp_().sum(1, keepdim=True)
    if gradients is not None:
        dlogits = logits.mul_(keep.unsqueeze(1) / s).scatter_add_(1, at, -keep.to(s.dtype).unsqueeze(1))
        gradients.add(chunk, dlogits if bend is None else dlogits.mul_(bend))
    return (most + s.log() - logit).squeeze(1).masked_fill(~keep, 0.0).sum()


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, counted: Tensor,
        softcap: float | None, rows: int,
    ) -> Tensor:  # fmt: skip
        wide = torch.promote_types(x.dtype, torch.float32)
        gradients = _Gradients(x, weight, bias, wide) if any(ctx.needs_input_grad) else None
        total = x.new_zeros((), dtype=wide)
        for begin in range(0, len(x), rows):
            chunk = slice(begin, begin + rows)
            logits = logits_of(x[chunk], weight, bias, softcap)
            total += _chunk_loss(logits, targets[chunk], counted[chunk], softcap, gradients, chunk)
            del logits  # before the next
        if gradients is not None:
            ctx.save_for_backward(*gradients.rounded(), x, weight, bias, targets.masked_fill(~counted, IGNORED))
            ctx.softcap = softcap
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, x, weight, bias, targets = ctx.saved_tensors
        if derivatives.wanted():
            with autocast_off(x):
                found = derivatives.pull_back(
                    lambda x, w, b: whole(x, w, b, targets, IGNORED, ctx.softcap), (x, weight, bias), (grad,),
                    ctx.needs_input_grad[:3],
                )  # fmt: skip
            return *found, None, None, None, None
        scaled = (None if t is None else t * grad.to(t.dtype) for t in gradients)
        return *scaled, None, None, None, None


def partial(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(lse, logit)."""
    logits = logits_of(x, weight, bias, softcap)
    if not len(weight):
        nothing = logits.sum(1)
        return nothing - torch.inf, nothing
    here = (targets >= 0) & (targets < len(weight))
    logit = logits.gather(1, targets.masked_fill(~here, 0).unsqueeze(1)).squeeze(1)
    return logits.logsumexp(1), logit.masked_fill(~here, 0.0)


def partial_backward(
    dlse: Tensor, dlogit: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dweight, dbias or an empty tensor) of partial()."""
    if not len(weight):
        return torch.zeros_like(x), torch.zeros_like(weight), weight.new_empty(0)
    logits = logits_of(x, weight, bias, softcap)
    here = (targets >= 0) & (targets < len(weight))
    dlogits = (logits - lse.unsqueeze(1)).exp_() * dlse.unsqueeze(1)
    dlogits.scatter_add_(1, targets.masked_fill(~here, 0).unsqueeze(1), (dlogit * here).unsqueeze(1))
    if softcap is not None:
        dlogits *= 1 - (logits / softcap).square()
    dbias = weight.new_empty(0) if bias is None else dlogits.sum(0).to(bias.dtype)
    dlogits = dlogits.to(x.dtype)
    return dlogits @ weight, dlogits.mT @ x, dbias
