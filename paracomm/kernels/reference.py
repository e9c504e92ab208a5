"""Eager twins: the same operations in torch's own, for devices and dtypes without kernels. Differentiable by autograd.

On a CPU these are what runs: scaled_dot_product_attention, oneDNN's products and fused activations, not loops of ours.
Shapes: B batch, H query heads, G key-value heads, T queries, S keys, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paracomm.kernels import derivatives, select

if TYPE_CHECKING:
    from paracomm.kernels.attention import Dropout

_MASK32 = 0xFFFFFFFF


# --- random words ---
def threshold(p: float) -> int:
    """Words below it are dropped: p in units of 2^-32."""
    return min(round(p * 2.0**32), 2**32 - 1)


def signed(seed: int) -> int:
    """The same 64 bits, as operations and kernels take them."""
    return seed - (1 << 64) if seed >> 63 else seed


def philox_words(seed: int, stream: int, step: int, index: Tensor) -> Tensor:
    """int64 words in 0..2^32-1 of the shape of `index` (int64, modulo 2^64), see philox.py."""

    def product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """High and low 32 bits of a b, both below 2^32, in signed 64-bit arithmetic."""
        low, high = a * (b & 0xFFFF), a * (b >> 16)  # each below 2^48
        middle = (low >> 16) + high  # below 2^49
        return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)

    block = (index >> 2) & 0x3FFFFFFFFFFFFFFF
    c0, c1 = block & _MASK32, block >> 32
    c2, c3 = torch.full_like(c0, stream), torch.full_like(c0, step)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        high0, low0 = product(0xD2511F53, c0)
        high1, low1 = product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    words = torch.stack([c0, c1, c2, c3], -1)
    return words.gather(-1, (index & 3).unsqueeze(-1)).squeeze(-1)


def keep_mask(seed: int, stream: int, step: int, base: Tensor, offsets: Tensor, threshold: int) -> Tensor:
    """bool [..., J]: word(base[..., None] + offsets) >= threshold."""
    return philox_words(seed, stream, step, base[..., None] + offsets) >= threshold


# --- attention ---
def attention_mask(T: int, S: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """bool [T, S], True where a query looks; None where it looks everywhere."""
    if not causal and window is None:
        return None
    places = torch.arange(T, device=device)[:, None] + (S - T)
    keys = torch.arange(S, device=device)
    see = torch.ones(T, S, dtype=torch.bool, device=device)
    if causal:
        see &= keys <= places
    if window is not None:
        see &= keys > places - window
    return see


def attention(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, *, causal: bool, scale: float, window: int | None,
    softcap: float | None, key_mask: Tensor | None, dropout: Dropout | None, need_lse: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out_BHTK, lse_BHT); without `need_lse` torch's fused attention where it can, and an empty lse."""
    (B, H, T, _), (G, S) = q_BHTK.shape, k_BGSK.shape[1:3]
    see = attention_mask(T, S, causal, window, q_BHTK.device)
    if not need_lse and softcap is None and dropout is None and key_mask is None and T and S and (S >= T or not causal):
        diagonal = causal and window is None and T == S
        out = F.scaled_dot_product_attention(
            q_BHTK, k_BGSK, v_BGSK, None if diagonal else see, is_causal=diagonal, scale=scale, enable_gqa=H != G
        )
        return out, q_BHTK.new_empty(0)
    wide = torch.promote_types(q_BHTK.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q_BHTK, k_BGSK, v_BGSK))
    scores = attention_scores(q, _shared(k, H), scale, softcap, see, key_mask)
    lse = scores.logsumexp(-1)
    p = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    if dropout is not None:
        p = p * attention_keep(dropout, B, H, T, S).to(p.dtype) / (1 - dropout.p)
    return (p @ _shared(v, H)).to(q_BHTK.dtype), lse.detach()


