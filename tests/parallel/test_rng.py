"""The counter-based generator against its paper, against a twin in plain torch, and cut in every way."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from paracomm import _C
from paracomm.comm import random
from paracomm.errors import Error, InvalidArgument
from paracomm.parallel import rng
from paracomm.parallel.attention import Attention

ISAS = ["baseline", "avx2", "avx512"]
MASK = 0xFFFFFFFF


@pytest.fixture(params=ISAS)
def isa(request):
    try:
        _C.limit_reduce_isa(request.param)
        if _C.reduce_isa() != request.param:
            pytest.skip(f"this CPU has no {request.param}")
        yield request.param
    except Error:
        pytest.skip(f"this build has no {request.param}")
    finally:
        _C.limit_reduce_isa("")


def words_by_torch(seed: int, stream: int, step: int, blocks: Tensor) -> Tensor:
    """int64 [..., 4]: the words of the counters (block, stream, step), int64 blocks [...]."""
    c = [blocks & MASK, (blocks >> 32) & MASK, torch.full_like(blocks, stream), torch.full_like(blocks, step)]
    low, high = seed & MASK, seed >> 32
    for _ in range(10):
        p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # modulo 2^64, so that >> may drag ones in
        c = [((q >> 32) & MASK) ^ c[1] ^ low, q & MASK, ((p >> 32) & MASK) ^ c[3] ^ high, p & MASK]
        low, high = (low + 0x9E3779B9) & MASK, (high + 0xBB67AE85) & MASK
    return torch.stack(c, -1)


def keep_by_torch(seed: int, stream: int, step: int, index: Tensor, p: float) -> Tensor:
    blocks = (index >> 2) & ((1 << 62) - 1)  # as unsigned numbers
    words = words_by_torch(seed, stream, step, blocks).gather(-1, (index & 3).unsqueeze(-1)).squeeze(-1)
    return words >= round(p * 2**32)


def normal_by_torch(seed: int, stream: int, step: int, first: int, count: int) -> Tensor:
    index = torch.arange(first, first + count)
    a, b, c, d = words_by_torch(seed, stream, step, index >> 1).unbind(-1)
    u, v = (((((y << 32) | x) >> 11) & ((1 << 53) - 1)).double().add(0.5) * 2.0**-53 for x, y in ((a, b), (c, d)))
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    return torch.where(index % 2 == 0, radius * angle.cos(), radius * angle.sin())


def place(B: int = 3, T: int = 8, step: int = 4, seed: int = 7) -> rng.Place:
    return rng.Place(seed, step, torch.arange(B), torch.arange(T))


# --- words ---
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((MASK,) * 4, (MASK,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter, key, expected):
    """Of Random123's kat_vectors: philox 4 x 32, 10 rounds."""
    assert " ".join(f"{word:08x}" for word in random.philox(counter, key)) == expected
    block = torch.tensor(
        counter[1] << 32 | counter[0] if counter[1] < 1 << 31 else (counter[1] - (1 << 32) << 32) | counter[0]
    )
    twin = words_by_torch(key[1] << 32 | key[0], counter[2], counter[3], block)
    assert " ".join(f"{word:08x}" for word in twin.tolist()) == expected


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, MASK),
    step=st.integers(0, MASK - 1),
    bases=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4),
    runs=st.lists(st.tuples(st.integers(0, 2**40), st.integers(1, 300)), min_size=1, max_size=4),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.999]),
)
def test_masks_are_the_twins(seed, stream, step, bases, runs, p):
    base, offsets = torch.tensor(bases), torch.cat([torch.arange(a, a + n) for a, n in runs])
    at = replace(place(step=step), seed=seed)
    mask = rng.keep_mask(stream, base, offsets, p, at)
    assert mask.shape == (len(base), len(offsets))
    assert torch.equal(mask, keep_by_torch(seed, stream, step, base[:, None] + offsets, p))


def test_every_path_gives_the_same_bits(isa):
    base, offsets = torch.tensor([0, 1, 6, (1 << 34) - 70, -3]), torch.arange(3, 1003)
    mask = rng.keep_mask(5, base, offsets, 0.3, place())
    assert torch.equal(mask, keep_by_torch(7, 5, 4, base[:, None] + offsets, 0.3))
    drawn = torch.empty(999, dtype=torch.float64)
    random.fill_normal(1, 2, 3, (1 << 33) - 101, drawn)
    torch.testing.assert_close(drawn, normal_by_torch(1, 2, 3, (1 << 33) - 101, 999), rtol=1e-12, atol=1e-14)
    # The same bits everywhere: + - * / and square roots alone. A new digest means new initial weights for everybody.
    digest = (drawn.view(torch.int64) * torch.arange(1, 1000)).sum().item()
    assert digest == -8298461349752202379


def test_a_mask_is_a_function_of_each_of_its_arguments():
    base, offsets = torch.zeros(1, dtype=torch.int64), torch.arange(4096)
    masks = [
        rng.keep_mask(1, base, offsets, 0.5, place()),
        rng.keep_mask(2, base, offsets, 0.5, place()),
        rng.keep_mask(1, base, offsets, 0.5, place(step=5)),
        rng.keep_mask(1, base, offsets, 0.5, place(seed=8)),
        rng.keep_mask(1, base + 4096, offsets, 0.5, place()),
    ]
    for i, a in enumerate(masks):
        assert abs(a.double().mean() - 0.5) < 0.04
        for b in masks[:i]:
            assert abs((a == b).double().mean() - 0.5) < 0.04


# --- dropout ---
def dropout(p: float = 0.25, stream: int = 9) -> rng.Dropout:
    layer = rng.Dropout(p)
    layer.stream = stream
    return layer


