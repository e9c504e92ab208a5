"""What must come before what: levels, n-ary reductions, and writes that need no permission.

The level of an operation is the longest chain of transfers that ends in it. Every rank runs its operations by (level,
place in the list), so levels decide which messages are under way at the same time, and they are equal at both ends.

- A transfer's level is 1 + the highest level among the earlier operations that touch its regions (a read after a
  write, a write after a read or a write); an operation inside a rank takes that highest level itself.
- A copy and the reduces that follow it into the same region, with no read between, are one node (one n-ary reduction):
  all share the highest level that any of them needs. Where that would close a cycle, the run falls apart into single
  operations in the order of the list.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .schedule import (
    DATA,
    DST_BUFFER,
    DST_CHUNK,
    DST_RANK,
    FIRST_SCRATCH,
    INPUT,
    KIND,
    OUTPUT,
    REDUCE,
    SPAN,
    SRC_BUFFER,
    SRC_CHUNK,
    SRC_RANK,
    Schedule,
)  # fmt: skip


@dataclass(frozen=True)
class Cells:
    """Every chunk of every buffer of every rank, numbered; the cells of user buffers come first."""

    base: list[int]  #: first cell of a buffer
    width: list[int]  #: chunks of a buffer
    count: int
    user: int  #: cells below this one belong to data, input or output
    src: list[int]  #: first cell of each operation's source
    dst: list[int]

    def name(self, schedule: Schedule, cell: int) -> str:
        for buffer in range(len(self.base) - 1, -1, -1):
            if self.width[buffer] and cell >= self.base[buffer]:
                rank, chunk = divmod(cell - self.base[buffer], self.width[buffer])
                return schedule.ref_text(rank, buffer, chunk, 1)
        raise IndexError(cell)


def cells_of(schedule: Schedule) -> Cells:
    found: Cells = schedule.cached("cells", _cells)
    return found


def _cells(schedule: Schedule) -> Cells:
    ops, n = schedule.ops, schedule.world_size
    width = [0] * len(schedule.buffers)
    for buffer in (INPUT, OUTPUT) if schedule.collective == "all_to_all" else (DATA,):
        width[buffer] = schedule.chunks
    for buffer in range(FIRST_SCRATCH, len(width)):
        ends = [ops[ops[:, b] == buffer][:, [c, SPAN]].sum(axis=1)
                for b, c in ((SRC_BUFFER, SRC_CHUNK), (DST_BUFFER, DST_CHUNK))]  # fmt: skip
        width[buffer] = max((int(e.max()) for e in ends if len(e)), default=0)
    base = np.concatenate([[0], np.cumsum(np.array(width, np.int64) * n)])
    wide, low = np.array(width, np.int64), base[:-1]

    def first(rank: int, buffer: int, chunk: int) -> list[int]:
        b = ops[:, buffer]
        cells: list[int] = (low[b] + ops[:, rank] * wide[b] + ops[:, chunk]).tolist()
        return cells

    return Cells(low.tolist(), width, int(base[-1]), int(base[FIRST_SCRATCH]),
                 first(SRC_RANK, SRC_BUFFER, SRC_CHUNK), first(DST_RANK, DST_BUFFER, DST_CHUNK))  # fmt: skip


@dataclass(frozen=True)
class Order:
    level: list[int]  #: of each operation
    node: list[int]  #: of each operation; operations of one n-ary reduction share it
    early_write: list[bool]  #: of each operation: see `_early_writes`


def order_of(schedule: Schedule) -> Order:
    found: Order = schedule.cached("order", _order)
    return found


def _order(schedule: Schedule) -> Order:
    apart: set[int] = set()
    while True:
        node, deps = _dependencies(schedule, apart)
        level, cyclic = _levels(schedule, node, deps)
        if not cyclic:
            return Order([level[k] for k in node], node, _early_writes(schedule))
        apart |= cyclic


def _dependencies(schedule: Schedule, apart: set[int]) -> tuple[list[int], list[list[int]]]:
    """The node of each operation (the first operation of its run) and the nodes that it has to follow.

    Runs that begin with an operation in `apart` are not grouped.
    """
    cells, ops = cells_of(schedule), schedule.ops
    writer = [-1] * cells.count
    readers: list[list[int] | None] = [None] * cells.count
    region: dict[int, tuple[int, int]] = {}
    node: list[int] = []
    deps: list[list[int]] = []
    rows = zip(ops[:, KIND].tolist(), cells.src, cells.dst, ops[:, SPAN].tolist(), strict=True)
    for i, (kind, a, b, span) in enumerate(rows):
        here = i
        after: list[int] = []
        if kind == REDUCE:
            open_run = writer[b]
            if open_run >= 0 and open_run not in apart and region[open_run] == (b, span):
                whole = range(b, b + span)
                if all(writer[c] == open_run and not readers[c] for c in whole):
                    here = open_run
        if here == i:
            region[i] = (b, span)
            for c in range(b, b + span):
                if writer[c] >= 0:
                    after.append(writer[c])
                if readers[c]:
                    after += readers[c]  # type: ignore[arg-type]
                    readers[c] = None
                writer[c] = i
        for c in range(a, a + span):
            if writer[c] >= 0:
                after.append(writer[c])
            seen = readers[c]
            if seen is None:
                readers[c] = [here]
            else:
                seen.append(here)
        node.append(here)
        deps.append(after)
    return node, deps


def _levels(schedule: Schedule, node: list[int], deps: list[list[int]]) -> tuple[list[int], set[int]]:
    """Longest paths. The list is nearly a topological order: only a run that grows later needs another pass."""
    ops = schedule.ops
    weight = (ops[:, SRC_RANK] != ops[:, DST_RANK]).astype(int).tolist()
    level = [0] * len(node)
    members = [0] * len(node)
    for k in node:
        members[k] += 1
    turn = 0
    while True:
        changed = False
        for k, after, w in zip(node, deps, weight, strict=True):
            need = w + max([level[d] for d in after]) if after else w
            if need > level[k]:
                level[k] = need
                changed |= members[k] > 1
        if not changed:
            return level, set()
        turn += 1
        if turn == 4:
            cyclic = _cyclic_runs(node, deps)
            if cyclic:
                return level, cyclic


def _cyclic_runs(node: list[int], deps: list[list[int]]) -> set[int]:
    """Runs that are left when nodes without unfinished predecessors are taken away from both ends."""
    edges = {(d, k) for k, after in zip(node, deps, strict=True) for d in after}
    alive = set(node)
    for forward in (True, False):
        degree = dict.fromkeys(alive, 0)
        follow: dict[int, list[int]] = {k: [] for k in alive}
        for d, k in edges:
            if d in alive and k in alive:
                tail, head = (d, k) if forward else (k, d)
                degree[head] += 1
                follow[tail].append(head)
        free = [k for k, n in degree.items() if n == 0]
        while free:
            k = free.pop()
            alive.discard(k)
            for head in follow[k]:
                degree[head] -= 1
                if degree[head] == 0:
                    free.append(head)
    count = dict.fromkeys(alive, 0)
    for k in node:
        if k in alive:
            count[k] += 1
    return {k for k, c in count.items() if c > 1}


def _early_writes(schedule: Schedule) -> list[bool]:
    """Copies whose sender knows, from its own order alone, that nothing uses the destination any more.

    That is so if every earlier access of the destination was a message from it to the sender, or from the sender into
    it (which then was an early write as well). The space that a crossing reduce arrives in is new: always early.
    """
    cells, ops = cells_of(schedule), schedule.ops
    untouched, mixed = -1, -2
    partner = [untouched] * cells.count
    early: list[bool] = []
    rows = zip(ops[:, [KIND, SRC_RANK, DST_RANK, SPAN]].tolist(), cells.src, cells.dst, strict=True)
    for (kind, sr, dr, span), a, b in rows:
        local = sr == dr
        first = not local and kind != REDUCE
        if first:
            for c in range(b, b + span):
                if partner[c] != untouched and partner[c] != sr:
                    first = False
        early.append(first or (kind == REDUCE and not local))
        for c in range(a, a + span):
            partner[c] = mixed if local or (partner[c] != untouched and partner[c] != dr) else dr
        for c in range(b, b + span):
            partner[c] = sr if first else mixed
    return early
