"""Eager twin of rotary.py."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x_BHTK: Tensor, cosine_TK: Tensor, sine_TK: Tensor, transposed: bool = False) -> Tensor:
    """x cosine + [-high, low] sine; transposed: the map of its gradients."""
    if transposed:
        low, high = (x_BHTK * sine_TK).chunk(2, dim=-1)
        return x_BHTK * cosine_TK + torch.cat([high, -low], dim=-1)
    low, high = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cosine_TK + torch.cat([-high, low], dim=-1) * sine_TK
