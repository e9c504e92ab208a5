"""torch's nn.MultiheadAttention, split by heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paracomm.errors import InvalidArgument
from paracomm.parallel.attention import Attention
from paracomm.parallel.tensor import Region, columns


class MultiheadAttention(nn.Module):
    """What an nn.MultiheadAttention computes, on this rank's heads; dropout is that of paracomm.parallel.rng.

    It has the parameters of the module that it replaces, under their names: `in_proj_weight` [3 E_r, E], or
    `q_proj_weight` [E_r, E], `k_proj_weight` and `v_proj_weight`; `in_proj_bias` [3 E_r]; `out_proj`. The plan gives
    them, and `heads` of this rank with the `first` of them of `total`.
    """

    # torch's encoder layer has a fast path that would multiply with the weights itself.
    _qkv_same_embed_dim = False

    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None

    def __init__(
        self, region: Region, origin: nn.MultiheadAttention, parameters: dict[str, nn.Parameter], out_proj: nn.Module,
        place: tuple[int, int, int],
    ) -> None:  # fmt: skip
        super().__init__()
        self.region = region
        first, self.num_heads, total = place
        self.head_dim = origin.head_dim
        self.embed_dim = origin.embed_dim
        self.batch_first = origin.batch_first
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
            self.register_parameter(name, parameters.get(name))
        self.out_proj = out_proj
        self.core = Attention(origin.dropout)
        self.core.head_part = (first, total)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """As nn.MultiheadAttention's with need_weights=False, whose shapes and masks it takes.

        A causal mask and one of padding go with everything; any other mask needs dropout and context parallelism off.
        Raises InvalidArgument for what it cannot do.
        """
        if need_weights:
            raise InvalidArgument("MultiheadAttention: need_weights is True, but the weights are never formed here")
        if query.dim() == 2:
            raise InvalidArgument(f"MultiheadAttention: query {list(query.shape)}, expected a batch, [B, T, E]")
        q, k, v = (self._heads(x) for x in self._project(query, key, value))
        key_mask = None if key_padding_mask is None else _seen(key_padding_mask)
        if attn_mask is None or is_causal or _is_causal(attn_mask):
            out = self.core(q, k, v, causal=is_causal or attn_mask is not None, key_mask=key_mask)
        else:
            out = self._masked(q, k, v, attn_mask, key_mask)
        out = out.transpose(1, 2).flatten(2)
        return self.out_proj(out if self.batch_first else out.transpose(0, 1)), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        E = self.num_heads * self.head_dim
        biases: Sequence[Tensor | None] = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(E)
        weights: Sequence[Tensor | None]
        if self.in_proj_weight is not None and query is key is value:
            (y,) = columns(self.region, query, self.in_proj_weight, self.in_proj_bias)
            return y.split(E, -1)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.split(E)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        (q,) = columns(self.region, query, weights[0], biases[0])
        if key is value:
            k, v = columns(self.region, key, weights[1], biases[1], weights[2], biases[2])
        else:
            (k,) = columns(self.region, key, weights[1], biases[1])
            (v,) = columns(self.region, value, weights[2], biases[2])
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, key_mask: Tensor | None) -> Tensor:
        if type(self.core) is not Attention or self.core.head_dropout(self.num_heads) is not None:
            raise InvalidArgument(
                "MultiheadAttention: an attn_mask that is not causal needs dropout 0 and no context parallelism"
            )
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(mask, -torch.inf)
        if mask.dim() == 3:
            first, total = self.core.head_part or (0, self.num_heads)
            mask = mask.unflatten(0, (-1, total))[:, first : first + self.num_heads]
        if key_mask is not None:
            mask = mask + torch.zeros(key_mask.shape, dtype=q.dtype).masked_fill_(~key_mask, -torch.inf)[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads here of {self.head_dim}, {self.region.size} ranks"


def _seen(key_padding_mask: Tensor) -> Tensor:
    """Which keys [B, S] are looked at, of torch's mask, whose True or -inf are not."""
    if key_padding_mask.dtype == torch.bool:
        return ~key_padding_mask
    if not ((key_padding_mask == 0) | (key_padding_mask == -torch.inf)).all():
        raise InvalidArgument("MultiheadAttention: key_padding_mask has other numbers than 0 and -inf")
    return key_padding_mask == 0


def _is_causal(mask: Any) -> bool:
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    hidden = mask if mask.dtype == torch.bool else mask == -torch.inf
    shown = hidden.logical_not() if mask.dtype == torch.bool else mask == 0
    triangle = torch.ones(mask.shape, dtype=torch.bool).triu_(1)
    return torch.equal(hidden, triangle) and torch.equal(shown, ~triangle)
