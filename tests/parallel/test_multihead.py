"""torch's own Transformer blocks, handed over as they are, by 1 to 4 ranks in float64: without and with dropout."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import Rank, run_ranks
from torch import nn

from paracomm.errors import InvalidArgument
from paracomm.parallel import rng
from paracomm.parallel.mesh import Mesh
from paracomm.parallel.plan import Column, Features, Heads, Row, Sequence, parallelize, transformer_plan
from tests.parallel.test_tensor import activations, close, compare, double, mesh_of, whole_gradient

B, T, S, D, H, F = 2, 12, 24, 24, 12, 30
SIZES = {"d_model": D, "nhead": H, "dim_feedforward": F}


def causal_mask(n=T):
    return nn.Transformer.generate_square_subsequent_mask(n, dtype=torch.float64)


def padding(n, boolean=True):
    mask = torch.zeros(B, n, dtype=torch.bool)
    mask[0, n - 3 :] = True
    return mask if boolean else torch.zeros(B, n, dtype=torch.float64).masked_fill(mask, -torch.inf)


def check_encoder_layer(rank: Rank) -> None:
    mesh = mesh_of(rank)
    for options in ({"norm_first": True}, {"activation": "gelu"}, {"bias": False}):
        layer = double(nn.TransformerEncoderLayer(**SIZES, dropout=0.0, batch_first=True, **options))
        calls = (
            None,
            lambda m, x: m(x, src_mask=causal_mask(), is_causal=True),
            lambda m, x: m(x, src_mask=causal_mask(), src_key_padding_mask=padding(T)),
            lambda m, x: m(x, src_mask=torch.ones(B * H, T, T).tril(3) == 0),
        )
        for call in calls if "norm_first" in options else calls[:1]:
            for sequence in (False, True):
                compare(mesh, layer, None, [activations(B, T, D)], call, sequence=sequence)


@pytest.mark.parametrize("tp", [1, 2, *(pytest.param(tp, marks=pytest.mark.slow) for tp in (3, 4))])
def test_encoder_layer(tp) -> None:
    run_ranks(tp, check_encoder_layer)


def check_positions_first(rank: Rank) -> None:
    """batch_first=False, [T, B, D]: without sequence parallelism."""
    mesh = mesh_of(rank)
    layer = double(nn.TransformerEncoderLayer(**SIZES, dropout=0.0))
    compare(mesh, layer, None, [activations(T, B, D)], lambda m, x: m(x, src_key_padding_mask=padding(T, False)))
    for options in ({"dropout": 0.1}, {"dropout": 0.0}):
        layer = nn.TransformerEncoderLayer(**SIZES, **options)
        with pytest.raises(InvalidArgument, match="batch_first=True"):
            parallelize(layer, mesh, sequence=not options["dropout"])


def test_positions_first() -> None:
    run_ranks(2, check_positions_first)


def check_decoder_layer(rank: Rank) -> None:
    mesh = mesh_of(rank)
    layer = double(nn.TransformerDecoderLayer(**SIZES, dropout=0.0, batch_first=True))

    def call(model, x, memory):
        return model(x, memory, tgt_mask=causal_mask(), memory_key_padding_mask=padding(S))

    for sequence in (False, True):
        compare(mesh, layer, None, [activations(B, T, D), activations(B, S, D)], call, sequence=sequence)


@pytest.mark.parametrize("tp", [2, 3])
def test_decoder_layer(tp) -> None:
    run_ranks(tp, check_decoder_layer)


def check_stacks(rank: Rank) -> None:
    """nn.Transformer as a whole, in training and in eval mode, where torch would take its fast path."""
    mesh = mesh_of(rank)
    model = double(nn.Transformer(D, H, 2, 2, F, dropout=0.0, batch_first=True), std=0.3)

    def call(model, source, target):
        return model(source, target, tgt_mask=causal_mask(), src_key_padding_mask=padding(S), tgt_is_causal=True)

    for sequence in (False, True):
        parallel = compare(mesh, model, None, [activations(B, S, D), activations(B, T, D)], call, sequence=sequence)
        with torch.no_grad():
            x = activations(B, S, D)
            mask = padding(S)
            expected = copy.deepcopy(model).encoder(x, src_key_padding_mask=mask)
            ours = parallel.eval().encoder(x, src_key_padding_mask=mask)
        close(ours[~mask], expected[~mask], "eval")


def test_stacks() -> None:
    run_ranks(2, check_stacks)


class Mixed(nn.Module):
    """Keys and values of other widths, each with its own weights."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, H, kdim=10, vdim=14, batch_first=True)

    def forward(self, q, k, v):
        return self.attention(q, k, v, need_weights=False)[0]


