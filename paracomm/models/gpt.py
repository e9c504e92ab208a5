"""A byte-level GPT: the Decoder with its defaults, on text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paracomm.errors import InvalidArgument
from paracomm.models.decoder import Decoder
from paracomm.models.generation import generate
from paracomm.models.layers import DecoderConfig

GPTConfig = DecoderConfig


def next_byte_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy, in nats a byte."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


class GPT(Decoder):
    """A Decoder whose tokens are bytes."""

    def generate(self, prompt: bytes, count: int, temperature: float = 0.8, seed: int = 0) -> bytes:
        """`prompt` followed by `count` sampled bytes; temperature 0 takes the likeliest byte each time."""
        if not prompt:
            raise InvalidArgument("GPT.generate: the prompt is empty, expected at least one byte")
        tokens_BT = torch.tensor([list(prompt)], device=self.token.weight.device)
        return bytes(generate(self, tokens_BT, count, temperature=temperature, seed=seed)[0].tolist())
