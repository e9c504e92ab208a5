"""Costs of layers: exact by a clock that layers themselves move, bytes counted by hand, rank 0's on every rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from ranks import Rank, run_ranks
from torch import nn

from paracomm.errors import InvalidArgument, Mismatch
from paracomm.models import Decoder, DecoderConfig, Seq2Seq, Seq2SeqConfig
from paracomm.parallel import cost
from paracomm.parallel.cost import LayerCost, agree, boundaries, measure, measured_cut, speeds
from paracomm.pipeline import build


@dataclass
class Layer:
    """As a paracomm.parallel.pipeline.Layer is called."""

    call: nn.Module
    takes: tuple[str, ...] = ()

    @property
    def uses(self):
        return [self.call]

    def __call__(self, carried, batch):
        result = self.call(*carried, *(batch[name] for name in self.takes))
        return result if isinstance(result, tuple) else (result,)


class Clock:
    """Stands still but for those who move it."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, clock, forward_s, backward_s):
        ctx.clock, ctx.backward_s = clock, backward_s
        clock.now += forward_s
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.now += ctx.backward_s
        return gradient, None, None, None


class Slow(nn.Module):
    """Takes the next of `rounds` times (forward and twice that backward), and what it weighs."""

    def __init__(self, clock, *rounds, loss=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.clock, self.rounds, self.loss = clock, list(rounds), loss

    def forward(self, x):
        taken = self.rounds.pop(0) if len(self.rounds) > 1 else self.rounds[0]
        y = _Take.apply(x * self.weight, self.clock, taken, 2 * taken)
        return (y.sum(), torch.tensor(y.numel())) if self.loss else y


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(cost, "time", clock)
    return clock


def test_times_are_medians_of_each_layer_without_the_first_round(clock):
    layers = [
        Layer(Slow(clock, 99, 1, 50, 2, 3, 2), ("x",)),
        Layer(Slow(clock, 99, 8, 8, 8, 0, 0)),
        Layer(Slow(clock, 7, loss=True)),
    ]
    found = measure(layers, {"x": torch.ones(3)}, repeats=5, warm_up=1)
    assert [(each.forward_s, each.backward_s) for each in found] == [(2, 4), (8, 16), (7, 14)]
    assert [each.seconds for each in found] == [6, 24, 21]


class Summed(nn.Module):
    def forward(self, x, target):
        return ((x - target) ** 2).sum(), torch.tensor(len(x))


def test_bytes_are_counted_once_and_weights_are_none_of_the_activations():
    layers = [
        Layer(nn.Embedding(10, 4), ("tokens",)),
        Layer(nn.Linear(4, 5)),
        Layer(nn.Sequential(nn.ReLU(), nn.Linear(5, 3, bias=False))),
        Layer(Summed(), ("target",)),
    ]
    batch = {"tokens": torch.tensor([1, 2]), "target": torch.zeros(2, 3)}
    found = measure(layers, batch, repeats=1, warm_up=0)
    assert [each.parameter_bytes for each in found] == [160, 100, 60, 0]
    assert [each.output_bytes for each in found] == [32, 40, 24, 0]
    # Indices; inputs; inputs and ReLU's result; inputs and the difference.
    assert [each.activation_bytes for each in found] == [16, 32, 80, 48]


def test_nothing_is_left_behind():
    torch.manual_seed(0)
    layers = [Layer(nn.Linear(4, 4), ("x",)), Layer(nn.Dropout(0.5)), Layer(Summed(), ("target",))]
    first = layers[0].call
    first.weight.grad = torch.full((4, 4), 7.0)
    before, weight = torch.get_rng_state(), first.weight.detach().clone()
    measure(layers, {"x": torch.ones(2, 4), "target": torch.zeros(2, 4)})
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.weight, weight)
    assert torch.equal(first.weight.grad, torch.full((4, 4), 7.0)) and first.bias.grad is None


def test_gradients_come_back_when_a_layer_raises():
    layer = Layer(nn.Linear(4, 4), ("x",))
    layer.call.bias.grad = torch.full((4,), 7.0)
    with pytest.raises(RuntimeError, match="shapes"):
        measure([layer], {"x": torch.ones(2, 3)})
    assert torch.equal(layer.call.bias.grad, torch.full((4,), 7.0)) and layer.call.weight.grad is None


