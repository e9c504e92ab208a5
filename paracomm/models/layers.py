"""What the models are made of. Nothing here knows of ranks: a plan replaces the layers, rng.Place says what T means.

Shapes: B batch, T positions, S source positions, D width, H heads, G key-value heads, K = D / H, F hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paracomm import kernels
from paracomm.errors import InvalidArgument
from paracomm.parallel import rng
from paracomm.parallel.attention import Attention as AttentionCore


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a Transformer; the defaults are a byte-level GPT.

    width: a multiple of heads; heads: a multiple of kv_heads (None: as many). context: the longest sequence.
    hidden: of the MLP; None: 4 width, or 8/3 width in whole eights with "swiglu".
    tied: the head shares the embedding's weights. bias: of the linear layers (LayerNorm always has one).
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    context: int = 128
    dropout: float = 0.0
    vocabulary: int = 256
    kv_heads: int | None = None
    hidden: int | None = None
    positions: Literal["learned", "rotary"] = "learned"
    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    tied: bool = True
    bias: bool = False
    rotary_base: float = 10000.0
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        choices = {"positions": ("learned", "rotary"), "norm": ("layer", "rms"), "mlp": ("gelu", "swiglu")}
        for name, expected in choices.items():
            if getattr(self, name) not in expected:
                self._refuse(f"{name} is '{getattr(self, name)}', expected one of {', '.join(expected)}")
        for name in ("width", "depth", "heads", "context", "vocabulary", "key_value_heads", "hidden_width"):
            if getattr(self, name) < 1:
                self._refuse(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.width % self.heads:
            self._refuse(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.heads % self.key_value_heads:
            self._refuse(f"heads {self.heads} is not a multiple of kv_heads {self.key_value_heads}")
        if self.positions == "rotary" and self.head_width % 2:
            self._refuse(f"heads of width {self.head_width} cannot rotate, expected an even width")
        if not 0.0 <= self.dropout < 1.0:
            self._refuse(f"dropout is {self.dropout}, expected 0 <= dropout < 1")

    def _refuse(self, why: str) -> None:
        raise InvalidArgument(f"{type(self).__name__}: {why}")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def key_value_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def hidden_width(self) -> int:
        if self.hidden is not None:
            return self.hidden
        return 4 * self.width if self.mlp == "gelu" else -(-self.width // 3) * 8


# --- positions ---
def expect_within(context: int, tokens_BT: Tensor) -> None:
    """Raises InvalidArgument where the tokens' positions go beyond the context."""
    place, length = rng.placed(), tokens_BT.shape[1]
    last = length - 1 if place is None or not length else int(place.positions.max())
    if last >= context:
        raise InvalidArgument(f"model: {last + 1} positions, but the context is {context}")


class LearnedPositions(nn.Module):
    """A learned row [T, D] for each position of tokens [B, T]."""

    def __init__(self, context: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(context, width))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(rng.positions(tokens_BT.shape[1], tokens_BT.device), self.weight)


class Rotary(nn.Module):
    """Rotates features i and i + K/2 of x [B, H, T, K] by position * base^(-2i / K).

    Su et al., "RoFormer", 2021, with the pairs laid out as in Llama. The angles are taken in float64.
    """

    def __init__(self, context: int, head_width: int, base: float) -> None:
        super().__init__()
        self.context, self.head_width, self.base = context, head_width, base
        self._tables: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def forward(self, x_BHTK: Tensor) -> Tensor:
        positions_T = rng.positions(x_BHTK.shape[2], x_BHTK.device)
        cosine_TK, sine_TK = (table[positions_T] for table in self._table(x_BHTK))
        return kernels.rotary(x_BHTK, cosine_TK, sine_TK)

    def _table(self, like: Tensor) -> tuple[Tensor, Tensor]:
        key = (like.dtype, like.device)
        if key not in self._tables:
            half = torch.arange(0, self.head_width, 2, dtype=torch.float64) / self.head_width
            angles = torch.outer(torch.arange(self.context, dtype=torch.float64), self.base**-half).repeat(1, 2)
            self._tables[key] = angles.cos().to(like), angles.sin().to(like)
        return self._tables[key]


