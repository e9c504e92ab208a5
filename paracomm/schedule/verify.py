"""Proof that a schedule does what its collective means, on every interleaving that the executor may take.

1. Values: executed on expressions in the order of the list (`symbolic.py`), every contribution enters exactly once,
   nothing undefined is read, results are where the collective wants them, and replicas hold the same expression, so the
   same bits.
2. Nothing is wasted: no operation that changes nothing or that no result needs.
3. Order: in each rank's program every pair of accesses to a chunk, one of them a write, is in the order of the list,
   and an early write's sender has proof that the chunk is free. All memory of a rank is touched by its own program or
   by early writes, so that this is happens-before for all conflicts: no race.
4. Deadlock: messages of a pair leave and arrive in the same order, no level holds more than half of the FIFO, and a
   replay in which every rank runs strictly in order, with that FIFO, comes to an end.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from .collectives import meaning_of
from .order import cells_of, order_of
from .program import (
    COPY_OP,
    OP_DST_BUFFER,
    OP_DST_CHUNK,
    OP_DST_SPAN,
    OP_EARLY_WRITE,
    OP_KIND,
    OP_PEER,
    OP_SRC_BUFFER,
    OP_SRC_CHUNK,
    OP_SRC_SPAN,
    RECV,
    REDUCE_OP,
    SCRATCH,
    SEND,
    Program,
    project_all,
)  # fmt: skip
from .schedule import DST_RANK, SRC_RANK, Schedule
from .symbolic import describe_expression, fault, values_of

FIFO_DEPTH = 64


def verify(schedule: Schedule, fifo_depth: int = FIFO_DEPTH) -> None:
    """Prove the schedule, or say what is wrong with it.

    Args:
        fifo_depth: messages that may be under way from one rank to another.

    Raises:
        ScheduleError: with the operations around the fault and an arrow at it, and the table if the schedule is small.
    """
    check_result(schedule)
    check_waste(schedule)
    programs = project_all(schedule)
    check_order(schedule, programs)
    check_depth(schedule, fifo_depth)
    replay(schedule, programs, fifo_depth)


def prove(schedule: Schedule) -> None:
    """verify(), once for each schedule; not for those that come with the package. Raises as verify()."""
    if not schedule.shipped:
        schedule.cached("proof", _proof)


def _proof(schedule: Schedule) -> bool:
    schedule.check()
    verify(schedule)
    return True


def check_result(schedule: Schedule) -> None:
    """Every required chunk holds the right value, and the same expression on every rank."""
    meaning, values, cells = meaning_of(schedule), values_of(schedule), cells_of(schedule)
    final = np.array(values.final[: cells.user], np.int64)
    if not meaning.reducing:
        wrong = meaning.required & (final != meaning.source)
        if wrong.any():
            cell = int(np.argmax(wrong))
            has = "nothing" if final[cell] < 0 else f"the input of {cells.name(schedule, int(final[cell]))}"
            want = cells.name(schedule, int(meaning.source[cell]))
            fault(schedule, f"{cells.name(schedule, cell)} must hold the input of {want} in the end, and holds {has}",
                  _last_writer(schedule, cell))  # fmt: skip
        return
    masks = contributions(schedule)
    everyone = (1 << schedule.world_size) - 1
    first: dict[int, int] = {}
    for cell in np.flatnonzero(meaning.required).tolist():
        number = int(final[cell])
        if masks[number] != everyone:
            missing = [r for r in range(schedule.world_size) if not masks[number] >> r & 1]
            fault(schedule, f"{cells.name(schedule, cell)} lacks the contribution of rank {missing} in the end",
                  _last_writer(schedule, cell))  # fmt: skip
        twin = first.setdefault(int(meaning.size[cell]), cell)
        if final[twin] != number and schedule.collective != "barrier":
            fault(
                schedule,
                f"{cells.name(schedule, cell)} = {describe_expression(values, schedule, number)}, but "
                f"{cells.name(schedule, twin)} = {describe_expression(values, schedule, int(final[twin]))}: "
                "replicas could differ in their last bits",
                _last_writer(schedule, cell),
            )


def contributions(schedule: Schedule) -> dict[int, int]:
    """Expression -> bit set of the ranks whose input is in it."""
    values, user = values_of(schedule), cells_of(schedule).user
    masks = {cell: 1 << cell // schedule.chunks for cell in range(user)}
    for operands, number in values.nodes.items():
        total = 0
        for operand in operands:
            total |= masks[operand]
        masks[number] = total
    return masks


def _last_writer(schedule: Schedule, cell: int) -> int | None:
    span = schedule.ops[:, -1]
    first = np.array(cells_of(schedule).dst, np.int64)
    hits = np.flatnonzero((first <= cell) & (cell < first + span))
    return int(hits[-1]) if len(hits) else None


def check_waste(schedule: Schedule) -> None:
    """No operation leaves everything as it was, and none writes what nobody needs."""
    for op, why in values_of(schedule).wasted:
        fault(schedule, f"wasted operation: {why}", op)


def check_order(schedule: Schedule, programs: list[Program]) -> None:
    """Conflicting accesses keep the order of the list in every program, and early writes are proved free."""
    rows = np.concatenate([p.ops for p in programs])
    if not len(rows):
        return
    index = np.concatenate([p.index for p in programs]).astype(np.int64)
    owner = np.repeat(np.arange(len(programs)), [len(p.ops) for p in programs])
    kind = rows[:, OP_KIND]
    early = (rows[:, OP_EARLY_WRITE] == 1) & (kind == RECV)
    partner = np.where((kind == SEND) | early, rows[:, OP_PEER], len(programs))
    moment = 2 * index + ((kind == REDUCE_OP) | (kind == COPY_OP))
    parts = []
    for picks, buffer, chunk, span, writing in (
        (kind != RECV, OP_SRC_BUFFER, OP_SRC_CHUNK, OP_SRC_SPAN, False),
        (kind != SEND, OP_DST_BUFFER, OP_DST_CHUNK, OP_DST_SPAN, True),
    ):
        which = np.flatnonzero(picks)
        spans = rows[which, span].astype(np.int64)
        offset = np.arange(int(spans.sum())) - np.repeat(np.cumsum(spans) - spans, spans)
        which = np.repeat(which, spans)
        wide = int(rows[:, [OP_SRC_CHUNK, OP_DST_CHUNK]].max()) + int(spans.max(initial=0)) + 1
        parts.append((which, rows[which, buffer], rows[which, chunk] + offset, np.full(len(which), writing), wide))
    wide = max(p[4] for p in parts)
    which = np.concatenate([p[0] for p in parts])
    cell = (owner[which] * (SCRATCH + 1) + np.concatenate([p[1] for p in parts])) * wide
    cell = cell + np.concatenate([p[2] for p in parts])
    writes = np.concatenate([p[3] for p in parts])
    _, cell = np.unique(cell, return_inverse=True)
    _conflicts_in_order(schedule, cell, which, moment[which], writes, index)
    _early_writes_free(schedule, cell, moment[which], partner[which], writes & early[which], index[which])


def _conflicts_in_order(
    schedule: Schedule,
    cell: NDArray[np.int64],
    position: NDArray[np.int64],
    moment: NDArray[np.int64],
    writes: NDArray[np.bool_],
    index: NDArray[np.int64],
) -> None:
    by = np.lexsort((writes, position, cell))
    cell, moment, writes, position = cell[by], moment[by], writes[by], position[by]
    base = cell * (int(moment.max()) + 2)
    newest = np.maximum.accumulate(base + moment + 1)
    newest_write = np.maximum.accumulate(base + np.where(writes, moment + 1, 0))
    before = np.where(writes, np.r_[0, newest[:-1]], np.r_[0, newest_write[:-1]]) - base
    wrong = before > moment + 1
    if wrong.any():
        at = int(np.argmax(wrong))
        fault(schedule, "its rank runs it after a later operation on the same chunk", int(index[position[at]]))


def _early_writes_free(
    schedule: Schedule,
    cell: NDArray[np.int64],
    moment: NDArray[np.int64],
    partner: NDArray[np.int32],
    early: NDArray[np.bool_],
    index: NDArray[np.int64],
) -> None:
    by = np.lexsort((moment, cell))
    cell, partner, early, index = cell[by], partner[by].astype(np.int64), early[by], index[by]
    wide = int(partner.max()) + 2
    highest = np.maximum.accumulate(cell * wide + partner) - cell * wide
    lowest = np.minimum.accumulate(partner - cell * wide) + cell * wide
    wrong = early & ((highest != partner) | (lowest != partner))
    if wrong.any():
        fault(schedule, "an early write into a chunk that others may still use", int(index[int(np.argmax(wrong))]))


def check_depth(schedule: Schedule, fifo_depth: int) -> None:
    """At most half of a FIFO's messages at one level, so that a rank can be a level ahead of its peer."""
    ops = schedule.ops
    crossing = np.flatnonzero(ops[:, SRC_RANK] != ops[:, DST_RANK])
    if not len(crossing):
        return
    level = np.array(order_of(schedule).level, np.int64)[crossing]
    pair = ops[crossing, SRC_RANK].astype(np.int64) * schedule.world_size + ops[crossing, DST_RANK]
    key = pair * (int(level.max()) + 1) + level
    _, first, count = np.unique(key, return_index=True, return_counts=True)
    if count.max() > fifo_depth // 2:
        worst = int(np.argmax(count))
        fault(
            schedule,
            f"{count[worst]} messages from one rank to another at one level, and a FIFO of {fifo_depth} allows "
            f"{fifo_depth // 2}: use fewer chunks",
            int(crossing[first[worst]]),
        )


