"""How many activations a rank keeps.

Those of a stage and a microbatch are kept from F until W, or until B where there is no W: a schedule that splits its
backwards pays for it here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from paracomm.pipeline.action import BACKWARD, FORWARD, WEIGHT, PipelineSchedule


def kept(schedule: PipelineSchedule, sizes: Sequence[float] | None = None) -> Iterator[list[float]]:
    """For each rank, what it keeps during each of its actions.

    sizes: sizes[stage] is what one microbatch's activations of that stage count for; 1 if not given.
    """
    for mine in schedule.ranks:
        total, history = 0.0, []
        for stage, kind, microbatch in mine:
            size = 1 if sizes is None else sizes[stage]
            total += size * (kind == FORWARD)
            history.append(total)
            total -= size * (kind == WEIGHT or (kind == BACKWARD and (stage, microbatch) not in schedule.split))
        yield history


def peaks(schedule: PipelineSchedule) -> list[int]:
    """The most activations, in units of one stage and microbatch, that each rank keeps at a time."""
    return [int(max(history, default=0)) for history in kept(schedule)]
