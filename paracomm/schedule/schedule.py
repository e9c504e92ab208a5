"""The two-verb language: a schedule is one global list of `copy` and `reduce` between regions of ranks' buffers.

The order of the list is the meaning: an operation sees everything that was written before it. What may run at the same
time follows from the overlap of regions, and is derived later (`order.py`); an author never writes a round or a tag.

    s = Schedule("broadcast", world_size=3)
    s.copy(s.at(0), s.at(1))
    s.copy(s.at(1), s.at(2))

Refs may hold arrays of ranks and chunks, so that one call writes a whole step of a symmetric algorithm:

    rank = s.ranks
    s.reduce(s.at(rank, rank), s.at((rank + 1) % n, rank))
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple, Union

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidArgument, ScheduleError

Index = Union[int, "NDArray[Any]"]
IntArray = NDArray[np.int32]

COLLECTIVES = (
    "all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter",
    "all_to_all", "gather", "scatter", "barrier",
)  # fmt: skip
ROOTED = frozenset({"reduce", "broadcast", "gather", "scatter"})
REDUCING = frozenset({"all_reduce", "reduce", "reduce_scatter", "barrier"})
BLOCKED = frozenset({"all_gather", "gather", "scatter", "reduce_scatter", "all_to_all"})

COPY, REDUCE = 0, 1
DATA, INPUT, OUTPUT, FIRST_SCRATCH = 0, 1, 2, 3
# Columns of an operation, as kept in Schedule.ops.
KIND, SRC_RANK, SRC_BUFFER, SRC_CHUNK, DST_RANK, DST_BUFFER, DST_CHUNK, SPAN = range(8)


class Ref(NamedTuple):
    """`span` chunks of a rank's buffer, from `chunk` on; rank and chunk may be arrays (one entry an operation)."""

    rank: Index
    buffer: str
    chunk: Index
    span: Index = 1


MOST = 1 << 20
"""Ranks and chunks that a schedule may have: the core counts no further."""


