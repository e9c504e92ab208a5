"""One-shot: every rank sends all of its data to every other one, and each reduces all inputs by itself.

One step, for data so small that a step costs more than the bytes. All ranks add in the order of ranks, x0 + x1 + ...,
through an accumulator, so that all hold the same bits. 3 ranks:

    step     rank 0           rank 1           rank 2
    1        all>1 all>2      all>2 all>0      all>0 all>1
             acc = x0+x1+x2   acc = x0+x1+x2   acc = x0+x1+x2,  data = acc

1 step, S(n-1) bytes sent by each rank.
"""

from __future__ import annotations

import numpy as np

from ..registry import algorithm
from ..schedule import Schedule


@algorithm("all_reduce", "one_shot", steps=lambda n: min(1, n - 1), volume=lambda n: n - 1)
def all_reduce(s: Schedule) -> None:
    if s.world_size == 1:
        return
    for source in range(s.world_size):
        target = np.roll(s.ranks, -source)
        verb = s.copy if source == 0 else s.reduce
        verb(s.at(source), s.at(target, 0, "scratch"))
    s.copy(s.at(s.ranks, 0, "scratch"), s.at(s.ranks))
