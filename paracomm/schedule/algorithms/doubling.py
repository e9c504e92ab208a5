"""Recursive doubling and halving: partners at distances 1, 2, 4, ... exchange.

Both need p, a power of two, ranks. With n = p + rest, rank p+i first adds its data to rank i's and gets the result in
the end (folding): 2 steps more, and S bytes more for the ranks that it concerns.

recursive_doubling: partners exchange everything and both add. 4 ranks, for short data:

    step     rank 0   rank 1   rank 2   rank 3
    1        all>1    all>0    all>3    all>2     data += arrived
    2        all>2    all>3    all>0    all>1     data += arrived

log2 p steps, S log2 p bytes sent by each rank.

halving_doubling (Rabenseifner): a reduce-scatter in which partners exchange the half that the other one keeps, at
halving distances, then an all-gather at doubling distances. 4 ranks, 4 chunks:

    step     rank 0     rank 1     rank 2     rank 3
    1 (+)    2,3>2      2,3>3      0,1>0      0,1>1
    2 (+)    1>1        0>0        3>3        2>2
    3 (=)    0>1        1>0        2>3        3>2
    4 (=)    0,1>2      0,1>3      2,3>0      2,3>1

2 log2 p steps, 2S(p-1)/p bytes sent by each rank.
Source: Rabenseifner, Optimization of collective reduction operations, 2004; Thakur et al. 2005.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..registry import algorithm, share
from ..schedule import Schedule
from .tree import floor_log2


def power_of_two(n: int) -> int:
    """The largest power of two <= n."""
    return 1 << floor_log2(n)


def folded(n: int) -> int:
    """1 if n is no power of two."""
    return int(n != power_of_two(n))


@contextmanager
def folding(s: Schedule) -> Iterator[NDArray[Any]]:
    """The ranks 0 to p-1, which speak for the others inside the context."""
    p = power_of_two(s.world_size)
    rest = np.arange(s.world_size - p)
    s.reduce(s.at(rest + p, span=s.chunks), s.at(rest, span=s.chunks))
    yield np.arange(p)
    s.copy(s.at(rest, span=s.chunks), s.at(rest + p, span=s.chunks))


@algorithm("all_reduce", "recursive_doubling", steps=lambda n: floor_log2(n) + 2 * folded(n),
           volume=lambda n: floor_log2(n) + folded(n))  # fmt: skip
def recursive_doubling(s: Schedule) -> None:
    with folding(s) as rank:
        for k in range(floor_log2(s.world_size)):
            partner = rank ^ (1 << k)
            s.copy(s.at(rank), s.at(partner, k, "scratch"))
            s.reduce(s.at(rank, k, "scratch"), s.at(rank))


def halving_volume(n: int) -> Fraction:
    p = power_of_two(n)
    return share(2 * (p - 1), p) + folded(n)


@algorithm("all_reduce", "halving_doubling", chunks=power_of_two, steps=lambda n: 2 * (floor_log2(n) + folded(n)),
           volume=halving_volume)  # fmt: skip
def halving_doubling(s: Schedule) -> None:
    distances = [1 << k for k in range(floor_log2(s.world_size))]
    with folding(s) as rank:
        for d in reversed(distances):
            partner = rank ^ d
            theirs = partner & ~(d - 1)
            s.reduce(s.at(rank, theirs, span=d), s.at(partner, theirs, span=d))
        for d in distances:
            mine = rank & ~(d - 1)
            s.copy(s.at(rank, mine, span=d), s.at(rank ^ d, mine, span=d))
