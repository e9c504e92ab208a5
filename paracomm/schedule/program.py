"""Projection: one rank's share of a schedule as send, recv, reduce and copy, in the order in which it must run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidArgument
from .order import cells_of, order_of
from .schedule import (
    DST_BUFFER,
    DST_CHUNK,
    DST_RANK,
    FIRST_SCRATCH,
    KIND,
    REDUCE,
    SPAN,
    SRC_BUFFER,
    SRC_CHUNK,
    SRC_RANK,
    IntArray,
    Schedule,
)  # fmt: skip
from .symbolic import fault, values_of

AnyArray = NDArray[Any]

SEND, RECV, REDUCE_OP, COPY_OP = range(4)
KIND_NAMES = ("send", "recv", "reduce", "copy")
BUFFER_NAMES = ("data", "input", "output", "scratch")
SCRATCH = 3
OP_COLUMNS = (
    "kind", "src_buffer", "src_chunk", "src_span", "dst_buffer", "dst_chunk", "dst_span", "peer", "level", "final",
    "early_write", "size_chunk",
)  # fmt: skip
(OP_KIND, OP_SRC_BUFFER, OP_SRC_CHUNK, OP_SRC_SPAN, OP_DST_BUFFER, OP_DST_CHUNK, OP_DST_SPAN, OP_PEER, OP_LEVEL,
 OP_FINAL, OP_EARLY_WRITE, OP_SIZE_CHUNK) = range(12)  # fmt: skip


@dataclass(frozen=True)
class Program:
    """One rank's share of a schedule.

    Attributes:
        ops: int32 [n_ops, 12], columns `OP_COLUMNS`, in the order (level, place in the schedule). A send's destination
            is the region at the peer, a recv's source the one at the peer. A reduce across ranks is a recv into scratch
            and the reduce after it. size_chunk is the chunk of data (for all_to_all of input for what this rank sends,
            of output for what it receives) whose size the first chunk of the operation has.
        scratch_chunks: chunks of scratch that the rank uses, each of the size of the largest chunk of data.
        root: -1 if the collective has none.
        volume: the most chunks that any rank sends.
        levels: the highest level of any operation of any rank.
        pair_depth: the most chunks that one rank sends to one other at one level.
        index: int32 [n_ops], the place in the schedule that each operation comes from.
    """

    name: str
    collective: str
    rank: int
    world_size: int
    root: int
    chunks: int
    scratch_chunks: int
    volume: int
    levels: int
    pair_depth: int
    fingerprint: int
    ops: IntArray
    index: IntArray

    def __str__(self) -> str:
        lines = [f"{self.collective} [{self.name}] rank {self.rank} of {self.world_size}"]
        for op in self.ops.tolist():
            src = f"{BUFFER_NAMES[op[1]]}[{op[2]}:{op[2] + op[3]}]"
            dst = f"{BUFFER_NAMES[op[4]]}[{op[5]}:{op[5] + op[6]}]"
            peer = f" {'to' if op[0] == SEND else 'from'} rank {op[7]}" if op[7] >= 0 else ""
            flags = " final" * op[9] + " early_write" * op[10]
            lines.append(f"{op[8]:4d}  {KIND_NAMES[op[0]]:6s} {src} -> {dst}{peer}{flags}")
        return "\n".join(lines)


def project(schedule: Schedule, rank: int) -> Program:
    """The program of `rank`.

    Raises:
        InvalidArgument: no such rank.
        ScheduleError: the schedule reads what is not there, counts twice, or moves between unequal sizes.
    """
    if not 0 <= rank < schedule.world_size:
        raise InvalidArgument(f"rank must be in 0..{schedule.world_size - 1}, got {rank}")
    found: Program = project_all(schedule)[rank]
    return found


def project_all(schedule: Schedule) -> list[Program]:
    """The programs of all ranks."""
    found: list[Program] = schedule.cached("programs", _project_all)
    return found


def _project_all(schedule: Schedule) -> list[Program]:
    ops, n = schedule.ops, schedule.world_size
    rows, owner, index, scratch = _expand(schedule)
    by_rank = np.lexsort((index, rows[:, OP_LEVEL], owner))
    rows, index = rows[by_rank], index[by_rank]
    bounds = np.searchsorted(owner[by_rank], np.arange(n + 1))
    crossing = ops[:, SRC_RANK] != ops[:, DST_RANK]
    level = np.array(order_of(schedule).level, np.int64)
    sent = np.bincount(ops[crossing, SRC_RANK], weights=ops[crossing, SPAN], minlength=n)
    pair = ops[crossing, SRC_RANK].astype(np.int64) * n + ops[crossing, DST_RANK]
    _, group = np.unique(pair * (level.max(initial=0) + 1) + level[crossing], return_inverse=True)
    depth = np.bincount(group, weights=ops[crossing, SPAN]).max(initial=0)
    return [
        Program(
            name=schedule.name,
            collective=schedule.collective,
            rank=r,
            world_size=n,
            root=schedule.root,
            chunks=schedule.chunks,
            scratch_chunks=int(scratch[r]),
            volume=int(sent.max()),
            levels=int(level.max(initial=0)),
            pair_depth=int(depth),
            fingerprint=schedule.fingerprint,
            ops=rows[lo:hi],
            index=index[lo:hi],
        )
        for r, (lo, hi) in enumerate(pairwise(bounds.tolist()))
    ]


def _expand(schedule: Schedule) -> tuple[IntArray, IntArray, IntArray, AnyArray]:
    """Every rank's operations, unsorted: rows, owner, place in the schedule; and each rank's chunks of scratch.

    Rows of one place keep the order recv, reduce under a stable sort.
    """
    ops, order, values = schedule.ops, order_of(schedule), values_of(schedule)
    src_chunk, dst_chunk, scratch = _number_scratch(schedule)
    where = np.arange(len(ops), dtype=np.int32)
    crossing = ops[:, SRC_RANK] != ops[:, DST_RANK]
    reduces = ops[:, KIND] == REDUCE
    arrival = crossing & reduces
    # A crossing reduce arrives in new chunks at the end of its rank's scratch.
    landing = np.zeros(len(ops), np.int64)
    for r in range(schedule.world_size):
        mine = arrival & (ops[:, DST_RANK] == r)
        spans = ops[mine, SPAN]
        landing[mine] = scratch[r] + np.cumsum(spans) - spans
        scratch[r] += spans.sum()
    level = np.array(order.level, np.int32)
    early = np.array(order.early_write, np.int32)
    size_src, size_dst = _size_chunks(schedule, np.array(values.size, np.int64))
    src = np.stack([np.minimum(ops[:, SRC_BUFFER], SCRATCH), src_chunk, ops[:, SPAN]], axis=1)
    dst = np.stack([np.minimum(ops[:, DST_BUFFER], SCRATCH), dst_chunk, ops[:, SPAN]], axis=1)
    land = np.where(arrival[:, None], np.stack([np.full_like(landing, SCRATCH), landing, ops[:, SPAN]], axis=1), dst)
    nothing = np.zeros(len(ops), np.int32)
    final = np.array(values.complete, np.int32)

    def rows(
        kind: int, pick: AnyArray, source: AnyArray, target: AnyArray, peer: AnyArray, *rest: AnyArray
    ) -> IntArray:
        kinds = np.full(len(ops), kind)
        return np.column_stack([kinds, source, target, peer, level, *rest])[pick].astype(np.int32)

    alone = np.full(len(ops), -1)
    parts = [
        (rows(SEND, crossing, src, land, ops[:, DST_RANK], nothing, early, size_src), ops[:, SRC_RANK], crossing),
        (rows(RECV, crossing, src, land, ops[:, SRC_RANK], nothing, early, size_dst), ops[:, DST_RANK], crossing),
        (rows(REDUCE_OP, arrival, land, dst, alone, final, nothing, size_dst), ops[:, DST_RANK], arrival),
        (rows(REDUCE_OP, reduces & ~crossing, src, dst, alone, final, nothing, size_dst), ops[:, DST_RANK],
         reduces & ~crossing),
        (rows(COPY_OP, ~reduces & ~crossing, src, dst, alone, nothing, nothing, size_dst), ops[:, DST_RANK],
         ~reduces & ~crossing),
    ]  # fmt: skip
    return (np.concatenate([p[0] for p in parts]), np.concatenate([p[1][p[2]] for p in parts]),
            np.concatenate([where[p[2]] for p in parts]), scratch)  # fmt: skip


def _number_scratch(schedule: Schedule) -> tuple[AnyArray, AnyArray, AnyArray]:
    """Chunk numbers with each rank's named scratch buffers laid one after the other, unused chunks left out."""
    ops, cells = schedule.ops, cells_of(schedule)
    count = np.zeros(schedule.world_size, np.int64)
    used = np.zeros(cells.count + 1, np.bool_)
    for first in (cells.src, cells.dst):
        start = np.array(first, np.int64)
        for k in range(int(ops[:, SPAN].max(initial=0))):
            used[(start + k)[ops[:, SPAN] > k]] = True
    used[: cells.user] = False
    number = np.zeros(cells.count + 1, np.int64)
    for buffer in range(FIRST_SCRATCH, len(cells.width)):
        width = cells.width[buffer]
        for r in range(schedule.world_size):
            lo = cells.base[buffer] + r * width
            here = used[lo : lo + width]
            number[lo : lo + width] = count[r] + np.cumsum(here) - here
            count[r] += here.sum()
    src, dst = np.array(cells.src, np.int64), np.array(cells.dst, np.int64)
    return (np.where(src >= cells.user, number[src], ops[:, SRC_CHUNK]),
            np.where(dst >= cells.user, number[dst], ops[:, DST_CHUNK]), count)  # fmt: skip


def _size_chunks(schedule: Schedule, size: AnyArray) -> tuple[AnyArray, AnyArray]:
    """The size number of each operation in the terms of its source's and its destination's rank."""
    if schedule.collective != "all_to_all":
        return size, size
    chunks, n = schedule.chunks, schedule.world_size
    sender, block = np.divmod(size, chunks)
    receiver, part = np.divmod(block, chunks // n)
    at_receiver = sender * (chunks // n) + part
    ops = schedule.ops
    foreign = (sender != ops[:, SRC_RANK]) | (receiver != ops[:, DST_RANK])
    if foreign.any():
        fault(schedule, "all_to_all blocks must go straight from sender to receiver", int(np.argmax(foreign)))
    return block, at_receiver
