"""Dissemination barrier: in the step of distance d every rank tells rank r+d what it has heard of.

The chunk has no bytes; "reduce" here joins what two ranks have heard of, and the schedule is right if every rank has
heard, in the end, of every other one. 4 ranks:

    step     rank 0   rank 1   rank 2   rank 3
    1        >1       >2       >3       >0
    2        >2       >3       >0       >1

ceil(log2 n) steps, as many messages without bytes sent by each rank.
Source: Hensgen, Finkel and Manber, Two algorithms for barrier synchronization, 1988.
"""

from __future__ import annotations

from ..registry import algorithm
from ..schedule import Schedule
from .tree import ceil_log2


@algorithm("barrier", "dissemination", steps=ceil_log2, volume=ceil_log2)
def barrier(s: Schedule) -> None:
    rank = s.ranks
    for k in range(ceil_log2(s.world_size)):
        s.copy(s.at(rank), s.at((rank + (1 << k)) % s.world_size, k, "scratch"))
        s.reduce(s.at(rank, k, "scratch"), s.at(rank))