def test_dropout_cut_in_every_way_is_a_part_of_the_whole():
    x = torch.rand(3, 8, 10, dtype=torch.float64) + 1
    with rng.at(place()):
        whole = dropout()(x)
    kept = whole != 0
    assert torch.equal(whole[kept], x[kept] * (1 / 0.75)) and 0.6 < kept.double().mean() < 0.9
    rows = torch.tensor([2, 0])
    with rng.at(replace(place(), rows=rows, positions=torch.tensor([6, 7, 1]))):
        assert torch.equal(dropout()(x[rows][:, [6, 7, 1]]), whole[rows][:, [6, 7, 1]])
    for index in range(3):
        part, feature = dropout(), dropout()
        part.sequence_part = (index, 3)
        mine = torch.arange(8).tensor_split(3)[index]
        with rng.at(place()):
            assert torch.equal(part(x[:, mine]), whole[:, mine])
        features = slice(3 * index, 3 * index + 3)
        feature.feature_part = (3 * index, 10)
        with rng.at(place()):
            assert torch.equal(feature(x[:, :, features]), whole[:, :, features])


def test_backward_draws_the_mask_of_forward_again():
    layer, x = dropout(), torch.rand(3, 8, 10, dtype=torch.float64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), rng.at(place()):
        y = layer(x)
    y.sum().backward()
    assert saved == []
    assert torch.equal(x.grad, (y != 0).double() * (1 / 0.75))


def test_dropout_passes_everything_where_it_should():
    x, layer = torch.rand(3, 8, 10), dropout()
    assert layer.eval()(x) is x
    assert dropout(0.0)(x) is x


def test_what_dropout_lacks_is_named():
    x = torch.rand(3, 8, 10)
    with pytest.raises(Error, match=r"rng\.at"):
        dropout()(x)
    with rng.at(place()), pytest.raises(Error, match="name_streams"):
        rng.Dropout(0.1)(x)
    with rng.at(place()), pytest.raises(InvalidArgument, match=r"2 samples, but Place\.rows has 3"):
        dropout()(x[:2])
    with rng.at(place()), pytest.raises(InvalidArgument, match="sequence of 7"):
        dropout()(x[:, :7])
    with pytest.raises(InvalidArgument, match="dropout is 1"):
        rng.Dropout(1.0)
    with pytest.raises(InvalidArgument, match="step"):
        place(step=rng.INITIAL_STEP)
    with pytest.raises(InvalidArgument, match=r"rows is torch\.int32"):
        replace(place(), rows=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(InvalidArgument, match="expected 2 bases x 3 offsets"):
        random.keep_mask(0, 0, 0, torch.zeros(2).long(), torch.zeros(3).long(), 1, torch.zeros(5, dtype=torch.bool))
    with pytest.raises(InvalidArgument, match="bases is float32"):
        random.keep_mask(0, 0, 0, torch.zeros(2), torch.zeros(3).long(), 1, torch.zeros(6, dtype=torch.bool))
    with pytest.raises(InvalidArgument, match="stream is 4294967296"):
        random.fill_normal(0, 1 << 32, 0, 0, torch.zeros(2, dtype=torch.float64))


# --- places ---
def test_places_nest_and_end():
    assert rng.placed() is None
    with pytest.raises(Error):
        rng.current()
    with rng.at(place(step=1)):
        with pytest.raises(ZeroDivisionError), rng.at(place(step=2)):
            assert rng.current().step == 2
            raise ZeroDivisionError
        assert rng.current().step == 1
    assert rng.placed() is None


def test_positions_are_the_places_or_count_from_zero():
    assert rng.positions(3).tolist() == [0, 1, 2]
    assert rng.positions(2, part=(1, 3)).tolist() == [2, 3]
    with rng.at(replace(place(), positions=torch.tensor([5, 1, 9, 2]))):
        assert rng.positions(4).tolist() == [5, 1, 9, 2]
        assert rng.positions(2, part=(1, 2)).tolist() == [9, 2]


def test_streams_follow_names():
    model = nn.ModuleDict({"a": nn.Sequential(rng.Dropout(0.1), nn.Linear(2, 2)), "b": Attention(0.1)})
    rng.name_streams(model)
    assert model["a"][0].stream == rng.stream_of("a.0") != model["b"].stream == rng.stream_of("b")
    other = nn.ModuleDict({"b": Attention(0.1)})
    rng.name_streams(other)
    assert other["b"].stream == model["b"].stream


# --- initial weights ---
def test_normal_has_the_moments_and_is_rounded_once():
    x = rng.normal(3, "w", (400, 500), 0.02, torch.float64)
    assert abs(x.mean()) < 2e-4 and abs(x.std() / 0.02 - 1) < 0.01
    assert abs((x / 0.02).pow(4).mean() - 3) < 0.1
    assert torch.equal(rng.normal(3, "w", (400, 500), 0.02, torch.float32), x.float())
    assert torch.equal(rng.normal(3, "w", (400, 500), 0.02, torch.bfloat16), x.bfloat16())
    for other in (rng.normal(3, "v", (400, 500), 0.02), rng.normal(4, "w", (400, 500), 0.02)):
        assert abs((other.double() * x).mean() / 0.02**2) < 0.02
    part = torch.empty(100, dtype=torch.float64)
    random.fill_normal(3, rng.stream_of("w"), rng.INITIAL_STEP, 777, part)
    assert torch.equal(part * 0.02, x.flatten()[777:877])
    assert rng.normal(3, "w", (0, 4)).shape == (0, 4)