def _shared(x_BGSK: Tensor, H: int) -> Tensor:
    """[B, H, S, K]: each key-value head as often as query heads share it."""
    G = x_BGSK.shape[1]
    return x_BGSK if G == H else x_BGSK.repeat_interleave(H // G, 1)


def attention_scores(
    q_BHTK: Tensor, k_BHSK: Tensor, scale: float, softcap: float | None, see: Tensor | None, key_mask: Tensor | None
) -> Tensor:
    """[B, H, T, S], -inf where nobody looks."""
    scores = (q_BHTK @ k_BHSK.mT) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if key_mask is not None:
        see = key_mask[:, None, None, :] if see is None else see & key_mask[:, None, None, :]
    return scores if see is None else scores.masked_fill(~see, -torch.inf)


@torch.no_grad()
def attention_backward(
    grad_BHTK: Tensor, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, out_BHTK: Tensor, lse_BHT: Tensor, *,
    causal: bool, scale: float, window: int | None, softcap: float | None, key_mask: Tensor | None,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) given `out` and `lse` of all keys that the queries look at, of which these may be some."""
    (B, H, T, _), (G, S) = q_BHTK.shape, k_BGSK.shape[1:3]
    wide = torch.promote_types(q_BHTK.dtype, torch.float32)
    grad, q, k, v, out = (x.to(wide) for x in (grad_BHTK, q_BHTK, k_BGSK, v_BGSK, out_BHTK))
    k, v = _shared(k, H), _shared(v, H)
    scores = attention_scores(q, k, scale, softcap, attention_mask(T, S, causal, window, q.device), key_mask)
    p = (scores - lse_BHT.masked_fill(lse_BHT == -torch.inf, 0.0)[..., None]).exp()
    dp, dropped = grad @ v.mT, p
    if dropout is not None:
        keep = attention_keep(dropout, B, H, T, S).to(wide) / (1 - dropout.p)
        dp, dropped = dp * keep, p * keep
    ds = p * (dp - (grad * out).sum(-1, keepdim=True)) * scale
    if softcap is not None:
        bend = (scores / softcap).masked_fill(scores == -torch.inf, 0.0)
        ds = ds * (1 - bend * bend)
    dk, dv = (x.unflatten(1, (G, H // G)).sum(2) for x in (ds.mT @ q, dropped.mT @ grad))
    return (ds @ k).to(q_BHTK.dtype), dk.to(k_BGSK.dtype), dv.to(v_BGSK.dtype)


def attention_keep(dropout: Dropout, B: int, H: int, T: int, S: int) -> Tensor:
    """bool [B, H, T, S]: what dropout keeps, element ((row heads + head) << 40) + (q_position << 20) + k_position."""
    rows = dropout.rows
    offset, total = dropout.heads
    lines = rows[:, None] * total + torch.arange(offset, offset + H, device=rows.device)
    q, k = (
        torch.arange(count, device=rows.device) if places is None else places
        for places, count in ((dropout.q_positions, T), (dropout.k_positions, S))
    )
    base = (lines << 40)[..., None] + (q << 20)
    return keep_mask(dropout.seed, dropout.stream, dropout.step, base, k, dropout.threshold)


# --- MLP ---
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
"""By name; "gelu" is exact, by erf."""

ACTIVATION_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
    "silu": torch.ops.aten.silu_backward,
}
"""(gradient of the result, x) -> gradient of x."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Tensor:
    # Not addmm: on a CPU it takes 1.2 times as long as the product (1536 x 512 x 128), an addition 1.03 times.
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


def glu(
    x: Tensor, w_gate: Tensor, w_up: Tensor, bias_gate: Tensor | None, bias_up: Tensor | None, activation: str
) -> Tensor:
    return gated(F.linear(x, w_gate, bias_gate), F.linear(x, w_up, bias_up), activation)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if activation != "silu" or select.plain():
        return ACTIVATIONS[activation](gate) * up
    product: Tensor = _SwiGLU.apply(gate, up)
    return product


def _plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """The bits of autograd, in 0.65 of the time on a CPU (1536 x 344, both ways), and without silu(gate) kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if derivatives.wanted():
            return tuple(derivatives.pull_back(_plain_swiglu, (gate, up), (grad,), ctx.needs_input_grad))
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
