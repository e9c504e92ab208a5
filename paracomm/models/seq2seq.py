"""An encoder-decoder Transformer (Vaswani et al., 2017), of the same pre-norm blocks as the decoder.

Shapes: B batch, S source positions, T target positions (both <= context), D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
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


@dataclass(frozen=True)
class Seq2SeqConfig(DecoderConfig):
    """As DecoderConfig, whose depth is the decoder's; encoder_depth None: as deep. One vocabulary serves both sides."""

    encoder_depth: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_blocks < 1:
            self._refuse(f"encoder_depth is {self.encoder_depth}, expected at least 1")

    @property
    def encoder_blocks(self) -> int:
        return self.depth if self.encoder_depth is None else self.encoder_depth


@contextmanager
def at_source(source_BS: Tensor) -> Iterator[None]:
    """Inside, the current Place's positions are the source's: its source_positions, or its positions where it has none
    and there are as many."""
    place = rng.placed()
    if place is not None:
        found = place.source_positions
        if found is None:
            length = source_BS.shape[1]
            found = place.positions if len(place.positions) == length else torch.arange(length)
        place = replace(place, positions=found)
    with rng.at(place):
        yield


class Seq2Seq(nn.Module):
    """Predicts the next target token, given a source sequence. Weights depend on `config` and `seed` only.

    Where this rank's tokens lie in the whole batch is the current rng.Place's to say, as in Decoder.
    """

    def __init__(self, config: Seq2SeqConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        learned = config.positions == "learned"
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.source_position = LearnedPositions(config.context, config.width) if learned else None
        self.target_position = LearnedPositions(config.context, config.width) if learned else None
        self.encoder = nn.ModuleList(Block(config, causal=False) for _ in range(config.encoder_blocks))
        self.encoder_norm = Norm(config)
        self.decoder = nn.ModuleList(Block(config, cross=True) for _ in range(config.depth))
        self.norm = Norm(config)
        table = self.token.weight if config.tied else nn.Parameter(torch.empty_like(self.token.weight))
        self.head = Head(cast("nn.Parameter", table))
        initialise(self, seed, residuals=3 * config.depth)
        rng.name_streams(self)

    def forward(
        self,
        source_BS: Tensor,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        source_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, T, V]; with targets (sum of the cross-entropies in nats, their count), without targets of -100.

        Integer tokens. source_mask: bool [B, S], False for padding. Raises InvalidArgument for positions beyond the
        context.
        """
        return self.decode(self.encode(source_BS, source_mask), tokens_BT, targets_BT, source_mask)

    def encode(self, source_BS: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """The memory [B, S, D] that the decoder looks at."""
        x_BSD = self.embed_source(source_BS)
        for block in self.encoder:
            x_BSD = self.encode_by(block, x_BSD, source_BS, source_mask)
        memory_BSD: Tensor = self.encoder_norm(x_BSD)
        return memory_BSD

    def embed_source(self, source_BS: Tensor) -> Tensor:
        """x [B, S, D] for the encoder's blocks."""
        with at_source(source_BS):
            expect_within(self.config.context, source_BS)
            x_BSD: Tensor = self.token(source_BS)
            return x_BSD if self.source_position is None else x_BSD + self.source_position(source_BS)

    @staticmethod
    def encode_by(block: nn.Module, x_BSD: Tensor, source_BS: Tensor, source_mask: Tensor | None) -> Tensor:
        """What one of the encoder's blocks gives."""
        with at_source(source_BS):
            y_BSD: Tensor = block(x_BSD, key_mask=source_mask)
            return y_BSD

    def decode(
        self,
        memory_BSD: Tensor,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        source_mask: Tensor | None = None,
        *,
        cache: Sequence[BlockCache] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As forward. `cache`, one for each block, is extended; it is of one memory."""
        x_BTD = self.embed_target(tokens_BT)
        for index, block in enumerate(self.decoder):
            x_BTD = block(x_BTD, memory_BSD, source_mask, None if cache is None else cache[index])
        return self.predict(x_BTD, targets_BT)

    def embed_target(self, tokens_BT: Tensor) -> Tensor:
        """x [B, T, D] for the decoder's blocks."""
        expect_within(self.config.context, tokens_BT)
        x_BTD: Tensor = self.token(tokens_BT)
        return x_BTD if self.target_position is None else x_BTD + self.target_position(tokens_BT)

    def predict(self, x_BTD: Tensor, targets_BT: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """What forward gives, of what the last block gives."""
        x_BTD = self.norm(x_BTD)
        if targets_BT is None:
            logits: Tensor = self.head(x_BTD)
            return logits
        loss: tuple[Tensor, Tensor] = self.head.loss(x_BTD, targets_BT)
        return loss

    def layers(self) -> list[Layer]:
        """For a pipeline, of batches with "source", "tokens", "targets" and, if there is padding, "mask".

        From the encoder's end on, the memory is carried beside the decoder's x, to its last block.
        """
        source, mask = ("source",), ("mask",)
        encoder = [Layer(partial(self.encode_by, block), (block,), source, mask) for block in self.encoder]
        decoder = [Layer(partial(self._decode_by, block), (block,), (), mask) for block in self.decoder]
        return [
            Layer(self.embed_source, (self.token, self.source_position), source),
            *encoder,
            Layer(self._turn, (self.encoder_norm, self.token, self.target_position), ("tokens",)),
            *decoder,
            Layer(self._predict_beside, (self.norm, self.head), ("targets",)),
        ]

    def _turn(self, x_BSD: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder_norm(x_BSD), self.embed_target(tokens_BT)

    @staticmethod
    def _decode_by(
        block: nn.Module, memory_BSD: Tensor, x_BTD: Tensor, source_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return memory_BSD, block(x_BTD, memory_BSD, source_mask)

    def _predict_beside(self, _: Tensor, x_BTD: Tensor, targets_BT: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.predict(x_BTD, targets_BT)

    def new_cache(self) -> list[BlockCache]:
        """Empty, for decode."""
        return [BlockCache(self.config.context) for _ in self.decoder]

    def plan(self) -> dict[str, Style]:
        """How tensor parallelism cuts the model."""
        positions = {}
        if self.source_position is not None:
            positions = {"source_position": Positions(), "target_position": Positions()}
        return {
            "token": Vocabulary(),
            **positions,
            **block_plan("encoder.*", self.config),
            **block_plan("decoder.*", self.config, cross=True),
            "head": Vocabulary(),
        }
