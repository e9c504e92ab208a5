"""Direct: every rank talks to every other one, in one step (two for all_reduce).

Rank c owns chunk c: everybody sends it there, the owner reduces all contributions in one pass and, in all_reduce, sends
the result back. Rank r begins with peer r+1, so that no peer is everybody's first. 3 ranks, "c>p" meaning "sends chunk
c to rank p":

    step     rank 0     rank 1     rank 2
    1 (+)    1>1 2>2    2>2 0>0    0>0 1>1
    2 (=)    0>1 0>2    1>2 1>0    2>0 2>1

Steps and bytes sent by each rank: 1 and S(n-1)/n for reduce_scatter, all_gather and all_to_all; 2 and 2S(n-1)/n for
all_reduce. With a root (S is the whole buffer): 1 step; broadcast: the root sends S(n-1); reduce: each rank sends S;
gather: each rank sends S/n; scatter: the root sends S(n-1)/n.
Source: Thakur, Rabenseifner and Gropp, Optimization of collective communication operations in MPICH, 2005 (section 4).
"""

from __future__ import annotations

from ..registry import algorithm, share
from ..schedule import Schedule


def one_step(n: int) -> int:
    return min(1, n - 1)


@algorithm("reduce_scatter", "direct", chunks=lambda n: n, steps=one_step, volume=lambda n: share(n - 1, n))
def reduce_scatter(s: Schedule) -> None:
    for step in range(1, s.world_size):
        peer = (s.ranks + step) % s.world_size
        s.reduce(s.at(s.ranks, peer), s.at(peer, peer))


@algorithm("all_gather", "direct", chunks=lambda n: n, steps=one_step, volume=lambda n: share(n - 1, n))
def all_gather(s: Schedule) -> None:
    for step in range(1, s.world_size):
        s.copy(s.at(s.ranks, s.ranks), s.at((s.ranks + step) % s.world_size, s.ranks))


@algorithm("all_reduce", "direct", chunks=lambda n: n, steps=lambda n: 2 * one_step(n),
           volume=lambda n: share(2 * (n - 1), n))  # fmt: skip
def all_reduce(s: Schedule) -> None:
    reduce_scatter(s)
    all_gather(s)


@algorithm("all_to_all", "direct", chunks=lambda n: n, steps=one_step, volume=lambda n: share(n - 1, n))
def all_to_all(s: Schedule) -> None:
    for step in range(s.world_size):
        peer = (s.ranks + step) % s.world_size
        s.copy(s.at(s.ranks, peer, "input"), s.at(peer, s.ranks, "output"))


@algorithm("broadcast", "direct", steps=one_step, volume=lambda n: n - 1)
def broadcast(s: Schedule) -> None:
    for step in range(1, s.world_size):
        s.copy(s.at(s.root), s.at((s.root + step) % s.world_size))


@algorithm("reduce", "direct", steps=one_step, volume=one_step)
def reduce(s: Schedule) -> None:
    for step in range(1, s.world_size):
        s.reduce(s.at((s.root + step) % s.world_size), s.at(s.root))


@algorithm("gather", "direct", chunks=lambda n: n, steps=one_step, volume=lambda n: share(one_step(n), n))
def gather(s: Schedule) -> None:
    for step in range(1, s.world_size):
        peer = (s.root + step) % s.world_size
        s.copy(s.at(peer, peer), s.at(s.root, peer))


@algorithm("scatter", "direct", chunks=lambda n: n, steps=one_step, volume=lambda n: share(n - 1, n))
def scatter(s: Schedule) -> None:
    for step in range(1, s.world_size):
        peer = (s.root + step) % s.world_size
        s.copy(s.at(s.root, peer), s.at(peer, peer))
