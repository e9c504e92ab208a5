"""Generation with a cache of keys and values: each token passes through the model once.

Works on what a plan has made of a model: all ranks of tp call it together, see the same logits and draw the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from paracomm.errors import InvalidArgument
from paracomm.models.decoder import Decoder
from paracomm.models.layers import BlockCache
from paracomm.models.seq2seq import Seq2Seq
from paracomm.parallel import rng
from paracomm.parallel.plan import whole_sequences

Step = Callable[[Tensor, Sequence[BlockCache]], Tensor]


@torch.no_grad()
def generate(
    model: Decoder | Seq2Seq,
    tokens_BT: Tensor,
    count: int,
    *,
    source_BS: Tensor | None = None,
    source_mask: Tensor | None = None,
    temperature: float = 0.8,
    seed: int = 0,
) -> Tensor:
    """int64 [B, T + count]: tokens_BT, each row followed by `count` sampled tokens.

    When the context is full, the last half of it is read again as a new beginning. The model is in eval mode meanwhile.

    Args:
        source_BS, source_mask: what a Seq2Seq reads, see there.
        temperature: 0 takes the likeliest token each time.
        seed: of the draws, which are the same on every rank.

    Raises InvalidArgument for an empty prompt, and for a source that is missing or not wanted.
    """
    if tokens_BT.dim() != 2 or tokens_BT.shape[1] < 1:
        raise InvalidArgument(f"generate: a prompt of shape {list(tokens_BT.shape)}, expected [B, T] with T >= 1")
    if isinstance(model, Seq2Seq) != (source_BS is not None):
        raise InvalidArgument(f"generate: a {type(model).__name__} and source_BS: only a Seq2Seq has one")
    was_training = model.training
    model.eval()
    try:
        with whole_sequences(model):
            return _generate(model, _step_of(model, source_BS, source_mask), tokens_BT, count, temperature, seed)
    finally:
        model.train(was_training)


def _step_of(model: nn.Module, source_BS: Tensor | None, source_mask: Tensor | None) -> Step:
    """(tokens, cache) -> logits."""
    if source_BS is None:
        return lambda tokens_BT, cache: model(tokens_BT, cache=cache)
    assert isinstance(model, Seq2Seq)
    with rng.at(_place(len(source_BS), 0, source_BS.shape[1])):
        memory_BSD = model.encode(source_BS, source_mask)

    def step(tokens_BT: Tensor, cache: Sequence[BlockCache]) -> Tensor:
        logits = model.decode(memory_BSD, tokens_BT, None, source_mask, cache=cache)
        assert isinstance(logits, Tensor)
        return logits

    return step


def _generate(
    model: Decoder | Seq2Seq, step: Step, tokens_BT: Tensor, count: int, temperature: float, seed: int
) -> Tensor:
    B, T = tokens_BT.shape
    context = model.config.context
    text_BT = torch.cat([tokens_BT, tokens_BT.new_empty(B, count)], dim=1)
    draws = torch.Generator(tokens_BT.device).manual_seed(seed)
    start, seen, cache = max(0, T - context), max(0, T - context), model.new_cache()
    for end in range(T, T + count):
        if end - start > context:
            start = seen = end - max(1, context // 2)
            cache = model.new_cache()
        with rng.at(_place(B, seen - start, end - start)):
            logits_BV = step(text_BT[:, seen:end], cache)[:, -1].float()
        seen = end
        if temperature == 0:
            text_BT[:, end] = logits_BV.argmax(-1)
        else:
            weights_BV = (logits_BV / temperature).softmax(-1)
            text_BT[:, end] = torch.multinomial(weights_BV, 1, generator=draws).squeeze(1)
    return text_BT


def _place(B: int, begin: int, end: int) -> rng.Place:
    return rng.Place(0, 0, torch.arange(B), torch.arange(begin, end))