def test_a_frozen_layer_has_no_backward(clock):
    embedding = nn.Embedding(10, 4).requires_grad_(False)
    found = measure([Layer(embedding, ("tokens",)), Layer(Slow(clock, 1, loss=True))], {"tokens": torch.tensor([1])})
    assert (found[0].backward_s, found[1].backward_s) == (0, 2)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(InvalidArgument, match="0 layers"):
        measure([], {})
    with pytest.raises(InvalidArgument, match="0 repeats"):
        measure([Layer(nn.Linear(1, 1), ("x",))], {"x": torch.ones(1)}, repeats=0)

    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(InvalidArgument, match="layer 0 gives nothing"):
        measure([Layer(Detached(1, 1), ("x",))], {"x": torch.ones(1)})


COST = LayerCost(1.0, 2.0, 10, 20, 30)


def test_boundaries_are_paid_both_ways():
    costs = [COST, replace(COST, output_bytes=0)]
    assert boundaries(costs, bytes_per_s=10, latency_s=0.5) == [7, 1]
    with pytest.raises(InvalidArgument, match="0 bytes/s"):
        boundaries(costs, bytes_per_s=0)


def test_layers_of_our_models():
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (2, 8))
    decoder = Decoder(DecoderConfig(16, 3, 2, 8, vocabulary=50, tied=False))
    found = measure(decoder.layers(), {"tokens": tokens, "targets": tokens}, repeats=1)
    assert len(found) == 5
    assert sum(each.parameter_bytes for each in found) == sum(p.nbytes for p in decoder.parameters())
    assert [each.output_bytes for each in found] == [2 * 8 * 16 * 4] * 4 + [0]
    assert len({each.activation_bytes for each in found[1:4]}) == 1 and found[1].activation_bytes > 2 * 8 * 16 * 4
    assert all(each.forward_s > 0 and each.backward_s > 0 for each in found)

    both = Seq2Seq(Seq2SeqConfig(16, 3, 2, 8, vocabulary=50, encoder_depth=2))
    batch = {"source": tokens, "tokens": tokens, "targets": tokens}
    found = measure(both.layers(), batch, repeats=1)
    # The encoder's end goes along with the decoder's x until the last block.
    assert [each.output_bytes // (2 * 8 * 16 * 4) for each in found] == [1, 1, 1, 2, 2, 2, 2, 0]


def agreeing(rank: Rank):
    comm = rank.connect()
    mine = [replace(COST, forward_s=0.1 + comm.rank), replace(COST, forward_s=0.2)]
    with pytest.raises(Mismatch, match=r"\[1, 2, 2\] layers"):
        agree(mine[: 1 + (comm.rank > 0)], comm)
    return agree(mine, comm), speeds(mine, comm)


def test_all_ranks_take_the_figures_of_rank_0():
    for costs, relative in run_ranks(3, agreeing):
        assert costs == [replace(COST, forward_s=0.1), replace(COST, forward_s=0.2)]  # to the bit
        assert relative == pytest.approx([1.0, 4.3 / 5.3, 4.3 / 6.3])


def cutting(rank: Rank):
    """Ranks that measure other things cut alike, as rank 0 measured."""
    comm = rank.connect()
    clock = Clock()
    cost.time = clock
    heavy = 6 if comm.rank == 0 else 1
    layers = [Layer(Slow(clock, 1), ("x",)), *(Layer(Slow(clock, 1)) for _ in range(5))]
    layers.append(Layer(Slow(clock, heavy, loss=True)))
    one = measured_cut(layers, {"x": torch.ones(2)}, build("1f1b", ranks=2, microbatches=4), comm, repeats=1)
    vee = measured_cut(layers, {"x": torch.ones(2)}, build("zbv", ranks=2, microbatches=4), comm, repeats=1)
    return one, vee


def test_measured_cuts_are_equal_on_all_ranks():
    for one, vee in run_ranks(2, cutting):
        assert one == [0, 6]
        # The first and the last stage are on rank 0, which has the head and, at least, the first layer.
        assert vee[3] == 6 and vee[1] == 1
