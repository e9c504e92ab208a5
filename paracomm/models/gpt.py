"""A byte-level GPT: pre-norm blocks of causal attention and a GELU MLP, learned positions, tied embedding.

Shapes: B batch, T positions (T <= context), D width, H heads, K = D / H, V = 256 byte values.

The linear layers carry no bias: a bias on the keys has a gradient that is zero but for rounding, which AdamW would
scale up to full-sized random steps. Initialisation follows GPT-2 (Radford et al., 2019): normal(0, 0.02), residual
projections scaled by 1 / sqrt(2 * depth).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paracomm.errors import InvalidArgument

VOCABULARY = 256


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. `width` is a multiple of `heads`; `context` is the longest sequence, in bytes."""

    width: int = 128
    depth: int = 4
    heads: int = 4
    context: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "context"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"GPTConfig: {name} is {getattr(self, name)}, expected at least 1")
        if self.width % self.heads:
            raise InvalidArgument(f"GPTConfig: width {self.width} is not a multiple of heads {self.heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise InvalidArgument(f"GPTConfig: dropout is {self.dropout}, expected 0 <= dropout < 1")


class Attention(nn.Module):
    """Causal multi-head self-attention, x_BTD -> y_BTD."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q_BHTK, k_BHTK, v_BHTK = self.qkv(x_BTD).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True, dropout_p=dropout)
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD)))
        return x_BTD + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(x_BTD)), approximate="tanh")))


def next_byte_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy, in nats a byte."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


class GPT(nn.Module):
    """Predicts the next byte. Weights depend on `config` and `seed` only."""

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(VOCABULARY, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue  # the norms start at 1 and 0
            std = 0.02
            if name.endswith(("attention.out.weight", "down.weight")):
                std /= math.sqrt(2 * self.config.depth)
            parameter.normal_(0.0, std, generator=generator)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V] for integer tokens [B, T]; raises InvalidArgument if T is longer than the context."""
        length, context = tokens_BT.shape[1], self.config.context
        if length > context:
            raise InvalidArgument(f"GPT: {length} positions, but the context is {context}")
        x_BTD = self.token(tokens_BT) + self.position.weight[:length]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return F.linear(self.norm(x_BTD), self.token.weight)

    @torch.no_grad()
    def generate(self, prompt: bytes, count: int, temperature: float = 0.8, seed: int = 0) -> bytes:
        """`prompt` followed by `count` sampled bytes; temperature 0 takes the likeliest byte each time."""
        if not prompt:
            raise InvalidArgument("GPT.generate: the prompt is empty, expected at least one byte")
        was_training = self.training
        self.eval()
        generator = torch.Generator().manual_seed(seed)
        text = bytearray(prompt)
        for _ in range(count):
            tokens_BT = torch.tensor([list(text[-self.config.context :])])
            logits_V = self(tokens_BT)[0, -1].float()
            if temperature == 0:
                text.append(int(logits_V.argmax()))
            else:
                weights_V = F.softmax(logits_V / temperature, dim=-1)
                text.append(int(torch.multinomial(weights_V, 1, generator=generator)))
        self.train(was_training)
        return bytes(text)