# --- what generation remembers ---
class KeyValue:
    """Keys and values [B, G, length, K] of the positions so far, at most `capacity` (None: what comes first is all)."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity, self.length = capacity, 0
        self._buffers: tuple[Tensor, ...] = ()

    def extend(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Appends, and returns everything so far."""
        begin, self.length = self.length, self.length + k_BGTK.shape[2]
        if not self._buffers:
            B, G, T, K = k_BGTK.shape
            self._buffers = tuple(x.new_empty(B, G, self.capacity or T, K) for x in (k_BGTK, v_BGTK))
        for buffer, x in zip(self._buffers, (k_BGTK, v_BGTK), strict=True):
            buffer[:, :, begin : self.length] = x
        return self.seen()

    def seen(self) -> tuple[Tensor, Tensor]:
        k, v = (buffer[:, :, : self.length] for buffer in self._buffers)
        return k, v


class BlockCache:
    """What one block remembers: of its own sequence of up to `context` positions, and of the encoder's."""

    def __init__(self, context: int) -> None:
        self.own, self.cross = KeyValue(context), KeyValue(None)


# --- blocks ---
class Attention(nn.Module):
    """x [B, T, D] looks at itself; returns y [B, T, D] after dropout. One matrix gives queries, keys and values."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.share = (config.heads // config.key_value_heads, 1, 1)
        all_heads = config.heads + 2 * config.key_value_heads
        self.qkv = nn.Linear(config.width, all_heads * config.head_width, bias=config.bias)
        rotates = config.positions == "rotary"
        self.rotary = Rotary(config.context, config.head_width, config.rotary_base) if rotates else None
        self.core = AttentionCore(config.dropout)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)
        self.dropout = rng.Dropout(config.dropout)

    def forward(
        self, x_BTD: Tensor, *, causal: bool, key_mask: Tensor | None = None, cache: KeyValue | None = None
    ) -> Tensor:
        """key_mask: bool [B, T], False for keys that nobody looks at. `cache` is extended, and looked at as a whole."""
        q_BHTK, k_BGSK, v_BGSK = split_heads(self.qkv(x_BTD), self.head_width, self.share)
        if self.rotary is not None:
            q_BHTK, k_BGSK = self.rotary(q_BHTK), self.rotary(k_BGSK)
        if cache is not None:
            k_BGSK, v_BGSK = cache.extend(k_BGSK, v_BGSK)
        y_BHTK = self.core(q_BHTK, k_BGSK, v_BGSK, causal=causal, key_mask=key_mask)
        return self.dropout(self.out(join_heads(y_BHTK)))


class CrossAttention(nn.Module):
    """x [B, T, D] looks at `memory` [B, S, D]; returns y [B, T, D] after dropout."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.q = nn.Linear(config.width, config.width, bias=config.bias)
        self.kv = nn.Linear(config.width, 2 * config.key_value_heads * config.head_width, bias=config.bias)
        self.core = AttentionCore(config.dropout)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)
        self.dropout = rng.Dropout(config.dropout)

    def forward(
        self, x_BTD: Tensor, memory_BSD: Tensor, *, key_mask: Tensor | None = None, cache: KeyValue | None = None
    ) -> Tensor:
        """key_mask: bool [B, S], False for keys that nobody looks at. A `cache` keeps what follows from the memory."""
        (q_BHTK,) = split_heads(self.q(x_BTD), self.head_width, (1,))
        if cache is not None and cache.length:
            k_BGSK, v_BGSK = cache.seen()
        else:
            k_BGSK, v_BGSK = split_heads(self.kv(memory_BSD), self.head_width, (1, 1))
            if cache is not None:
                cache.extend(k_BGSK, v_BGSK)
        y_BHTK = self.core(q_BHTK, k_BGSK, v_BGSK, causal=False, key_mask=key_mask)
        return self.dropout(self.out(join_heads(y_BHTK)))


def split_heads(x_BTF: Tensor, head_width: int, share: tuple[int, ...]) -> list[Tensor]:
    """[B, T, heads * K] as several [B, h, T, K], whose numbers of heads are as `share`."""
    x_BTHK = x_BTF.unflatten(-1, (-1, head_width))
    unit = x_BTHK.shape[2] // sum(share)
    return [part.transpose(1, 2) for part in x_BTHK.split([unit * each for each in share], dim=2)]


def join_heads(x_BHTK: Tensor) -> Tensor:
    return x_BHTK.transpose(1, 2).flatten(2)


