"""decode()'s eager twin, see decode.py. No key or value is copied for the query heads that share it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paracomm.kernels import reference, select


def differentiates(*tensors: Tensor) -> bool:
    """Whether gradients may be asked for: torch's fused attention has them once only, and NaN where nothing is seen."""
    return torch.is_grad_enabled() and (select.transformed() or any(x.requires_grad for x in tensors))


def decode(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, lengths: Tensor | None, *, scale: float, window: int | None,
    softcap: float | None, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out_BHTK, lse_BHT, which is empty unless it is needed); `lengths` None: all S keys are filled."""
    (B, H, T, K), (G, S) = q_BHTK.shape, k_BGSK.shape[1:3]
    wide = torch.promote_types(q_BHTK.dtype, torch.float32)
    if window is not None and lengths is None and window + T - 1 < S:  # what no query looks at
        first = S - (window + T - 1)
        k_BGSK, v_BGSK, S = k_BGSK[:, :, first:], v_BGSK[:, :, first:], window + T - 1
    see = blind = None
    if lengths is not None or T > 1 or S < T:
        used = S if lengths is None else lengths.long().clamp(max=S)[:, None]
        last_BT = torch.arange(T, device=q_BHTK.device) - T + used
        last_BT = last_BT.expand(B, T)
        keys = torch.arange(S, device=q_BHTK.device)
        see_BTS = keys <= last_BT[..., None]
        if window is not None:
            see_BTS &= keys > last_BT[..., None] - window
        see = see_BTS.repeat(1, H // G, 1)[:, None]
        blind = (last_BT < 0).repeat(1, H // G)[:, None, :, None]
    rows = q_BHTK.reshape(B, G, H // G * T, K)
    if not need_lse and softcap is None and S and not differentiates(q_BHTK, k_BGSK, v_BGSK):
        out = F.scaled_dot_product_attention(rows, k_BGSK, v_BGSK, see, scale=scale)
        out = out if blind is None else out.masked_fill(blind, 0.0)
        return out.reshape(q_BHTK.shape), q_BHTK.new_empty(0, dtype=wide)
    scores = reference.attention_scores(rows.to(wide), k_BGSK.to(wide), scale, softcap, None, None)
    if see is not None:
        scores = scores.masked_fill(~see, -torch.inf)
    lse = scores.logsumexp(-1)
    p = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    out = (p @ v_BGSK.to(wide)).to(q_BHTK.dtype)
    return out.reshape(q_BHTK.shape), lse.detach().reshape(B, H, T)
