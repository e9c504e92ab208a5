"""The block codec by torch's operations, for tensors that are not in CPU memory; the bytes are src/codec's.

It is also what the tests hold the vector code against. See paracomm.comm.codec for the meaning of every argument.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_NORMAL = 2.0**-126


class TorchCodec:
    """Blocks of `block` elements at 8 or 4 bits."""

    def __init__(self, bits: int, block: int) -> None:
        self.bits, self.block = bits, block
        self.levels = 127 if bits == 8 else 7

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
        scale = largest / self.levels
        scale = torch.where(scale < LEAST_NORMAL, 0.0, scale)
        overflows = (scale * self.levels).isinf()
        scale = torch.where(overflows, torch.nextafter(scale, torch.zeros_like(scale)), scale)
        inverse = torch.where((scale > 0) & finite, self.levels / largest, 0.0)
        q_BK = torch.where(finite, torch.round(y_BK * inverse), 0.0)
        if kept is not None:
            lost = torch.where(finite, (y_BK - q_BK * scale) * divisor, 0.0)
            kept.copy_(lost.flatten()[: kept.numel()])
        scale = torch.where(finite, scale, torch.nan)
        rows[:, :4] = scale.view(torch.uint8)
        whole = q_BK.to(torch.int32)
        if self.bits == 4:
            low, high = (whole + 8).chunk(2, dim=1)
            whole = low | high << 4
        rows[:, 4:] = (whole & 255).to(torch.uint8)

    @torch.no_grad()
    def decode(self, message: Tensor, out: Tensor, *, add: bool = False) -> None:
        """See BlockCodec.decode."""
        rows = message.view(-1, 4 + self.block * self.bits // 8)
        scale = rows[:, :4].contiguous().view(torch.float32)
        levels = rows[:, 4:]
        if self.bits == 8:
            whole = levels.contiguous().view(torch.int8).float()
        else:
            whole = torch.cat([(levels & 15).float(), (levels >> 4).float()], dim=1) - 8
        decoded = (whole * scale).flatten()[: out.numel()]
        if add:
            out += decoded
        else:
            out.copy_(decoded)
