"""Recomputation: the same bits as without, and less that is kept."""

from __future__ import annotations

import pytest
import torch
from ranks import Rank, run_ranks
from torch import Tensor, nn

from paracomm.errors import InvalidArgument
from paracomm.models import Decoder, DecoderConfig
from paracomm.parallel import rng
from paracomm.parallel.mesh import Mesh
from paracomm.parallel.plan import parallelize
from paracomm.parallel.recompute import checkpoint, recompute

CONFIG = DecoderConfig(width=16, depth=3, heads=4, context=32, vocabulary=11, dropout=0.3)
TOKENS = torch.randint(0, 11, (2, 32), generator=torch.Generator().manual_seed(0))


def place() -> rng.Place:
    return rng.Place(3, 1, torch.arange(2), torch.arange(32))


def step(model: nn.Module) -> tuple[list[Tensor], int]:
    """(loss and gradients, bytes kept for backward). Backward runs outside of the place."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), rng.at(place()):
        loss, _ = model(TOKENS, TOKENS)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())], sum(kept.values())


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_the_bits_are_those_without(mode):
    expected, all_bytes = step(Decoder(CONFIG).double())
    model = Decoder(CONFIG).double()
    recompute(model, mode)
    found, few_bytes = step(model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert few_bytes < {"selective": 1.0, "full": 0.5}[mode] * all_bytes
    again, _ = step(model.train())
    assert torch.equal(again[0], expected[0])


def test_the_second_run_is_at_the_first_ones_place():
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(rng.placed())
        return x.sin()

    x = torch.rand(3, requires_grad=True)
    first = place()
    with rng.at(first):
        y = checkpoint(function, x)
    y.sum().backward()
    assert seen == [first, first]
    assert torch.equal(x.grad, x.detach().cos())
    with torch.no_grad():
        checkpoint(function, x)
    assert seen[2:] == [None]


def on_ranks(rank: Rank, mode: str) -> list[Tensor]:
    mesh = Mesh(rank.connect(), tp=2)
    model = parallelize(Decoder(CONFIG).double(), mesh, sequence=True)
    recompute(model, mode)
    results, _ = step(model)
    mesh.close()
    return results


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_ranks_recompute_what_they_sent(mode):
    for found, expected in zip(run_ranks(2, on_ranks, mode), run_ranks(2, on_ranks, "none"), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_cannot_be_recomputed_is_named():
    with pytest.raises(InvalidArgument, match="mode is 'half'"):
        recompute(Decoder(CONFIG), "half")
    with pytest.raises(InvalidArgument, match=r"no nn\.ModuleList"):
        recompute(nn.Linear(2, 2), "full")
    with pytest.raises(InvalidArgument, match="no attention core"):
        recompute(nn.Linear(2, 2), "selective")
