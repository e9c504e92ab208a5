"""Bruck: all-gather, and its mirror image reduce-scatter, in ceil(log2 n) steps for every n.

After the step of distance d, rank r holds the blocks r to r+2d-1 (mod n). all_gather, 3 ranks, "b>p" meaning "sends
block b to rank p":

    step     rank 0     rank 1     rank 2
    1 (d=1)  0>2        1>0        2>1
    2 (d=2)  0>1        1>2        2>0

Blocks lie at their final places, so that a range that goes round n takes two messages instead of a rotation at the end.
S(n-1)/n bytes sent by each rank. ceil(log2 n) steps; in all_gather the last step of a small remainder does not wait for
the step before it, so that the longest chain is one shorter if n <= 3/4 of the next power of two; in reduce_scatter
the first two steps fall together if n is exactly that.
Source: Bruck, Ho, Kipnis, Upfal and Weathersby, Efficient algorithms for all-to-all communications, 1997.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..registry import algorithm, share
from ..schedule import Schedule
from .tree import blocks, ceil_log2


def longest_chain(n: int) -> int:
    rounds = ceil_log2(n)
    return rounds if n <= 2 or 4 * n > 3 * (1 << rounds) else rounds - 1


def longest_chain_back(n: int) -> int:
    rounds = ceil_log2(n)
    return rounds - int(4 * n == 3 * (1 << rounds))


def exchanges(n: int) -> Iterator[tuple[int, int, int, int]]:
    """(rank, the rank d below it, chunk, span): what all_gather sends, in its order."""
    d = 1
    while d < n:
        for rank in range(n):
            for chunk, span in blocks(rank, min(d, n - d), n):
                yield rank, (rank - d) % n, chunk, span
        d *= 2


@algorithm("all_gather", "bruck", chunks=lambda n: n, steps=longest_chain, volume=lambda n: share(n - 1, n))
def all_gather(s: Schedule) -> None:
    for rank, below, chunk, span in exchanges(s.world_size):
        s.copy(s.at(rank, chunk, span=span), s.at(below, chunk, span=span))


@algorithm("reduce_scatter", "bruck", chunks=lambda n: n, steps=longest_chain_back,
           volume=lambda n: share(n - 1, n))  # fmt: skip
def reduce_scatter(s: Schedule) -> None:
    for rank, below, chunk, span in reversed(list(exchanges(s.world_size))):
        s.reduce(s.at(below, chunk, span=span), s.at(rank, chunk, span=span))
