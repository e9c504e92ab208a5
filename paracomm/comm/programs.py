"""From schedules to what the core runs, and which algorithm serves which size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from paracomm import _C
from paracomm.schedule import Schedule, project_all
from paracomm.schedule.tune import Table, default_table


def bind(schedule: Schedule, rank: int) -> _C.Program:
    """`rank`'s program of a schedule, in the core's form."""
    programs = project_all(schedule)
    mine = programs[rank]
    levels, depth = extent(schedule)
    return _C.Program(
        name=schedule.name, collective=_C.COLLECTIVES.get(schedule.collective, _C.COLLECTIVES["custom"]), rank=rank,
        world_size=schedule.world_size, root=-1 if schedule.root is None else schedule.root, chunks=schedule.chunks,
        scratch_chunks=mine.scratch_chunks, volume=mine.volume, levels=levels, pair_depth=depth,
        fingerprint=schedule.fingerprint & 0xFFFFFFFF, ops=mine.ops,
    )  # fmt: skip


def extent(schedule: Schedule) -> tuple[int, int]:
    """The highest level, and the most chunks that one rank sends to one other within one level."""

    def count(schedule: Schedule) -> tuple[int, int]:
        levels, depth = 0, 0
        for program in project_all(schedule):
            if not len(program.ops):
                continue
            levels = max(levels, int(program.ops[:, 8].max()))
            sends = program.ops[program.ops[:, 0] == 0]
            if len(sends):
                key = sends[:, 7].astype(np.int64) << 32 | sends[:, 8]
                _, where = np.unique(key, return_inverse=True)
                depth = max(depth, int(np.bincount(where, weights=sends[:, 3]).max()))
        return levels, depth

    found: tuple[int, int] = schedule.cached("extent", count)
    return found


def choices(table: Table | None, collective: str, host_indices: Sequence[int]) -> list[tuple[int, str, dict[str, Any]]]:
    """(largest nbytes, algorithm, parameters) of a collective: as tuned, or the default where nothing was."""
    rows = (table or {}).get(collective) or default_table(len(host_indices), list(host_indices))[collective]
    return [(nbytes, name, dict(params)) for nbytes, name, params in rows]
