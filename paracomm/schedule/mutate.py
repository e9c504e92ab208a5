"""Wrong schedules on purpose, to measure how many of them `verify` catches.

A mutant that passes is not always a miss: two independent operations may swap places, and a broadcast may take another
rank that already holds the data as its source. What the numbers say decides, in an executor that shares nothing with
the proofs (`emulate.py`): if several random runs give the right result, the mutant is a correct schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ScheduleError
from .emulate import outcome
from .order import cells_of
from .registry import build, cases
from .schedule import DST_CHUNK, DST_RANK, FIRST_SCRATCH, SPAN, SRC_BUFFER, SRC_CHUNK, SRC_RANK, Schedule
from .symbolic import values_of
from .verify import verify

KINDS = ("drop", "swap", "redirect", "duplicate")
RUNS = 5


@dataclass(frozen=True)
class Verdict:
    """One mutant's fate.

    Attributes:
        fate: "caught" (verify raised), "reordered" (the same operations with the same results, in another order),
            "correct" (another schedule that computes the right result), or "missed".
        what: the mutation, for people.
    """

    kind: str
    fate: str
    what: str


def mutate(schedule: Schedule, kind: str, rng: np.random.Generator) -> tuple[Schedule, str]:
    """A copy with one operation (two for swap) changed, and what was done."""
    ops = schedule.ops.copy()
    i = int(rng.integers(len(ops)))
    if kind == "drop":
        return schedule.replaced(np.delete(ops, i, axis=0)), f"drop operation {i}"
    if kind == "duplicate":
        j = int(rng.integers(i, len(ops))) + 1
        return schedule.replaced(np.insert(ops, j, ops[i], axis=0)), f"repeat operation {i} before {j}"
    if kind == "swap":
        j = int(rng.integers(len(ops)))
        ops[[i, j]] = ops[[j, i]]
        return schedule.replaced(ops), f"swap operations {i} and {j}"
    end, column = ("source", SRC_RANK) if rng.integers(2) else ("destination", DST_RANK)
    limit = schedule.world_size
    room = schedule.chunks - int(ops[i, SPAN]) + 1
    if ops[i, SRC_BUFFER] < FIRST_SCRATCH and room > 1 and rng.integers(2):
        column = SRC_CHUNK if column == SRC_RANK else DST_CHUNK
        limit = room
    new = int(rng.integers(limit - 1))
    new += new >= int(ops[i, column])
    what = "chunk" if column in (SRC_CHUNK, DST_CHUNK) else "rank"
    ops[i, column] = new
    return schedule.replaced(ops), f"{what} of the {end} of operation {i} becomes {new}"


def judge(original: Schedule, mutant: Schedule, seed: int) -> str:
    """The fate of a mutant, see `Verdict`."""
    try:
        mutant.check()
        verify(mutant)
    except ScheduleError:
        return "caught"
    if any(outcome(mutant, seed + 2 * run) for run in range(RUNS)):
        return "missed"
    same_operations = np.array_equal(_sorted(original), _sorted(mutant))
    return "reordered" if same_operations and _results(original) == _results(mutant) else "correct"


def _sorted(schedule: Schedule) -> np.ndarray:
    return schedule.ops[np.lexsort(schedule.ops.T)]


def _results(schedule: Schedule) -> list[object]:
    """The expression of every user cell, as a tree that does not depend on numbering."""
    values, user = values_of(schedule), cells_of(schedule).user
    tree: dict[int, object] = {}
    for operands, number in values.nodes.items():
        tree[number] = hash(tuple(sorted(hash(tree.get(x, x)) for x in operands[:2]))
                            + tuple(hash(tree.get(x, x)) for x in operands[2:]))  # fmt: skip
    return [tree.get(x, x) for x in values.final[:user]]


def campaign(count: int, seed: int = 0, worlds: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 9)) -> list[Verdict]:
    """Judge `count` seeded mutants, drawn over kinds, world sizes, and algorithms."""
    rng = np.random.default_rng(seed)
    pool = {n: list(cases(n)) for n in worlds}
    verdicts: list[Verdict] = []
    while len(verdicts) < count:
        n = int(rng.choice(worlds))
        collective, name, root, params = pool[n][int(rng.integers(len(pool[n])))]
        original = build(collective, name, n, root, **params)
        if not len(original):
            continue
        kind = KINDS[len(verdicts) % len(KINDS)]
        mutant, what = mutate(original, kind, rng)
        if np.array_equal(original.ops, mutant.ops):
            continue
        fate = judge(original, mutant, int(rng.integers(1 << 30)))
        verdicts.append(Verdict(kind, fate, f"{collective} [{name}] world_size={n}: {what}"))
    return verdicts
