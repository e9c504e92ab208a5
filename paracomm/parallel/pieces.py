"""What of a whole tensor lies on a rank, as boxes of the whole: the form in which a checkpoint takes and gives it.

A rank of ZeRO owns a range of a flattened parameter, which under tensor parallelism is itself a part of a larger one.
A range is a head, some whole rows and a tail, each of them a box or, with more dimensions, again a range:

    whole [4, 6]       columns of tp rank 1, [4, 3]     elements 2 to 7 of them: three boxes of the whole
    . . .|0 1 2        0 1[2]                           offsets (0, 5), sizes (1, 1)
    . . .|3 4 5       [3 4 5]                           offsets (1, 3), sizes (1, 3)
    . . .|6 7 8       [6 7]8                            offsets (2, 3), sizes (1, 2)
    . . .|9 . .        9 . .

at most 2 d - 1 boxes for d dimensions, times the pieces in which a fused projection is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from paracomm.errors import InvalidArgument
from paracomm.parallel.shard import Shard

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes)."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A box of a tensor of `shape`: from `offsets` on, as far as `values` reaches, a view of this rank's memory."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: Tensor


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Elements [start, stop) of a flattened tensor of `shape` as boxes, in their order; none are empty."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row, rest = math.prod(shape[1:]), tuple(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:
        yield from _in_row(rest, last, start - last * row, stop - last * row)
        return
    yield from _in_row(rest, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in rest)), (last - first, *rest)
    yield from _in_row(rest, last, 0, stop - last * row)


def _in_row(rest: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Box]:
    for offsets, sizes in boxes(rest, start, stop):
        yield (index, *offsets), (1, *sizes)


def whole_shape(shape: Sequence[int], shard: Shard | None) -> tuple[int, ...]:
    """Of the tensor that a shard of `shape` is a part of. Raises InvalidArgument where the shard does not say."""
    if shard is None:
        return tuple(shape)
    if shard.total < 1:
        raise InvalidArgument(f"{shard} does not say how large the whole is: its total is {shard.total}")
    return (*shape[: shard.dim], shard.total, *shape[shard.dim + 1 :])


def of_range(values: Tensor, start: int, shape: Sequence[int], shard: Shard | None) -> list[Piece]:
    """The pieces of `values` [n], which are elements [start, start + n) of a flattened tensor or shard of `shape`."""
    found, end = [], 0
    for offsets, sizes in boxes(shape, start, start + len(values)):
        count = math.prod(sizes)
        found += _of_box(values[end : end + count].view(sizes), offsets, shape, shard)
        end += count
    return found


def of_whole(values: Tensor, shard: Shard | None) -> list[Piece]:
    """The pieces of a whole tensor or shard."""
    return _of_box(values, (0,) * values.dim(), values.shape, shard) if values.numel() else []


def _of_box(values: Tensor, offsets: Sequence[int], shape: Sequence[int], shard: Shard | None) -> list[Piece]:
    whole = whole_shape(shape, shard)
    if shard is None:
        return [Piece(whole, tuple(offsets), values)]
    found, base, dim = [], 0, shard.dim
    for place, size in shard.ranges:
        low = max(offsets[dim], base)
        high = min(offsets[dim] + values.shape[dim], base + size)
        if low < high:
            there = (*offsets[:dim], place + low - base, *offsets[dim + 1 :])
            found.append(Piece(whole, tuple(there), values.narrow(dim, low - offsets[dim], high - low)))
        base += size
    return found
