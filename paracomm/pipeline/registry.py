"""The pipeline schedules by name. Tests, the simulator and the runner walk this table: a line is all a new one needs.

@pipeline_schedule("gpipe")
def gpipe(ranks, stages, microbatches):
    return [[...Action...] for rank in range(ranks)]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from paracomm.errors import InvalidArgument
from paracomm.pipeline.action import Action, PipelineSchedule

Author = Callable[[int, int, int], list[list[Action]]]
"""(ranks, stages, microbatches) -> the actions of every rank."""
Placement = Callable[[int, int], int]
"""(stage, ranks) -> rank."""


def loop(stage: int, ranks: int) -> int:
    """0 1 2 0 1 2: neighbours are next to each other, and the last sends to the first."""
    return stage % ranks


def vee(stage: int, ranks: int) -> int:
    """0 1 2 2 1 0: the first rank has the first stage and the last one (two stages a rank)."""
    return stage if stage < ranks else 2 * ranks - 1 - stage


@dataclass(frozen=True)
class Kind:
    """A registered schedule.

    stages_per_rank: (least, most, default).
    refuses: (ranks, stages, microbatches) -> why it cannot be, "" if it can.
    """

    name: str
    author: Author
    placement: Placement
    stages_per_rank: tuple[int, int, int]
    refuses: Callable[[int, int, int], str]


SCHEDULES: dict[str, Kind] = {}


def pipeline_schedule(
    name: str,
    *,
    placement: Placement = loop,
    stages_per_rank: tuple[int, int, int] = (1, 1, 1),
    refuses: Callable[[int, int, int], str] = lambda ranks, stages, microbatches: "",
) -> Callable[[Author], Author]:
    """Registers a function (ranks, stages, microbatches) -> [[Action, ...] of each rank]. A name again replaces it."""

    def register(author: Author) -> Author:
        SCHEDULES[name] = Kind(name, author, placement, stages_per_rank, refuses)
        return author

    return register


def check(name: str, ranks: int, microbatches: int, stages_per_rank: int | None = None) -> Kind:
    """The schedule `name`; raises InvalidArgument, with the reason, where it cannot be built."""
    kind = SCHEDULES.get(name)
    if kind is None:
        raise InvalidArgument(f"pipeline: no schedule is called '{name}', expected one of {', '.join(SCHEDULES)}")
    least, most, default = kind.stages_per_rank
    each = default if stages_per_rank is None else stages_per_rank
    if ranks < 1 or microbatches < 1:
        raise InvalidArgument(f"pipeline: {ranks} ranks and {microbatches} microbatches, expected at least 1 of each")
    if not least <= each <= most:
        raise InvalidArgument(
            f"pipeline: {name} with {each} stages a rank, expected {least if least == most else f'{least} to {most}'}"
        )
    why = kind.refuses(ranks, ranks * each, microbatches)
    if why:
        raise InvalidArgument(f"pipeline: {name}: {why}")
    return kind


def build(name: str, *, ranks: int, microbatches: int, stages_per_rank: int | None = None) -> PipelineSchedule:
    """The schedule `name` of a step of `microbatches` on `ranks` ranks; stages_per_rank None: its own default.

    Raises InvalidArgument for another name, and for numbers that the schedule cannot have.
    """
    kind = check(name, ranks, microbatches, stages_per_rank)
    each = kind.stages_per_rank[2] if stages_per_rank is None else stages_per_rank
    stages = ranks * each
    placement = tuple(kind.placement(stage, ranks) for stage in range(stages))
    actions = kind.author(ranks, stages, microbatches)
    return PipelineSchedule(name, microbatches, placement, tuple(map(tuple, actions)))
