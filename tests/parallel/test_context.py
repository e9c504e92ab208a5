"""Attention by blocks and by context parallelism against attention written out in float64, gradients included."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks
from torch import Tensor

from paracomm.errors import Error, InvalidArgument
from paracomm.models import Decoder, DecoderConfig
from paracomm.parallel import rng
from paracomm.parallel.attention import POSITION_BITS, Attention, HeadDropout, attention
from paracomm.parallel.context import ContextAttention, context_positions
from paracomm.parallel.mesh import Mesh
from paracomm.parallel.plan import parallelize

TOLERANCE = 1e-12
P, STREAM, HEADS_TOTAL = 0.3, 7, 24


def written_out(q, k, v, *, causal, keep=None, key_mask=None, q_positions=None):
    """Attention as it is defined; keep [B, H, T, S]."""
    R, T, S = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(R, 1), v.repeat_interleave(R, 1)
    scores = torch.einsum("bhtk,bhsk->bhts", q, k) / math.sqrt(q.shape[-1])
    q_positions = torch.arange(T) if q_positions is None else q_positions
    hidden = torch.zeros(1, 1, T, S, dtype=torch.bool)
    if causal:
        hidden = hidden | (torch.arange(S) > q_positions[:, None])
    if key_mask is not None:
        hidden = hidden | ~key_mask[:, None, None, :]
    scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1).masked_fill(hidden, 0.0)
    if keep is not None:
        weights = weights * keep / (1 - P)
    return torch.einsum("bhts,bhsk->bhtk", weights, v), scores.logsumexp(-1)


def inputs(B, H, G, T, S, K, dtype=torch.float64, seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, T, K), (B, G, S, K), (B, G, S, K), (B, H, T, K)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def padding(B, S) -> Tensor:
    """Sequence b has S - 2 - 3 b keys; the last one has its first key hidden as well."""
    mask = torch.arange(S) < (S - 2 - 3 * torch.arange(B))[:, None]
    mask[-1, 0] = False
    return mask


def place(B, T, positions=None) -> rng.Place:
    return rng.Place(
        seed=3, step=5, rows=torch.arange(B) + 11, positions=torch.arange(T) if positions is None else positions
    )


def keep_of(B, H, T, S, head_offset=0) -> Tensor:
    """The masks of whole sequences, element by element as attention.py numbers them."""
    lines = (torch.arange(B) + 11)[:, None] * HEADS_TOTAL + head_offset + torch.arange(H)
    base = (lines[..., None] << 2 * POSITION_BITS) + (torch.arange(T) << POSITION_BITS)
    with rng.at(place(B, T)):
        return rng.keep_mask(STREAM, base, torch.arange(S), P)


def with_gradients(function, q, k, v, grad) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def expect_close(ours, expected, what, tolerance=TOLERANCE) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, expected, strict=True):
        error = float((a - b).abs().max() / b.abs().max())
        assert error <= tolerance, f"{name} of {what}: {error:.1e}"


SHAPES = {
    "plain": (2, 3, 3, 12, 12, 5),
    "grouped": (2, 6, 2, 12, 12, 4),
    "one key-value head": (1, 4, 1, 12, 12, 8),
    "cross": (3, 4, 2, 12, 24, 4),
    "more queries than keys": (2, 2, 2, 24, 12, 4),
}


# --- one process ---
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_attention_is_its_definition(shape, causal, masked, dropout) -> None:
    B, H, _, T, S, _ = shape
    q, k, v, grad = inputs(*shape)
    key_mask = padding(B, S) if masked else None
    keep = keep_of(B, H, T, S, head_offset=2) if dropout else None

    def ours(q, k, v):
        core = Attention(P if dropout else 0.0)
        core.stream, core.head_part = STREAM, (2, HEADS_TOTAL)
        with rng.at(place(B, T)):
            return core(q, k, v, causal=causal, key_mask=key_mask)

    expected = with_gradients(lambda *x: written_out(*x, causal=causal, key_mask=key_mask, keep=keep)[0], q, k, v, grad)
    expect_close(with_gradients(ours, q, k, v, grad), expected, "attention")
    if dropout:
        assert 0.15 < 1 - float(keep.double().mean()) < 0.45


@pytest.mark.parametrize("positions", [[4, 5, 6, 1, 2], [9, 8, 3, 2, 0], [0, 1, 2, 10, 11]])
def test_positions_in_any_order(positions) -> None:
    q, k, v, grad = inputs(2, 2, 1, 5, 12, 4)
    where = torch.tensor(positions)

    def ours(q, k, v):
        return attention(q, k, v, q_positions=where, k_positions=torch.arange(12), causal=True)[0]

    expected = with_gradients(lambda *x: written_out(*x, causal=True, q_positions=where)[0], q, k, v, grad)
    expect_close(with_gradients(ours, q, k, v, grad), expected, positions)


@pytest.mark.parametrize("positions", [[4, 5, 6, 1, 2], [4, 5, 6, 7, 8]])
@pytest.mark.parametrize("dropped", [False, True])
def test_second_derivatives_and_torch_func(positions, dropped) -> None:
    q, k, v, _ = inputs(2, 2, 1, 5, 9, 4)
    where, drop = torch.tensor(positions), HeadDropout(STREAM, P, 0, 2) if dropped else None

    def ours(q, k, v):
        options = {"q_positions": where, "k_positions": torch.arange(9), "causal": True, "dropout": drop}
        return attention(q, k, v, **options)[0]

    with rng.at(rng.Place(0, 0, torch.arange(2), torch.arange(9))):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        assert torch.autograd.gradgradcheck(ours, leaves, fast_mode=True)
        expected = torch.autograd.grad(ours(*leaves).sin().sum(), leaves)
        found = torch.func.grad(lambda *x: ours(*x).sin().sum(), (0, 1, 2))(*(x.detach() for x in leaves))
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_autocast_leaves_lse_in_float32() -> None:
    q, k, v, _ = (x.float() for x in inputs(1, 2, 1, 5, 9, 16))
    where = {"q_positions": torch.tensor([4, 5, 6, 1, 2]), "k_positions": torch.arange(9), "causal": True}
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attention(q, k, v, **where)
    exact = attention(*(x.bfloat16().double() for x in (q, k, v)), **where)[1]
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_log_sum_exp(masked) -> None:
    q, k, v, _ = inputs(2, 4, 2, 6, 9, 4)
    key_mask = padding(2, 9) if masked else None
    everywhere = {"q_positions": torch.arange(6), "k_positions": torch.arange(9), "key_mask": key_mask}
    out, lse = attention(q.requires_grad_(), k, v, causal=False, **everywhere)
    assert out.requires_grad and not lse.requires_grad
    assert (lse - written_out(q, k, v, causal=False, key_mask=key_mask)[1]).abs().max() < TOLERANCE


def test_a_query_that_sees_nothing_is_zero() -> None:
    q, k, v, grad = inputs(2, 2, 2, 4, 4, 4)
    key_mask = torch.tensor([[True] * 4, [False] * 4])
    core = Attention()
    out, *grads = with_gradients(lambda *x: core(*x, causal=False, key_mask=key_mask), q, k, v, grad)
    assert not out[1].any() and all(not g[1].any() for g in grads) and all(g.isfinite().all() for g in (out, *grads))


@pytest.mark.parametrize("masked", [False, True])
def test_bfloat16_is_within_twice_the_error_of_torch(masked) -> None:
    q, k, v, grad = inputs(2, 4, 4, 32, 32, 16, torch.bfloat16)
    key_mask = padding(2, 32) if masked else None
    exact = with_gradients(
        lambda *x: written_out(*x, causal=True, key_mask=key_mask)[0], *(x.double() for x in (q, k, v, grad))
    )
    eager = with_gradients(lambda *x: written_out(*x, causal=True, key_mask=key_mask)[0], q, k, v, grad)
    ours = with_gradients(lambda *x: Attention()(*x, key_mask=key_mask), q, k, v, grad)
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - c).abs().max() <= 2 * (b - c).abs().max()


def test_dropout_is_off_in_evaluation_and_needs_a_place_in_training() -> None:
    q, k, v, _ = inputs(1, 2, 2, 4, 4, 4)
    core = Attention(P)
    with pytest.raises(Error, match="no stream"):
        core(q, k, v)
    core.stream = STREAM
    with pytest.raises(Error, match="Place"):
        core(q, k, v)
    assert torch.equal(core.eval()(q, k, v), Attention()(q, k, v))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": (2, 3, 4)}, "expected"),
        ({"k": (2, 2, 4, 8)}, "not a multiple"),
        ({"v": (2, 3, 5, 8)}, "expected"),
        ({"mask": (2, 5)}, "key_mask"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, match) -> None:
    shapes = {"q": (2, 3, 4, 8), "k": (2, 3, 4, 8), "v": (2, 3, 4, 8), "mask": (2, 4)} | change
    if match == "not a multiple":
        shapes["v"] = shapes["k"]
    key_mask = torch.ones(shapes["mask"], dtype=torch.bool)
    with pytest.raises(InvalidArgument, match=match):
        Attention()(torch.zeros(shapes["q"]), torch.zeros(shapes["k"]), torch.zeros(shapes["v"]), key_mask=key_mask)


# --- the positions of a rank ---
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_context_positions_are_a_partition_of_equal_causal_work(n) -> None:
    parts = [context_positions(24, n, r) for r in range(n)]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(24))
    assert len({int((part + 1).sum()) for part in parts}) == 1  # query t sees t + 1 keys


@pytest.mark.parametrize(("T", "n"), [(12, 4), (7, 2), (2, 2)])
def test_lengths_that_do_not_divide_are_refused(T, n) -> None:
    with pytest.raises(InvalidArgument, match=f"sequence of {T} positions.*multiple of {2 * n}"):
        context_positions(T, n, 0)


# --- several ranks ---
def cases() -> Iterator[dict[str, Any]]:
    for shape, causal, masked, dropout in itertools.product(SHAPES, (False, True), (False, True), (False, True)):
        if not causal or SHAPES[shape][3] == SHAPES[shape][4]:
            yield {"shape": shape, "causal": causal, "masked": masked, "dropout": dropout}


def parts_of(x, n, r, dim=2):
    return x.index_select(dim, context_positions(x.shape[dim], n, r))


def run_case(comm, method, shape, causal, masked, dropout) -> tuple[list[Tensor], list[Tensor]]:
    """(ours, expected) on this rank: out, dq, dk, dv."""
    n, me = comm.world_size, comm.rank
    B, H, G, T, S, K = SHAPES[shape]
    if method == "ulysses":
        H, G = H * n, G * n
    T, S = math.lcm(T, 2 * n), math.lcm(S, 2 * n)
    q, k, v, grad = inputs(B, H, G, T, S, K)
    key_mask = padding(B, S) if masked else None
    keep = keep_of(B, H, T, S, head_offset=2) if dropout else None
    expected = with_gradients(lambda *x: written_out(*x, causal=causal, key_mask=key_mask, keep=keep)[0], q, k, v, grad)
    core = Attention(P if dropout else 0.0)
    core.stream, core.head_part = STREAM, (2, HEADS_TOTAL)
    ours = ContextAttention(core, comm, method)
    mine = place(B, T, context_positions(T, n, me))

    def call(q, k, v):
        with rng.at(mine):
            return ours(q, k, v, causal=causal, key_mask=None if key_mask is None else parts_of(key_mask, n, me, 1))

    return (
        with_gradients(call, *(parts_of(x, n, me) for x in (q, k, v, grad))),
        [parts_of(x, n, me) for x in expected],
    )


def check_equals_one_process(rank: Rank, method: str) -> None:
    comm = rank.connect()
    for case in cases():
        ours, expected = run_case(comm, method, **case)
        expect_close(ours, expected, f"{method} {case}")
        again, _ = run_case(comm, method, **case)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)), f"not the same bits again: {case}"


@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_equals_one_process(method, world_size) -> None:
    run_ranks(world_size, check_equals_one_process, method)


def check_masks(rank: Rank, method: str) -> None:
    """With values that are unit vectors, out is the weights themselves: zero where dropped or hidden, bit for bit."""
    comm = rank.connect()
    n, me, B, H, T = comm.world_size, comm.rank, 2, 2 * comm.world_size, 4 * comm.world_size
    positions = context_positions(T, n, me)
    values = torch.eye(T, dtype=torch.float64)[positions].expand(B, H, -1, -1)
    nothing = torch.zeros(values.shape, dtype=torch.float64)
    core = Attention(P)
    core.stream, core.head_part = STREAM, (2, HEADS_TOTAL)
    with rng.at(place(B, T, positions)):
        out = ContextAttention(core, comm, method)(nothing, nothing, values, causal=True)
    keep = keep_of(B, H, T, T, head_offset=2) & (torch.arange(T) <= torch.arange(T)[:, None])
    assert torch.equal(out != 0, keep[:, :, positions])


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_dropout_masks_are_bitwise_those_of_one_process(method) -> None:
    run_ranks(3, check_masks, method)


def check_bfloat16(rank: Rank, method: str) -> None:
    comm = rank.connect()
    n, me = comm.world_size, comm.rank
    whole = inputs(2, 4, 4, 32, 32, 16, torch.bfloat16)
    exact = with_gradients(lambda *x: written_out(*x, causal=True)[0], *(x.double() for x in whole))
    eager = with_gradients(lambda *x: written_out(*x, causal=True)[0], *whole)
    ours = with_gradients(ContextAttention(Attention(), comm, method), *(parts_of(x, n, me) for x in whole))
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - parts_of(c, n, me)).abs().max() <= 2 * (b - c).abs().max()


def check_hidden_sequence(rank: Rank, method: str) -> None:
    comm = rank.connect()
    q, k, v, grad = inputs(2, 2 * comm.world_size, 2 * comm.world_size, 4, 4, 4)
    key_mask = torch.tensor([[True] * 4, [False] * 4])
    ours = ContextAttention(Attention(), comm, method)
    for each in with_gradients(lambda *x: ours(*x, causal=False, key_mask=key_mask), q, k, v, grad):
        assert each.isfinite().all() and each[0].any() and not each[1].any()


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_a_sequence_without_keys_is_zero(method) -> None:
    run_ranks(2, check_hidden_sequence, method)


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_bfloat16_over_ranks(method) -> None:
    run_ranks(2, check_bfloat16, method)


def check_refusals(rank: Rank) -> None:
    comm = rank.connect()
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(InvalidArgument, match="method 'star'"):
        ContextAttention(Attention(), comm, "star")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="does not divide the 3 heads"):
        ContextAttention(Attention(), comm, "ulysses")(x, x, x)
    with pytest.raises(InvalidArgument, match="does not divide the 1 key-value heads"):
        ContextAttention(Attention(), comm, "ulysses")(torch.zeros(1, 4, 4, 4), x[:, :1], x[:, :1])
    ring = ContextAttention(Attention(), comm)
    with pytest.raises(InvalidArgument, match="4 queries to 2 keys"):
        ring(x, x[:, :, :2], x[:, :, :2], causal=True)
    with pytest.raises(InvalidArgument, match="not context_positions"), rng.at(place(1, 4)):
        ring(x, x, x)
    with pytest.raises(InvalidArgument, match="sequence of 6 positions"):
        ring(x[:, :, :3], x[:, :, :3], x[:, :, :3])
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    layer = parallelize(layer, Mesh(comm, cp=2))
    with pytest.raises(InvalidArgument, match=r"not causal needs.*no context parallelism"):
        layer(torch.zeros(1, 4, 8), src_mask=torch.ones(4, 4).tril(1) == 0)


def test_what_cannot_work_is_refused() -> None:
    run_ranks(2, check_refusals)


def check_bytes(rank: Rank) -> None:
    """What context.py's head says is sent."""
    comm = rank.connect()
    n = comm.world_size
    B, H, G, T, K = 1, 4, 2, 8, 4
    q, k, v, grad = inputs(B, H, G, T, T, K)
    one = 2 * k.nbytes
    right = (comm.rank + 1) % n
    before = comm.bytes_sent(right)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ContextAttention(Attention(), comm)(*leaves)
    middle = comm.bytes_sent(right)
    out.backward(grad)
    after = comm.bytes_sent(right)
    assert (middle - before, after - middle) == ((n - 1) * one, (2 * n - 1) * one)


