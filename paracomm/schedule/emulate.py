"""Programs run on numbers: ranks take turns at random, sizes are uneven, and early writes land as early as they may.

This shares nothing with the proofs of `verify.py` but the programs, and so it judges them: a schedule that `verify`
passes and that goes wrong here shows a hole in `verify`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ScheduleError
from .collectives import meaning_of
from .program import RECV, REDUCE_OP, SCRATCH, SEND, Program, project_all
from .schedule import DATA, INPUT, OUTPUT, Schedule

Array = NDArray[Any]


@dataclass
class Rank:
    """One rank's memory: every buffer flat, with the offset of every chunk."""

    program: Program
    sizes: dict[int, Array]
    memory: dict[int, Array] = field(default_factory=dict)
    offset: dict[int, Array] = field(default_factory=dict)

    def view(self, buffer: int, chunk: int, count: int) -> Array:
        begin = int(self.offset[buffer][chunk])
        return self.memory[buffer][begin : begin + count]


def emulate(schedule: Schedule, seed: int, floats: bool = False) -> list[dict[int, Array]]:
    """Run all programs on random inputs and return every rank's buffers (int64; float32 if floats), unproved.

    Raises:
        ScheduleError: all ranks wait for each other.
    """
    ranks, _ = _start(schedule, np.random.default_rng(seed), floats)
    _run(schedule, ranks, np.random.default_rng(seed + 1))
    return [rank.memory for rank in ranks]


def outcome(schedule: Schedule, seed: int) -> str | None:
    """What is wrong with the result of one random run, or None.

    Integers must come out exactly; floats must be equal, bit by bit, on all ranks that hold the same result.
    """
    try:
        ranks, inputs = _start(schedule, np.random.default_rng(seed), False)
        _run(schedule, ranks, np.random.default_rng(seed + 1))
        twins = emulate(schedule, seed, True) if schedule.collective == "all_reduce" else []
    except ScheduleError as error:
        return str(error)
    meaning = meaning_of(schedule)
    result = OUTPUT if schedule.collective == "all_to_all" else DATA
    start = schedule.world_size * schedule.chunks if result == OUTPUT else 0
    for cell in np.flatnonzero(meaning.required).tolist():
        rank, chunk = divmod(cell - start, schedule.chunks)
        if meaning.reducing:
            want = sum(inputs[r][chunk] for r in range(schedule.world_size))
        else:
            holder, held = divmod(int(meaning.source[cell]), schedule.chunks)
            want = inputs[holder][held]
        got = ranks[rank].view(result, chunk, len(want))
        if schedule.collective == "barrier":
            everyone = (1 << schedule.world_size) - 1
            if int(got[0]) != everyone:
                return f"rank {rank} has not heard of everybody: {int(got[0]):b}"
        elif not np.array_equal(got, want):
            return f"rank {rank} holds {got} in chunk {chunk}, not {want}"
    if any(not np.array_equal(t[result], twins[0][result]) for t in twins):
        return "ranks hold different bits"
    return None


def _start(schedule: Schedule, rng: np.random.Generator, floats: bool) -> tuple[list[Rank], list[list[Array]]]:
    """Ranks with their inputs where the collective defines them and rubbish elsewhere; and the inputs."""
    n, chunks = schedule.world_size, schedule.chunks
    crossing = schedule.collective == "all_to_all"
    barrier = schedule.collective == "barrier"
    sizes = np.ones((n, chunks), np.int64) if barrier else rng.integers(0, 4, (n, chunks))
    if not crossing:
        sizes[:] = sizes[0]
    defined = meaning_of(schedule).defined
    ranks: list[Rank] = []
    inputs: list[list[Array]] = []
    for r, program in enumerate(project_all(schedule)):
        mine = {INPUT if crossing else DATA: sizes[r]}
        if crossing:
            k = chunks // n
            mine[OUTPUT] = np.concatenate([sizes[s, r * k : (r + 1) * k] for s in range(n)])
        mine[SCRATCH] = np.full(program.scratch_chunks, sizes.max())
        rank = Rank(program, mine)
        for buffer, each in mine.items():
            rank.offset[buffer] = np.concatenate([[0], np.cumsum(each)])
            total = int(each.sum())
            values: Array = rng.random(total).astype(np.float32) if floats else rng.integers(1, 1 << 40, total)
            rank.memory[buffer] = np.full(total, 1 << r, np.int64) if barrier and buffer == DATA else values
        first = INPUT if crossing else DATA
        whole = [rank.view(first, c, int(sizes[r, c])).copy() for c in range(chunks)]
        inputs.append(whole)
        for c in range(chunks):
            if not crossing and not defined[r * chunks + c]:
                rank.view(DATA, c, int(sizes[r, c]))[:] = -1
        ranks.append(rank)
    return ranks, inputs


def _run(schedule: Schedule, ranks: list[Rank], rng: np.random.Generator) -> None:
    fifos: dict[tuple[int, int], deque[Array | None]] = {}
    done = [0] * len(ranks)
    ready = [r for r in range(len(ranks)) if len(ranks[r].program.ops)]
    todo = [rank.program.ops.tolist() for rank in ranks]
    blocked: set[int] = set()
    while ready:
        at = int(rng.integers(len(ready)))
        r = ready[at]
        op = todo[r][done[r]]
        if not _step(schedule, ranks, fifos, r, op):
            ready.pop(at)
            blocked.add(r)
            continue
        done[r] += 1
        if done[r] == len(todo[r]):
            ready.pop(at)
        if op[0] == SEND and op[7] in blocked:
            blocked.discard(op[7])
            ready.append(op[7])
    if blocked:
        raise ScheduleError(f"ranks {sorted(blocked)} wait for messages that never come")


def _step(
    schedule: Schedule,
    ranks: list[Rank],
    fifos: dict[tuple[int, int], deque[Array | None]],
    r: int,
    op: list[int],
) -> bool:
    """Run one operation; False if its message is not there yet."""
    kind, src_buffer, src_chunk, _, dst_buffer, dst_chunk, span, peer, _, _, early, size_chunk = op
    rank = ranks[r]
    if schedule.collective == "all_to_all":
        of = INPUT if kind == SEND else OUTPUT
    else:
        of = DATA
    count = int(rank.sizes[of][size_chunk : size_chunk + span].sum())
    if kind == RECV:
        arrived = fifos.get((peer, r))
        if not arrived:
            return False
        message = arrived.popleft()
        if message is not None:
            rank.view(dst_buffer, dst_chunk, count)[:] = message
        return True
    source = rank.view(src_buffer, src_chunk, count)
    if kind == SEND:
        fifo = fifos.setdefault((r, peer), deque())
        if early:
            ranks[peer].view(dst_buffer, dst_chunk, count)[:] = source
            fifo.append(None)
        else:
            fifo.append(source.copy())
        return True
    target = rank.view(dst_buffer, dst_chunk, count)
    if kind == REDUCE_OP:
        joined = target | source if schedule.collective == "barrier" else target + source
        target[:] = joined
    else:
        target[:] = source
    return True