def replay(schedule: Schedule, programs: list[Program], fifo_depth: int = FIFO_DEPTH) -> None:
    """Run all programs, each strictly in order, over FIFOs of that depth: a rank waits if one is full or empty.

    Raises:
        ScheduleError: all ranks wait, or a message is not the one that its receiver expects.
    """
    n = len(programs)
    todo = []
    for p in programs:
        moves = p.ops[:, OP_KIND] <= RECV
        todo.append(list(zip(*(x.tolist() for x in (p.ops[moves, OP_KIND], p.ops[moves, OP_PEER], p.index[moves])),
                             strict=True)))  # fmt: skip
    done = [0] * n
    fifos: dict[int, deque[int]] = {}
    ready = list(range(n))
    waiting: set[int] = set()
    while ready:
        rank = ready.pop()
        program, i = todo[rank], done[rank]
        while i < len(program):
            kind, peer, index = program[i]
            if kind == SEND:
                fifo = fifos.setdefault(rank * n + peer, deque())
                if len(fifo) >= fifo_depth:
                    break
                fifo.append(index)
            else:
                arrived = fifos.get(peer * n + rank)
                if not arrived:
                    break
                found = arrived.popleft()
                if found != index:
                    fault(
                        schedule, f"rank {rank} expects the message of operation {index}, gets that of {found}", index
                    )
            if peer in waiting:
                waiting.discard(peer)
                ready.append(peer)
            i += 1
        done[rank] = i
        if i < len(program):
            waiting.add(rank)
    if waiting:
        stuck = ", ".join(f"rank {r} at operation {todo[r][done[r]][2]}" for r in sorted(waiting)[:8])
        fault(schedule, f"deadlock at FIFO depth {fifo_depth}: {stuck}", min(todo[r][done[r]][2] for r in waiting))
