"""From schedules to what the core runs, and which algorithm serves which size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paracomm import _C
from paracomm.schedule import Schedule, project
from paracomm.schedule.tune import Table, default_table


def bind(schedule: Schedule, rank: int) -> _C.Program:
    """`rank`'s program of a schedule, in the core's form."""
    program = project(schedule, rank)
    return _C.Program(
        name=program.name, collective=_C.COLLECTIVES[program.collective], rank=rank, world_size=program.world_size,
        root=program.root, chunks=program.chunks, scratch_chunks=program.scratch_chunks, volume=program.volume,
        levels=program.levels, pair_depth=program.pair_depth, fingerprint=program.fingerprint, ops=program.ops,
    )  # fmt: skip


def choices(table: Table | None, collective: str, host_indices: Sequence[int]) -> list[tuple[int, str, dict[str, Any]]]:
    """(largest nbytes, algorithm, parameters) of a collective: as tuned, or the default where nothing was."""
    rows = (table or {}).get(collective) or default_table(len(host_indices), list(host_indices))[collective]
    return [(nbytes, name, dict(params)) for nbytes, name, params in rows]