def check_widths(rank: Rank) -> None:
    mesh = mesh_of(rank)
    inputs = [activations(B, T, D), activations(B, S, 10), activations(B, S, 14)]
    compare(mesh, double(Mixed()), {"attention": Heads()}, inputs)
    compare(mesh, double(Mixed()), {"attention": Heads(), "": Sequence(3)}, inputs, sequence=True)


def test_widths() -> None:
    run_ranks(3, check_widths)


def check_dropout(rank: Rank) -> None:
    """The same masks on one rank and on all: the reference is parallelised over a tp of one."""
    comm = rank.connect()
    whole, mesh = Mesh(comm), Mesh(comm, tp=comm.world_size)
    plain = double(nn.TransformerEncoderLayer(**SIZES, dropout=0.3, batch_first=True))
    x = activations(B, T, D)
    place = rng.Place(7, 3, torch.arange(4, 4 + B), torch.arange(T))
    reference = parallelize(copy.deepcopy(plain), whole)
    for sequence in (False, True):
        parallel = parallelize(copy.deepcopy(plain), mesh, sequence=sequence)
        results = []
        for model in (reference, parallel):
            model.zero_grad()
            with rng.at(place):
                y = model(x, src_mask=causal_mask(), is_causal=True)
            y.square().sum().backward()
            results.append(y.detach())
        close(results[1], results[0], "output")
        named = dict(parallel.named_parameters())
        for name, theirs in reference.named_parameters():
            close(whole_gradient(named[name], mesh), theirs.grad, name)
    with rng.at(rng.Place(7, 4, place.rows, place.positions)):
        assert not torch.allclose(parallel(x, src_mask=causal_mask(), is_causal=True), results[0])


@pytest.mark.parametrize("tp", [2, 3])
def test_dropout(tp) -> None:
    run_ranks(tp, check_dropout)


def check_context(rank: Rank) -> None:
    """cp beside tp and sequence parallelism, causal, with dropout: the balanced positions come back in their places."""
    comm = rank.connect()
    mesh = Mesh(comm, cp=2, tp=2)
    plain = double(nn.TransformerEncoderLayer(**SIZES, dropout=0.3, batch_first=True))
    x, positions = activations(B, T, D), torch.arange(T)
    rows = torch.arange(B)
    reference = parallelize(copy.deepcopy(plain), Mesh(comm))
    with rng.at(rng.Place(1, 2, rows, positions)):
        expected = reference(x, src_mask=causal_mask(), is_causal=True)
    expected.square().sum().backward()
    own = mesh.shard(positions.unsqueeze(0))[0]
    parallel = parallelize(copy.deepcopy(plain), mesh, sequence=True)
    with rng.at(rng.Place(1, 2, rows, own)):
        y = parallel(mesh.shard(x), src_mask=causal_mask(len(own)), is_causal=True)
    close(y, expected[:, own], "output")
    y.square().sum().backward()
    named = dict(parallel.named_parameters())
    for name, theirs in reference.named_parameters():
        gradient = whole_gradient(named[name], mesh).contiguous().clone()
        close(mesh.group("cp").all_reduce(gradient), theirs.grad, name)


def test_context() -> None:
    run_ranks(4, check_context)


def check_refused(rank: Rank) -> None:
    mesh = mesh_of(rank)
    with pytest.raises(InvalidArgument, match="3 heads, which tp 2 does not divide"):
        parallelize(nn.TransformerEncoderLayer(12, 3, 8, batch_first=True), mesh)
    with pytest.raises(InvalidArgument, match="no add_bias_kv"):
        parallelize(nn.MultiheadAttention(D, H, add_bias_kv=True, batch_first=True), mesh, {"": Heads()})
    attention = parallelize(nn.MultiheadAttention(D, H, dropout=0.5, batch_first=True), mesh, {"": Heads()})
    x = torch.randn(B, T, D)
    with pytest.raises(InvalidArgument, match="need_weights"):
        attention(x, x, x)
    with pytest.raises(InvalidArgument, match="not causal needs dropout 0"):
        attention(x, x, x, need_weights=False, attn_mask=torch.ones(T, T).tril(2) == 0)
    with pytest.raises(InvalidArgument, match="other numbers than 0 and -inf"):
        attention(x, x, x, need_weights=False, key_padding_mask=torch.ones(B, T))


def test_refused() -> None:
    run_ranks(2, check_refused)


def test_the_plan_of_a_layer() -> None:
    assert transformer_plan(nn.TransformerEncoderLayer(**SIZES)) == {
        "": Sequence(),
        "self_attn": Heads(),
        "linear1": Column(),
        "dropout": Features(F),
        "linear2": Row(),
    }