def _count(what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= MOST:
        raise InvalidArgument(f"{what} must be a whole number from 1 to {MOST}, got {value!r}")
    return int(value)


class Schedule:
    """A collective algorithm as data.

    Buffers: "data" starts as the input and ends as the output; all_to_all has "input" and "output" instead; every other
    name that starts with "scratch" is a rank's own space, undefined at the start. A chunk of scratch takes the size of
    what is copied into it.

    Args:
        collective: one of `COLLECTIVES`.
        world_size: number of ranks, >= 1.
        chunks: number of chunks of data (of input and output for all_to_all). Collectives made of blocks, one for each
            rank, need a multiple of world_size; block b is then chunks b*k to (b+1)*k-1.
        root: the root's rank for broadcast, reduce, gather and scatter (0 if not given).

    Raises:
        InvalidArgument: the arguments do not fit each other.
    """

    def __init__(
        self, collective: str, world_size: int, chunks: int = 1, root: int | None = None, name: str = "custom"
    ) -> None:
        if collective not in COLLECTIVES:
            raise InvalidArgument(f"unknown collective {collective!r}: expected one of {', '.join(COLLECTIVES)}")
        world_size, chunks = _count("world_size", world_size), _count("chunks", chunks)
        if collective in BLOCKED and chunks % world_size:
            raise InvalidArgument(f"{collective} needs chunks in multiples of world_size {world_size}, got {chunks}")
        if collective in ROOTED:
            root = 0 if root is None else root
            if not 0 <= root < world_size:
                raise InvalidArgument(f"root must be in 0..{world_size - 1}, got {root}")
        elif root is not None:
            raise InvalidArgument(f"{collective} has no root, got {root}")
        self.collective = collective
        self.world_size = world_size
        self.chunks = chunks
        self.root = -1 if root is None else root
        self.name = name
        self.buffers: list[str] = ["data", "input", "output"]
        self.ranks: NDArray[np.int64] = np.arange(world_size)
        self._buffer_ids = {b: i for i, b in enumerate(self.buffers)}
        self._batches: list[IntArray] = []
        self._ops: IntArray | None = None
        self._frozen = False
        self.shipped = False
        """True: by an algorithm of this package, which its tests prove for every world."""
        self._cache: dict[str, Any] = {}

    def at(self, rank: Index, chunk: Index = 0, buffer: str = "data", span: Index = 1) -> Ref:
        """The region of `span` chunks from `chunk` on in `buffer` of `rank`."""
        return Ref(rank, buffer, chunk, span)

    def copy(self, src: Ref, dst: Ref) -> None:
        """dst := src."""
        self._append(COPY, src, dst)

    def reduce(self, src: Ref, dst: Ref) -> None:
        """dst := dst + src, where + is the operation of the call (sum, max, ...).

        Reduces into one region in a row, with no read of it between them, are one reduction of many operands, in the
        order of the list, which rounds once.
        """
        self._append(REDUCE, src, dst)

    @property
    def ops(self) -> IntArray:
        """int32 [n_ops, 8]: kind, source rank, buffer, chunk, destination rank, buffer, chunk, span."""
        if self._ops is None:
            self._ops = np.concatenate(self._batches) if self._batches else np.zeros((0, 8), np.int32)
        return self._ops

    @property
    def batches(self) -> list[IntArray]:
        """The operations as they were written, one array a call of a verb."""
        return self._batches

    def check(self) -> None:
        """Raise ScheduleError if an operation names what does not exist or overlaps itself."""
        if len(self.ops):
            self._check(self.ops)

    def freeze(self) -> Schedule:
        """Forbid further operations (built schedules are shared)."""
        self._frozen = True
        self.ops.flags.writeable = False
        return self

    def replaced(self, ops: IntArray) -> Schedule:
        """The same header over other operations (for mutants and transformations)."""
        other = Schedule(self.collective, self.world_size, self.chunks, None if self.root < 0 else self.root, self.name)
        other.buffers = list(self.buffers)
        other._buffer_ids = dict(self._buffer_ids)
        other._ops = np.ascontiguousarray(ops, dtype=np.int32)
        other._batches = [other._ops] if len(other._ops) else []
        return other

    def cached(self, key: str, make: Any) -> Any:
        """make(self), once, until another operation is added."""
        if key not in self._cache:
            self._cache[key] = make(self)
        return self._cache[key]

    @property
    def fingerprint(self) -> int:
        """uint32 over the header and all operations: ranks that hold equal schedules agree on it."""
        return int(self.cached("fingerprint", Schedule._crc))

    def _crc(self) -> int:
        header = f"{self.collective} {self.world_size} {self.chunks} {self.root} {self.buffers[FIRST_SCRATCH:]}"
        return int(zlib.crc32(self.ops.astype("<i4").tobytes(), zlib.crc32(header.encode())))

    def ref_text(self, rank: int, buffer: int, chunk: int, span: int) -> str:
        where = f"{chunk}" if span == 1 else f"{chunk}:{chunk + span}"
        return f"{rank}.{self.buffers[buffer]}[{where}]"

    def op_text(self, op: Any) -> str:
        """One operation for people, e.g. "reduce 0.data[1] -> 1.data[1]"."""
        kind, sr, sb, sc, dr, db, dc, span = (int(x) for x in op)
        verb = "copy  " if kind == COPY else "reduce"
        return f"{verb} {self.ref_text(sr, sb, sc, span)} -> {self.ref_text(dr, db, dc, span)}"

    def dump(self) -> str:
        """The whole schedule as stable text, one operation a line, with its level: what the golden files hold."""
        from .order import order_of

        root = "" if self.root < 0 else f" root={self.root}"
        head = f"{self.collective} {self.name} world_size={self.world_size} chunks={self.chunks}{root}\n"
        levels = order_of(self).level
        return head + "".join(f"{lv:3d}  {self.op_text(op)}\n" for lv, op in zip(levels, self.ops, strict=True))

    def table(self) -> str:
        """Ranks x steps, for people: what every rank does at every level."""
        from .table import table

        return table(self)

    def __len__(self) -> int:
        return len(self.ops)

    def __repr__(self) -> str:
        size = f"{self.world_size} ranks, {self.chunks} chunks, {len(self)} ops"
        return f"<Schedule {self.collective} {self.name}: {size}>"

    def buffer_id(self, name: str) -> int:
        """The number of a buffer; a new scratch name gets the next one."""
        found = self._buffer_ids.get(name)
        if found is None:
            if not name.startswith("scratch"):
                raise ScheduleError(f"unknown buffer {name!r}: expected data, input, output or a name like scratch...")
            found = self._buffer_ids[name] = len(self.buffers)
            self.buffers.append(name)
        return found

    def _append(self, kind: int, src: Ref, dst: Ref) -> None:
        if self._frozen:
            raise ScheduleError(f"{self!r} is shared and takes no more operations: build an own Schedule")
        if np.any(np.not_equal(src.span, dst.span)):
            raise ScheduleError(f"a {'reduce' if kind else 'copy'} needs equal spans, got {src} -> {dst}")
        columns = (kind, src.rank, self.buffer_id(src.buffer), src.chunk,
                   dst.rank, self.buffer_id(dst.buffer), dst.chunk, src.span)  # fmt: skip
        shape = np.broadcast_shapes(*(np.shape(c) for c in columns))
        by_column = np.empty((8, *shape), np.int32)
        for j, column in enumerate(columns):
            by_column[j] = column
        batch = by_column.reshape(8, -1).T
        if len(batch):
            self._check(batch)
            self._emit(batch)

    def _check(self, batch: IntArray) -> None:
        n = self.world_size
        bad = batch[:, SPAN] < 1
        for rank, buffer, chunk in ((SRC_RANK, SRC_BUFFER, SRC_CHUNK), (DST_RANK, DST_BUFFER, DST_CHUNK)):
            bad |= (batch[:, rank] < 0) | (batch[:, rank] >= n) | (batch[:, chunk] < 0)
            bad |= (batch[:, buffer] < FIRST_SCRATCH) & (batch[:, chunk] + batch[:, SPAN] > self.chunks)
            named = batch[:, buffer]
            bad |= (named == DATA) if self.collective == "all_to_all" else (named == INPUT) | (named == OUTPUT)
        bad |= batch[:, DST_BUFFER] == INPUT
        same = (batch[:, SRC_RANK] == batch[:, DST_RANK]) & (batch[:, SRC_BUFFER] == batch[:, DST_BUFFER])
        bad |= same & (abs(batch[:, SRC_CHUNK] - batch[:, DST_CHUNK]) < batch[:, SPAN])
        if bad.any():
            first = batch[int(np.argmax(bad))]
            raise ScheduleError(
                f"{self.collective} [{self.name}]: no such region, or source and destination overlap: "
                f"{self.op_text(first)} (world_size {n}, chunks {self.chunks})"
            )

    def _emit(self, batch: IntArray) -> None:
        self._batches.append(batch)
        self._ops = None
        self._cache.clear()
