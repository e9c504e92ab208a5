"""Boxes of a whole tensor: they hold every element of a range once, where it belongs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paracomm.errors import InvalidArgument
from paracomm.parallel.pieces import boxes, of_range, of_whole, whole_shape
from paracomm.parallel.shard import Shard

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@settings(deadline=None)
@given(SHAPES, st.data())
def test_boxes_are_the_range_in_order(shape, data):
    count = math.prod(shape)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, count), st.integers(0, count))))
    numbers = torch.arange(count).view(shape)
    found = []
    for offsets, sizes in boxes(shape, start, stop):
        assert min(sizes, default=1) > 0
        found += numbers[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].flatten().tolist()
    assert found == list(range(start, stop))
    assert len(list(boxes(shape, start, stop))) <= max(1, 2 * len(shape) - 1)


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), st.data())
def test_shards_and_ranges_of_them_make_up_the_whole(shape, data):
    """The whole is cut over ranks, in one piece or in two; each rank's part is flattened and cut again."""
    dim = data.draw(st.integers(0, len(shape) - 1))
    parts = data.draw(st.integers(1, 2))
    shape = (*shape[:dim], parts * shape[dim], *shape[dim + 1 :])
    width, whole = shape[dim] // parts, torch.randn(shape)
    edges = sorted({0, width, *data.draw(st.lists(st.integers(0, width), max_size=2))})
    filled, times = torch.zeros(shape), torch.zeros(shape)
    for low, high in itertools.pairwise(edges):
        ranges = tuple((part * width + low, high - low) for part in range(parts))
        shard = Shard(dim, ranges[0][0], parts * (high - low), shape[dim], pieces=ranges if parts > 1 else ())
        local = shard.take(whole)
        cut = data.draw(st.integers(0, local.numel()))
        flat = local.flatten()
        pieces = of_range(flat[:cut], 0, local.shape, shard) + of_range(flat[cut:], cut, local.shape, shard)
        assert all(piece.shape == shape for piece in pieces)
        for piece in pieces if cut % 2 else of_whole(local, shard):
            box = tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.values.shape, strict=True))
            filled[box] = piece.values
            times[box] += 1
    assert torch.equal(filled, whole) and bool((times == 1).all())


def test_pieces_are_views():
    flat = torch.zeros(12)
    for piece in of_range(flat[2:8], 2, (4, 3), Shard(1, 3, 3, 6)):
        piece.values.fill_(1.0)
    assert flat.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]


def test_a_number_is_one_box_and_an_empty_tensor_none():
    (piece,) = of_whole(torch.tensor(3.0), None)
    assert piece.shape == piece.offsets == () and piece.values == 3
    assert of_whole(torch.zeros(0, 3), None) == [] == of_range(torch.zeros(0), 0, (0, 3), None)


def test_a_shard_of_unknown_size_is_refused():
    with pytest.raises(InvalidArgument, match="its total is 0"):
        whole_shape((2, 3), Shard(0, 0, 2))