def test_bytes_on_the_ring_are_the_formula() -> None:
    run_ranks(3, check_bytes)


def check_decoder(rank: Rank, method: str) -> None:
    """A whole model with dropout: each rank's sums add up to one process's, and so do the gradients."""
    comm = rank.connect()
    n, me = comm.world_size, comm.rank
    config = DecoderConfig(24, 2, 6, 24, dropout=0.2, vocabulary=31, kv_heads=3, positions="rotary", norm="rms")
    tokens = torch.randint(0, 31, (2, 25), generator=torch.Generator().manual_seed(1))
    x, y = tokens[:, :-1], tokens[:, 1:]
    one = Decoder(config).double()
    with rng.at(place(2, 24)):
        total, count = one(x, y)
    total.backward()
    several = parallelize(Decoder(config).double(), Mesh(comm, cp=n), context=method)
    with rng.at(place(2, 24, context_positions(24, n, me))):
        mine, own_count = several(parts_of(x, n, me, 1), parts_of(y, n, me, 1))
    mine.backward()
    assert int(comm.all_reduce(own_count)) == int(count)
    assert abs(float(comm.all_reduce(mine.detach())) / float(total) - 1) <= TOLERANCE
    for (name, a), b in zip(several.named_parameters(), one.parameters(), strict=True):
        error = float((comm.all_reduce(a.grad) - b.grad).abs().max() / b.grad.abs().max())
        assert error <= TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parametrize(("world_size", "method"), [(2, "ring"), (4, "ring"), (3, "ulysses")])
def test_a_decoder_over_context_ranks(world_size, method) -> None:
    run_ranks(world_size, check_decoder, method)
