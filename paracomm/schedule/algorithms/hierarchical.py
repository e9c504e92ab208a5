"""Hierarchical: reduce inside every host, all-reduce between hosts, and spread inside every host again.

The data is cut into slices, and every slice has one owner in each host, so that all ranks of a host share the work
between hosts. With h hosts a slice is cut into h chunks. 2 hosts (ranks 0 1 | 2 3), slices A and B of 2 chunks each:

    step     rank 0     rank 1     rank 2     rank 3
    1 (+)    B>1        A>0        B>3        A>2        inside: direct reduce-scatter
    2 (+)    A1>2       B1>3       A0>0       B0>1       between: ring over the hosts, chunk by chunk
    3 (=)    A0>2       B0>3       A1>0       B1>1
    4 (=)    A>1        B>0        A>3        B>2        inside: direct all-gather

2(h-1) steps between hosts ("ring"; 2 for "direct") and one before and after where hosts have several ranks. A host
sends 2S(h-1)/h bytes to other hosts, the least that is possible. Hosts may hold different numbers of ranks: slices then
are as many as the numbers' least common multiple, or the largest number where that gets out of hand (the work is then
uneven, the bytes between hosts are not).
Source: Cho, Finkler, Kung and Hunter, BlueConnect: decomposing all-reduce for deep learning, 2019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import InvalidArgument
from ..registry import algorithm
from ..schedule import Schedule

Hosts = Sequence[int] | None


def groups(n: int, hosts: Hosts = None, ranks_per_host: int | None = None) -> list[list[int]]:
    """The ranks of every host, in order of first appearance.

    Args:
        hosts: the host of every rank; names or numbers.
        ranks_per_host: instead of hosts: ranks 0 to ranks_per_host-1 on the first host, and so on (2 if neither is
        given).
    """
    if hosts is not None and ranks_per_host is not None:
        raise InvalidArgument("hosts and ranks_per_host exclude each other")
    if hosts is None:
        per_host = 2 if ranks_per_host is None else ranks_per_host
        if per_host < 1:
            raise InvalidArgument(f"ranks_per_host must be at least 1, got {per_host}")
        hosts = [r // per_host for r in range(n)]
    if len(hosts) != n:
        raise InvalidArgument(f"hosts must name the host of each of {n} ranks, got {len(hosts)}")
    members: dict[int, list[int]] = {}
    for rank, host in enumerate(hosts):
        members.setdefault(host, []).append(rank)
    return list(members.values())


def slices(members: list[list[int]]) -> int:
    sizes = [len(m) for m in members]
    common = math.lcm(*sizes)
    return common if common <= 4 * max(sizes) else max(sizes)


def chunk_count(n: int, hosts: Hosts = None, ranks_per_host: int | None = None, between: str = "ring") -> int:
    members = groups(n, hosts, ranks_per_host)
    return slices(members) * len(members)


def longest_chain(n: int, hosts: Hosts = None, ranks_per_host: int | None = None, between: str = "ring") -> int:
    """A chunk's way to the host where it is complete, then a slice's way to all; hosts of several ranks add a step."""
    inside = [int(len(m) > 1) for m in groups(n, hosts, ranks_per_host)]
    h = len(inside)
    if h == 1:
        return 2 * inside[0]
    if between == "direct":
        return 2 + 2 * max(inside)
    complete = []
    for c in range(h):
        level = inside[(c + 1) % h]
        for hop in range(2, h + 1):
            level = 1 + max(level, inside[(c + hop) % h])
        complete.append(level)
    return max(inside[i] + max(complete[c] + (i - c) % h for c in range(h)) for i in range(h))


def layouts(n: int) -> list[dict[str, Any]]:
    """Two ranks a host, and, at sizes where that is not slow: equal and unequal hosts, one host, one rank a host."""
    uneven = tuple(math.isqrt(2 * r) for r in range(n))
    more: list[dict[str, Any]] = [{"ranks_per_host": 4, "between": "direct"}, {"ranks_per_host": 1},
                                  {"ranks_per_host": n}]  # fmt: skip
    return [{}, {"hosts": uneven}] + (more if n <= 32 else [])


@algorithm("all_reduce", "hierarchical", chunks=chunk_count, steps=longest_chain, variants=layouts)
def all_reduce(s: Schedule, hosts: Hosts = None, ranks_per_host: int | None = None, between: str = "ring") -> None:
    if between not in ("ring", "direct"):
        raise InvalidArgument(f"between must be 'ring' or 'direct', got {between!r}")
    members = groups(s.world_size, hosts, ranks_per_host)
    count, h = slices(members), len(members)
    owner = np.array([[m[j % len(m)] for m in members] for j in range(count)])
    _inside(s, members, count, gather=False)
    (_ring if between == "ring" else _direct)(s, owner, count, h)
    _inside(s, members, count, gather=True)


def _inside(s: Schedule, members: list[list[int]], count: int, gather: bool) -> None:
    """Every rank sends the slices that it does not own to their owners in its host, or gets them from there."""
    h, j = len(members), np.arange(count)
    for ranks in map(np.array, members):
        for step in range(1, len(ranks)):
            owner = s.at(ranks[j % len(ranks)], j * h, span=h)
            other = s.at(ranks[(j - step) % len(ranks)], j * h, span=h)
            if gather:
                s.copy(owner, other)
            else:
                s.reduce(other, owner)


def _ring(s: Schedule, owner: np.ndarray, count: int, h: int) -> None:
    j, host = (x.ravel() for x in np.meshgrid(np.arange(count), np.arange(h), indexing="ij"))
    for verb, start in ((s.reduce, -1), (s.copy, 0)):
        for step in range(h - 1):
            chunk = j * h + (host - step + start) % h
            verb(s.at(owner[j, host], chunk), s.at(owner[j, (host + 1) % h], chunk))


def _direct(s: Schedule, owner: np.ndarray, count: int, h: int) -> None:
    j, host = (x.ravel() for x in np.meshgrid(np.arange(count), np.arange(h), indexing="ij"))
    for step in range(1, h):
        peer = (host + step) % h
        s.reduce(s.at(owner[j, host], j * h + peer), s.at(owner[j, peer], j * h + peer))
    for step in range(1, h):
        peer = (host + step) % h
        s.copy(s.at(owner[j, host], j * h + host), s.at(owner[j, peer], j * h + host))
