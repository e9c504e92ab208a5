"""Double binary tree: two trees carry half of the data each, and no rank is an inner node of both.

Places 1..n form the in-order binary tree: the parent of a place whose lowest bit is b is the place b further or b
nearer, whichever is an odd multiple of 2b (further up if that lies beyond n). The odd places are leaves. Rank r has
place r+1 in the first tree and place r (rank 0: n) in the second, so that leaves and inner nodes change roles. 4 ranks:

    first tree      3              second tree    0
                    |                             |
                    1                             2
                   / \\                           / \\
                  0   2                         1   3

Each half goes up its tree being reduced, and down again, in pieces: while one piece goes down the next comes up.
Longest chain 2 floor(log2 n) transfers; each rank sends at most 2S (inner nodes: one message up, two down).
Source: Sanders, Speck and Traeff, Two-tree algorithms for full bandwidth broadcast, reduction and scan, 2009.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from ..registry import algorithm
from ..schedule import Schedule
from .tree import floor_log2

PIECES = 4


def parent_place(place: int, n: int) -> int:
    """0 for the root."""
    if place == 1 << floor_log2(n):
        return 0
    while True:
        low = place & -place
        place = place + low if place // low % 4 == 1 else place - low
        if place <= n:
            return place


def parents(n: int, tree: int) -> list[int]:
    """The parent of every rank, -1 for the root, in tree 0 or 1."""
    place = [r + 1 if tree == 0 else (r or n) for r in range(n)]
    rank_at = {p: r for r, p in enumerate(place)}
    return [rank_at.get(parent_place(p, n), -1) for p in place]


def most_sent(n: int, **_: int) -> Fraction:
    return {1: Fraction(0), 2: Fraction(1), 3: Fraction(3, 2)}.get(n, Fraction(2))


@algorithm(
    "all_reduce",
    "double_tree",
    chunks=lambda n, pieces=PIECES: 2 * pieces,
    steps=lambda n, **_: 2 * floor_log2(n),
    volume=most_sent,
    variants=lambda n: [{}, {"pieces": 1}],
)
def all_reduce(s: Schedule, pieces: int = PIECES) -> None:
    height = floor_log2(s.world_size)
    waves: list[list[tuple[int, int, int, int]]] = [[] for _ in range(2 * height + pieces)]
    for tree in (0, 1):
        parent = parents(s.world_size, tree)
        for rank, up in enumerate(parent):
            if up < 0:
                continue
            depth, above = 1, up
            while parent[above] >= 0:
                depth, above = depth + 1, parent[above]
            for piece in range(pieces):
                chunk = tree * pieces + piece
                waves[height - depth + piece].append((0, rank, up, chunk))
                waves[height + depth - 1 + piece].append((1, up, rank, chunk))
    for wave in waves:
        for way, verb in ((0, s.reduce), (1, s.copy)):
            hops = np.array([hop[1:] for hop in wave if hop[0] == way], np.int64).reshape(-1, 3)
            src, dst, chunks = hops.T
            verb(s.at(src, chunks), s.at(dst, chunks))
