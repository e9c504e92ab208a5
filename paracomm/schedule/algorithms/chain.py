"""Chain: the data goes from rank to rank in pieces, so that every link is busy once the first piece has passed.

Ranks are numbered from the root, v = (rank - root) mod n. broadcast, 3 ranks and 3 pieces, "c>" meaning "sends piece c
to v+1" (reduce is the mirror image, from the end of the chain to the root):

    time     v=0     v=1
    1        0>
    2        1>      0>
    3        2>      1>
    4                2>

Longest chain n-1 transfers; n-2+pieces steps of S/pieces bytes if a rank sends one message at a time; each rank sends
S. Source: Traeff, Ripke, Siebert, Balaji, Thakur and Gropp, A pipelined algorithm for large, irregular all-gather,
2010.
"""

from __future__ import annotations

import numpy as np

from ..registry import algorithm
from ..schedule import Schedule

PIECES = 8


def pieces_of(n: int, pieces: int = PIECES) -> int:
    return pieces


@algorithm(
    "broadcast",
    "chain",
    chunks=pieces_of,
    steps=lambda n, **_: n - 1,
    volume=lambda n, **_: min(1, n - 1),
    variants=lambda n: [{}, {"pieces": 1}],
)
def broadcast(s: Schedule, pieces: int = PIECES) -> None:
    n, root = s.world_size, s.root
    for time in range(n - 2 + pieces if n > 1 else 0):
        v = np.arange(max(0, time - pieces + 1), min(n - 1, time + 1))
        s.copy(s.at((v + root) % n, time - v), s.at((v + 1 + root) % n, time - v))


@algorithm(
    "reduce",
    "chain",
    chunks=pieces_of,
    steps=lambda n, **_: n - 1,
    volume=lambda n, **_: min(1, n - 1),
    variants=lambda n: [{}, {"pieces": 1}],
)
def reduce(s: Schedule, pieces: int = PIECES) -> None:
    n, root = s.world_size, s.root
    for time in range(n - 2 + pieces if n > 1 else 0):
        hop = np.arange(max(0, time - pieces + 1), min(n - 1, time + 1))
        v = n - 1 - hop
        s.reduce(s.at((v + root) % n, time - hop), s.at((v - 1 + root) % n, time - hop))