# --- MLP and norms ---
def plain(*layers: nn.Module | None) -> bool:
    """Whether kernels may multiply with these layers' weights: what a plan puts in their place multiplies itself."""
    return all(type(layer) is nn.Linear for layer in layers)


class MLP(nn.Module):
    """x [B, T, D] -> residual + y [B, T, D], where y is x through F hidden features, then dropout.

    gelu: down(gelu(up x)), gelu by its tanh form, as GPT-2; swiglu: down(silu(gate x) * up x) (Shazeer, 2020).
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden_width
        self.gate = nn.Linear(width, hidden, bias=config.bias) if config.mlp == "swiglu" else None
        self.up = nn.Linear(width, hidden, bias=config.bias)
        self.down = nn.Linear(hidden, width, bias=config.bias)
        self.dropout = rng.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, residual_BTD: Tensor) -> Tensor:
        hidden, down = self._hidden(x_BTD), self.down
        if plain(down) and not self.dropout.drops:
            return kernels.linear(hidden, down.weight, down.bias, residual=residual_BTD)
        return residual_BTD + self.dropout(down(hidden))

    def _hidden(self, x_BTD: Tensor) -> Tensor:
        gate, up = self.gate, self.up
        if gate is None:
            if plain(up):
                return kernels.linear(x_BTD, up.weight, up.bias, "gelu_tanh")
            return kernels.activate(up(x_BTD), "gelu_tanh")
        if plain(gate, up):
            return kernels.glu(x_BTD, gate.weight, up.weight, gate.bias, up.bias, "silu")
        return kernels.gated(gate(x_BTD), up(x_BTD), "silu")


class Norm(nn.Module):
    """LayerNorm ("layer") or RMSNorm ("rms") of x [..., D], with learned `weight` and, of "layer", `bias` [D]."""

    bias: nn.Parameter | None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.kind, self.epsilon = config.norm, config.epsilon
        self.weight = nn.Parameter(torch.ones(config.width))
        self.register_parameter("bias", nn.Parameter(torch.zeros(config.width)) if self.kind == "layer" else None)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.add_norm(x, None, self.weight, self.bias, eps=self.epsilon, kind=self.kind)[0]

    def add(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(x + y, its norm): a sum is normed while it is at hand."""
        normed, total = kernels.add_norm(y, x, self.weight, self.bias, eps=self.epsilon, kind=self.kind)
        return total, normed

    def extra_repr(self) -> str:
        return f"{self.kind}, {len(self.weight)}, epsilon={self.epsilon}"


class Block(nn.Module):
    """x + attention(norm(x)), then with `cross` x + cross(norm(x), memory), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, *, causal: bool = True, cross: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.attention_norm = Norm(config)
        self.attention = Attention(config)
        self.cross_norm = Norm(config) if cross else None
        self.cross = CrossAttention(config) if cross else None
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTD: Tensor,
        memory_BSD: Tensor | None = None,
        key_mask: Tensor | None = None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """key_mask: bool [B, S] of the memory's keys; of x's own where there is no memory."""
        own, of_memory = (None, None) if cache is None else (cache.own, cache.cross)
        mask = key_mask if memory_BSD is None else None
        y_BTD = self.attention(self.attention_norm(x_BTD), causal=self.causal, key_mask=mask, cache=own)
        if self.cross is not None and self.cross_norm is not None:
            x_BTD, normed_BTD = self.cross_norm.add(x_BTD, y_BTD)
            y_BTD = self.cross(normed_BTD, memory_BSD, key_mask=key_mask, cache=of_memory)
        x_BTD, normed_BTD = self.mlp_norm.add(x_BTD, y_BTD)
        mixed_BTD: Tensor = self.mlp(normed_BTD, x_BTD)
        return mixed_BTD


@torch.no_grad()
def initialise(model: nn.Module, seed: int, residuals: int) -> None:
    """GPT-2's start (Radford et al., 2019): matrices normal(0, 0.02), those that write into the residual stream by
    1 / sqrt(residuals) smaller, biases 0. A weight depends on seed, its name and its place in the matrix only."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            if name.endswith("bias"):
                parameter.zero_()
            continue  # the norms start at 1
        std = 0.02 * (residuals**-0.5 if name.endswith(("out.weight", "down.weight")) else 1.0)
        parameter.copy_(rng.normal(seed, name, parameter.shape, std, parameter.dtype))
