"""Binomial trees: the ranks that have the data double at every step.

Ranks are numbered from the root, v = (rank - root) mod n. The subtree of v + d under v, for d a power of two that v is
a multiple of 2d of, holds v+d to v+2d-1. broadcast, 4 ranks (reduce and gather are its mirror image, scatter sends down
the blocks of the subtree only):

    step     v=0     v=1     v=2     v=3
    1        >2
    2        >1              >3

Longest chain floor(log2 n) transfers, ceil(log2 n) steps if a rank sends one message at a time. Most bytes sent by a
rank: broadcast S ceil(log2 n), reduce S, scatter S(n-1)/n, gather what the largest subtree holds.
Source: Thakur, Rabenseifner and Gropp, Optimization of collective communication operations in MPICH, 2005.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..registry import algorithm, share
from ..schedule import Schedule


def floor_log2(n: int) -> int:
    return n.bit_length() - 1


def ceil_log2(n: int) -> int:
    return (n - 1).bit_length()


def largest_subtree(n: int) -> Fraction:
    top = 1 << ceil_log2(n) >> 1
    return share(max(n - top, top // 2) if n > 1 else 0, n)


def hops(s: Schedule) -> Iterator[tuple[int, NDArray[Any]]]:
    """(d, all v that have a child v + d), from the root down."""
    for k in reversed(range(ceil_log2(s.world_size))):
        d = 1 << k
        yield d, np.arange(0, s.world_size - d, 2 * d)


def blocks(first: int, count: int, n: int) -> Iterator[tuple[int, int]]:
    """(chunk, span) of `count` blocks from `first` on, which go round at n."""
    first %= n
    head = min(count, n - first)
    yield first, head
    if count > head:
        yield 0, count - head


@algorithm("broadcast", "binomial", steps=floor_log2, volume=ceil_log2)
def broadcast(s: Schedule) -> None:
    for d, v in hops(s):
        s.copy(s.at((v + s.root) % s.world_size), s.at((v + d + s.root) % s.world_size))


@algorithm("reduce", "binomial", steps=floor_log2, volume=lambda n: min(1, n - 1))
def reduce(s: Schedule) -> None:
    for d, v in reversed(list(hops(s))):
        s.reduce(s.at((v + d + s.root) % s.world_size), s.at((v + s.root) % s.world_size))


@algorithm("gather", "binomial", chunks=lambda n: n, steps=floor_log2, volume=largest_subtree)
def gather(s: Schedule) -> None:
    n, root = s.world_size, s.root
    for d, parents in reversed(list(hops(s))):
        for v in parents.tolist():
            for chunk, span in blocks(v + d + root, min(d, n - v - d), n):
                s.copy(s.at((v + d + root) % n, chunk, span=span), s.at((v + root) % n, chunk, span=span))


@algorithm("scatter", "binomial", chunks=lambda n: n, steps=floor_log2, volume=lambda n: share(n - 1, n))
def scatter(s: Schedule) -> None:
    n, root = s.world_size, s.root
    for d, parents in hops(s):
        for v in parents.tolist():
            for chunk, span in blocks(v + d + root, min(d, n - v - d), n):
                s.copy(s.at((v + root) % n, chunk, span=span), s.at((v + d + root) % n, chunk, span=span))
