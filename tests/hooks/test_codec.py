"""The block codec: its stated error for any input, and the same bytes from the vector code and from torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from paracomm.comm.codec import BlockCodec
from paracomm.errors import InvalidArgument
from paracomm.hooks.blocks import TorchCodec

CODECS = st.builds(BlockCodec, st.sampled_from([8, 4]), st.sampled_from([32, 64, 96, 256]))
ANY_FLOAT = st.floats(width=32)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**126, min_value=-(2.0**126))


def arrays(elements):
    return st_numpy.arrays(np.float32, st.integers(0, 400), elements=elements, fill=st.just(np.float32(0)))


def round_trip(codec, x, spare=0, **options):
    message = torch.empty(codec.nbytes(codec.blocks(x.numel()) + spare), dtype=torch.uint8)
    codec.encode(x, message, **options)
    decoded = torch.empty_like(x)
    codec.decode(message, decoded)
    return message, decoded


def by_block(codec, x):
    return torch.nn.functional.pad(x, (0, -x.numel() % codec.block)).view(-1, codec.block)


@given(CODECS, arrays(ANY_FLOAT), st.integers(0, 2))
@settings(max_examples=300, deadline=None)
def test_error_of_a_round_trip(codec, x, spare):
    x = torch.from_numpy(x)
    message, decoded = round_trip(codec, x, spare)
    assert message.numel() == (codec.blocks(x.numel()) + spare) * (4 + codec.block * codec.bits // 8)
    for block, result in zip(by_block(codec, x), by_block(codec, decoded), strict=True):
        if not block.isfinite().all():
            assert result.isnan().any()
            continue
        largest = block.abs().max().double()
        off = (block.double() - result.double()).abs()
        assert (off <= 1.0002 * codec.error * largest).all() or largest < codec.top * 2.0**-126
        if codec.bits == 4:  # the fewer an element, the less it is off
            assert (off <= 1.0002 * (largest / 98 + (block.double().abs() * largest / 49).sqrt())).all() or (
                largest < codec.top * 2.0**-126
            )


@given(CODECS, arrays(FINITE), arrays(FINITE), st.sampled_from([1.0, 2.0, 3.0]))
@settings(max_examples=200, deadline=None)
def test_what_is_lost_is_kept(codec, x, residual, divisor):
    count = min(len(x), len(residual))
    x, residual = torch.from_numpy(x[:count]), torch.from_numpy(residual[:count])
    kept = torch.full_like(x, torch.nan)
    _, decoded = round_trip(codec, x, residual=residual, kept=kept, divisor=divisor)
    y = x.double() + residual.double()
    delivered = decoded.double() * divisor + kept.double()
    assert ((delivered - y).abs() <= y.abs().max() * 1e-5 if count else torch.tensor(True)).all()


@given(CODECS, arrays(ANY_FLOAT))
@settings(max_examples=200, deadline=None)
def test_torch_writes_and_reads_the_same_bytes(codec, x):
    x, twin = torch.from_numpy(x), TorchCodec(codec.bits, codec.block)
    kept, kept_too = torch.zeros_like(x), torch.zeros_like(x)
    message, decoded = round_trip(codec, x, 1, residual=kept, kept=kept)
    message_too, decoded_too = torch.empty_like(message), torch.empty_like(decoded)
    twin.encode(x, message_too, residual=kept_too, kept=kept_too)
    # Which NaN a scale is does not matter.
    rows, rows_too = (m.view(-1, 4 + codec.block * codec.bits // 8) for m in (message, message_too))
    scales, scales_too = (r[:, :4].contiguous().view(torch.float32) for r in (rows, rows_too))
    assert torch.equal(scales.nan_to_num(-1.0), scales_too.nan_to_num(-1.0))
    assert torch.equal(rows[:, 4:], rows_too[:, 4:])
    assert torch.equal(kept, kept_too)
    twin.decode(message, decoded_too)
    assert torch.equal(decoded.nan_to_num(-1.0), decoded_too.nan_to_num(-1.0))


@pytest.mark.parametrize("bits", [8, 4])
def test_an_overflow_is_seen_and_does_not_stay(bits):
    codec = BlockCodec(bits, 32)
    for bad in (torch.inf, -torch.inf, torch.nan):
        x = torch.ones(96)
        x[40] = bad
        kept = torch.zeros_like(x)
        _, decoded = round_trip(codec, x, residual=kept, kept=kept)
        assert decoded[32:64].isnan().all() and decoded[:32].isfinite().all() and decoded[64:].isfinite().all()
        assert kept.isfinite().all()


def test_what_does_not_fit_is_refused():
    codec, x = BlockCodec(8, 64), torch.zeros(100)
    with pytest.raises(InvalidArgument, match="out has 68 bytes"):
        codec.encode(x, torch.empty(68, dtype=torch.uint8))
    with pytest.raises(InvalidArgument, match="float64"):
        codec.encode(x.double(), torch.empty(136, dtype=torch.uint8))
    with pytest.raises(InvalidArgument, match="strided"):
        codec.encode(torch.zeros(200)[::2], torch.empty(136, dtype=torch.uint8))
    with pytest.raises(InvalidArgument, match="kept has 99"):
        codec.encode(x, torch.empty(136, dtype=torch.uint8), kept=torch.zeros(99))
    with pytest.raises(InvalidArgument, match="fewer than 100"):
        codec.decode(torch.empty(68, dtype=torch.uint8), x)
    for bits, block in ((2, 64), (8, 0), (8, 33), (4, 2048)):
        with pytest.raises(InvalidArgument, match="expected"):
            BlockCodec(bits, block)
