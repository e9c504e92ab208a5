"""Ring: every rank talks to its right neighbour only, and all links are busy all the time.

The data is cut into n chunks. In the reduce-scatter, chunk c starts at rank c+1 and travels right, gathering one more
contribution at every hop, until it is complete at rank c. In the all-gather it travels on, unchanged. 3 ranks,
reduce-scatter then all-gather, "c>" meaning "sends chunk c to the right":

    step     rank 0   rank 1   rank 2
    1 (+)      2>       0>       1>
    2 (+)      1>       2>       0>
    3 (=)      0>       1>       2>
    4 (=)      2>       0>       1>

Steps and bytes sent by each rank: n-1 and S(n-1)/n for each half, 2(n-1) and 2S(n-1)/n for all_reduce.
Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009.
"""

from __future__ import annotations

from ..registry import algorithm, share
from ..schedule import Schedule


@algorithm("reduce_scatter", "ring", chunks=lambda n: n, steps=lambda n: n - 1, volume=lambda n: share(n - 1, n))
def reduce_scatter(s: Schedule) -> None:
    n, rank = s.world_size, s.ranks
    for step in range(1, n):
        chunk = (rank - step) % n
        s.reduce(s.at(rank, chunk), s.at((rank + 1) % n, chunk))


@algorithm("all_gather", "ring", chunks=lambda n: n, steps=lambda n: n - 1, volume=lambda n: share(n - 1, n))
def all_gather(s: Schedule) -> None:
    n, rank = s.world_size, s.ranks
    for step in range(n - 1):
        chunk = (rank - step) % n
        s.copy(s.at(rank, chunk), s.at((rank + 1) % n, chunk))


@algorithm(
    "all_reduce", "ring", chunks=lambda n: n, steps=lambda n: 2 * (n - 1), volume=lambda n: share(2 * (n - 1), n)
)
def all_reduce(s: Schedule) -> None:
    reduce_scatter(s)
    all_gather(s)
