"""The block codec by torch's operations, for tensors that are not in CPU memory; the bytes are src/codec's.

It is also what the tests hold the vector code against. See paracomm.comm.codec for the meaning of every argument.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_NORMAL = 2.0**-126
MIDDLES = torch.tensor([k * k + k + 0.5 for k in range(7)])
"""Between the squares of k and k + 1: where 4 bits take the next level."""


class TorchCodec:
    """Blocks of `block` elements at 8 or 4 bits."""

    def __init__(self, bits: int, block: int) -> None:
        self.bits, self.block = bits, block
        self.top = 127 if bits == 8 else 49

    @torch.no_grad()
    def encode(
        self,
        x: Tensor,
        out: Tensor,
        *,
        residual: Tensor | None = None,
        kept: Tensor | None = None,
        divisor: float = 1.0,
    ) -> None:
        """See BlockCodec.encode."""
        y = (x if residual is None else x + residual) / divisor
        rows = out.view(-1, 4 + self.block * self.bits // 8)
        y_BK = F.pad(y, (0, rows.shape[0] * self.block - y.numel())).view(-1, self.block)
        largest = y_BK.abs().amax(1, keepdim=True)
        finite = largest.isfinite()
        scale = largest / self.top
        scale = torch.where(scale < LEAST_NORMAL, 0.0, scale)
        overflows = (scale * self.top).isinf()
        scale = torch.where(overflows, torch.nextafter(scale, torch.zeros_like(scale)), scale)
        inverse = torch.where((scale > 0) & finite, self.top / largest, 0.0)
        scaled = torch.where(finite, y_BK * inverse, 0.0)
        q_BK = torch.round(scaled) if self.bits == 8 else torch.bucketize(scaled.abs(), MIDDLES.to(x.device))
        if self.bits == 4:
            q_BK = q_BK * scaled.sign()
        if kept is not None:
            lost = torch.where(finite, (y_BK - self._whole(q_BK) * scale) * divisor, 0.0)
            kept.copy_(lost.flatten()[: kept.numel()])
        scale = torch.where(finite, scale, torch.nan)
        rows[:, :4] = scale.view(torch.uint8)
        stored = q_BK.to(torch.int32)
        if self.bits == 4:
            low, high = (stored + 8).chunk(2, dim=1)
            stored = low | high << 4
        rows[:, 4:] = (stored & 255).to(torch.uint8)

    @torch.no_grad()
    def decode(self, message: Tensor, out: Tensor, *, add: bool = False) -> None:
        """See BlockCodec.decode."""
        rows = message.view(-1, 4 + self.block * self.bits // 8)
        scale = rows[:, :4].contiguous().view(torch.float32)
        stored = rows[:, 4:]
        if self.bits == 8:
            q_BK = stored.contiguous().view(torch.int8).float()
        else:
            q_BK = torch.cat([(stored & 15).float(), (stored >> 4).float()], dim=1) - 8
        decoded = (self._whole(q_BK) * scale).flatten()[: out.numel()]
        if add:
            out += decoded
        else:
            out.copy_(decoded)

    def _whole(self, q: Tensor) -> Tensor:
        """What levels stand for, in units of the scale."""
        return q if self.bits == 8 else q * q.abs()
