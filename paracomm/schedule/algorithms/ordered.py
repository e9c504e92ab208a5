"""Ordered: the sum of an element is the same expression in all_reduce and reduce_scatter, wherever the element lies.

Like direct, rank c owns chunk c, but every owner adds in the order of ranks, x0 + x1 + x2 + ..., where direct's owner c
begins with its own x_c. Cutting a buffer in other places, or reducing it where it was scattered before, then changes no
bit of a float. The first two addends commute, so that ranks 0 and 1 add into their data; the others into an
accumulator. 3 ranks, chunk c at rank c:

    step     rank 0               rank 1               rank 2
    1 (+)    1>1 2>2              2>2 0>0              0>0 1>1
             data = x0+x1+x2      data = x1+x0+x2      acc = x0+x1+x2, data = acc
    2 (=)    0>1 0>2              1>2 1>0              2>0 2>1                     all_reduce only

Between h hosts of equally many ranks the ranks of a host first add their own: (x0 + x1) + (x2 + x3) on 2 hosts of 2.
Local rank j of each host adds for the owners that are local rank j on any host, so that a host sends only S(h-1)/h to
others, and as much again in all_reduce. Hosts of different sizes are treated as one.

1 step for reduce_scatter and 2 for all_reduce on one host, S(n-1)/n bytes sent by each rank in each step; between hosts
of several ranks 2 and 4 steps. Source: direct, and BlueConnect (Cho et al., 2019) for the two levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..registry import algorithm
from ..schedule import Schedule
from .hierarchical import groups

Hosts = Sequence[int] | None


def levels(n: int, hosts: Hosts) -> list[list[int]]:
    """The ranks of each host, if there are several hosts of equally many ranks, more than one; else all as one host."""
    members = groups(n, [0] * n if hosts is None else hosts)
    two = len(members) > 1 and len({len(m) for m in members}) == 1 and len(members[0]) > 1
    return members if two else [list(range(n))]


def variants(n: int) -> list[dict[str, Any]]:
    """One host; two, and hosts of two ranks, as far as that is even."""
    found: list[dict[str, Any]] = [{}]
    if n % 2 == 0 and 4 <= n <= 32:
        found.append({"hosts": tuple(r * 2 // n for r in range(n))})
        found.append({"hosts": tuple(r % (n // 2) for r in range(n))})
    return found


def _steps(n: int, hosts: Hosts) -> int:
    return min(1, n - 1) + (len(levels(n, hosts)) > 1)


@algorithm("reduce_scatter", "ordered", chunks=lambda n, hosts=None: n,
           steps=lambda n, hosts=None: _steps(n, hosts), variants=variants)  # fmt: skip
def reduce_scatter(s: Schedule, hosts: Hosts = None) -> None:
    members = levels(s.world_size, hosts)
    if len(members) == 1:
        for owner in members[0]:
            _add(s, [s.at(rank, owner) for rank in members[0]], owner, owner)
        return
    for chunk in range(s.world_size):
        home = next(h for h, ranks in enumerate(members) if chunk in ranks)
        local = members[home].index(chunk)
        parts = []
        for ranks in members:
            part = s.at(ranks[local], home, "scratch_host")
            for rank in ranks:
                (s.copy if rank == ranks[0] else s.reduce)(s.at(rank, chunk), part)
            parts.append(part)
        for part in parts:
            (s.copy if part is parts[0] else s.reduce)(part, s.at(chunk, 0, "scratch_sum"))
        s.copy(s.at(chunk, 0, "scratch_sum"), s.at(chunk, chunk))


def _add(s: Schedule, addends: list[Any], owner: int, chunk: int) -> None:
    """data[chunk] of `owner` := the addends in their order, of which number `owner` is data[chunk] itself."""
    if owner < 2:
        for rank, addend in enumerate(addends):
            if rank != owner:
                s.reduce(addend, s.at(owner, chunk))
        return
    for rank, addend in enumerate(addends):
        (s.reduce if rank else s.copy)(addend, s.at(owner, 0, "scratch"))
    s.copy(s.at(owner, 0, "scratch"), s.at(owner, chunk))


@algorithm("all_reduce", "ordered", chunks=lambda n, hosts=None: n,
           steps=lambda n, hosts=None: 2 * _steps(n, hosts), variants=variants)  # fmt: skip
def all_reduce(s: Schedule, hosts: Hosts = None) -> None:
    reduce_scatter(s, hosts)
    members = levels(s.world_size, hosts)
    for chunk in range(s.world_size):
        home = next(h for h, ranks in enumerate(members) if chunk in ranks)
        local = members[home].index(chunk)
        for ranks in members:
            if chunk not in ranks:
                s.copy(s.at(chunk, chunk), s.at(ranks[local], chunk))
        for ranks in members:
            for step in range(1, len(ranks)):
                s.copy(s.at(ranks[local], chunk), s.at(ranks[(local + step) % len(ranks)], chunk))
