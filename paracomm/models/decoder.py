"""A decoder-only Transformer: pre-norm blocks of causal attention and an MLP.

With the defaults of DecoderConfig it is GPT-2's architecture but for the biases of linear layers (a bias on the keys
has a gradient that is zero but for rounding, which AdamW would scale up to full-sized random steps); rotary positions,
"rms", "swiglu" and kv_heads make it Llama's.

Shapes: B batch, T positions (T <= context), D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from paracomm.models.layers import (
    Block,
    BlockCache,
    DecoderConfig,
    LearnedPositions,
    Norm,
    expect_within,
    initialise,
)
from paracomm.models.plans import block_plan
from paracomm.parallel import rng
from paracomm.parallel.loss import Head
from paracomm.parallel.pipeline import Layer
from paracomm.parallel.plan import Positions, Style, Vocabulary


class Decoder(nn.Module):
    """Predicts the next token. Weights depend on `config` and `seed` only.

    Where this rank's tokens lie in the whole batch is the current rng.Place's to say; outside of one a sequence starts
    at position 0. Dropout needs a Place.
    """

    def __init__(self, config: DecoderConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = LearnedPositions(config.context, config.width) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = Norm(config)
        table = self.token.weight if config.tied else nn.Parameter(torch.empty_like(self.token.weight))
        self.head = Head(cast("nn.Parameter", table))
        initialise(self, seed, residuals=2 * config.depth)
        rng.name_streams(self)

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, *, cache: Sequence[BlockCache] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, T, V] for integer tokens [B, T]; with targets (sum of the cross-entropies in nats, their count).

        A target of -100 does not count. `cache`, one for each block, is extended by the tokens' keys and values.
        Raises InvalidArgument for positions beyond the context.
        """
        x_BTD = self.embed(tokens_BT)
        for index, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, cache=None if cache is None else cache[index])
        return self.predict(x_BTD, targets_BT)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """x [B, T, D] for the blocks."""
        expect_within(self.config.context, tokens_BT)
        x_BTD: Tensor = self.token(tokens_BT)
        return x_BTD if self.position is None else x_BTD + self.position(tokens_BT)

    def predict(self, x_BTD: Tensor, targets_BT: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """What forward gives, of what the last block gives."""
        x_BTD = self.norm(x_BTD)
        if targets_BT is None:
            logits: Tensor = self.head(x_BTD)
            return logits
        loss: tuple[Tensor, Tensor] = self.head.loss(x_BTD, targets_BT)
        return loss

    def layers(self) -> list[Layer]:
        """For a pipeline, of batches with "tokens" and "targets"; the last one gives the loss as forward does."""
        return [
            Layer(self.embed, (self.token, self.position), ("tokens",)),
            *map(Layer, self.blocks),
            Layer(self.predict, (self.norm, self.head), ("targets",)),
        ]

    def new_cache(self) -> list[BlockCache]:
        """Empty, for forward."""
        return [BlockCache(self.config.context) for _ in self.blocks]

    def plan(self) -> dict[str, Style]:
        """How tensor parallelism cuts the model."""
        position = {"position": Positions()} if self.position is not None else {}
        return {"token": Vocabulary(), **position, **block_plan("blocks.*", self.config), "head": Vocabulary()}
