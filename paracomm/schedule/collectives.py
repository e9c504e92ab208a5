"""What each collective means: which chunks are defined at the start, and what every chunk must hold at the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .schedule import DATA, INPUT, OUTPUT, REDUCING, Schedule


@dataclass(frozen=True)
class Meaning:
    """Over user cells, which are numbered buffer by buffer, rank by rank, chunk by chunk."""

    defined: NDArray[np.bool_]  #: [cells] holds an input at the start
    required: NDArray[np.bool_]  #: [cells] is part of the result
    source: NDArray[np.int64]  #: [cells] the cell whose input a required cell must hold in the end; unused if reducing
    size: NDArray[np.int64]  #: [cells] the number of the size that a cell has: a data chunk, or sender * chunks + block
    reducing: bool  #: the result is the reduction over all ranks instead


def meaning_of(schedule: Schedule) -> Meaning:
    """The meaning of schedule.collective at its world size, chunks and root."""
    n, chunks, name = schedule.world_size, schedule.chunks, schedule.collective
    if name == "all_to_all":
        return _all_to_all(n, chunks)
    rank, chunk = (x.ravel() for x in np.meshgrid(np.arange(n), np.arange(chunks), indexing="ij"))
    everywhere = np.ones(n * chunks, np.bool_)
    block = chunk * n // chunks if chunks >= n else chunk
    own, at_root = rank == block, rank == schedule.root
    defined = {"broadcast": at_root, "scatter": at_root, "all_gather": own, "gather": own}.get(name, everywhere)
    required = {"reduce": at_root, "gather": at_root, "scatter": own, "reduce_scatter": own}.get(name, everywhere)
    holder = block if name in ("all_gather", "gather") else np.full_like(rank, max(schedule.root, 0))
    return Meaning(defined, required, holder * chunks + chunk, chunk, name in REDUCING)


def _all_to_all(n: int, chunks: int) -> Meaning:
    """Chunks i of a block j: input [j*k + i] of rank r becomes output [r*k + i] of rank j."""
    k = chunks // n
    rank, chunk = (x.ravel() for x in np.meshgrid(np.arange(n), np.arange(chunks), indexing="ij"))
    block, part = np.divmod(chunk, k)
    cell = rank * chunks + chunk
    source = block * chunks + rank * k + part
    is_input = np.arange(2 * n * chunks) < n * chunks
    return Meaning(is_input, ~is_input, np.concatenate([cell, source]), np.concatenate([cell, source]), False)


def user_buffers(schedule: Schedule) -> tuple[int, ...]:
    return (INPUT, OUTPUT) if schedule.collective == "all_to_all" else (DATA,)
