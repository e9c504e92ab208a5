"""Is a schedule right? Every action once, where and after what it has to be, no deadlock, no more memory than there is.

Right means as well that gradients add up in one order, whatever the schedule: each stage takes its microbatches in
rising order in each kind of action, and its weights' gradients too, whether they come of a W or of a whole B.

The time is linear in the number of actions, whatever numbers stand in them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from paracomm.errors import InvalidArgument, ScheduleError
from paracomm.pipeline.action import BACKWARD, FORWARD, KINDS, WEIGHT, Action, PipelineSchedule
from paracomm.pipeline.memory import kept
from paracomm.pipeline.replay import replay

Places = dict[Action, tuple[int, int]]
"""(rank, position) of each action that is where it may be."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with action `position` of `rank`; None where it is not a matter of one action, or of one rank."""

    rank: int | None
    position: int | None
    reason: str
    action: Action | None = None

    def __str__(self) -> str:
        if self.rank is None:
            return self.reason
        if self.position is None:
            return f"rank {self.rank}: {self.reason}"
        return f"rank {self.rank}, action {self.position} ({self.action}): {self.reason}"


def verify(schedule: PipelineSchedule, *, memory: int | Sequence[int] | None = None) -> None:
    """Raises ScheduleError with the first fault that faults() finds, and InvalidArgument as it does."""
    found = faults(schedule, memory=memory)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ScheduleError(f"pipeline schedule {schedule.name}: {found[0]}{more}")


def faults(schedule: PipelineSchedule, *, memory: int | Sequence[int] | None = None) -> list[Fault]:
    """Everything that is wrong, in the order of ranks and positions; empty for a right schedule.

    memory: the most activations that a rank may keep, or one number for each rank, in units of one stage and
        microbatch, see memory.py.

    What needs a whole schedule is looked for only where it is whole: deadlocks, and then memory.
    Raises InvalidArgument for a memory that is no such number.
    """
    limits = _limits(schedule, memory)
    found = list(_shape(schedule))
    if not found:
        places: Places = {}
        found = [*_actions(schedule, places), *_missing(schedule, places), *_order(schedule, places)]
    if not found:
        found = [*_deadlock(schedule), *_memory(schedule, limits)]
    last = max(map(len, schedule.ranks), default=0)
    return sorted(found, key=lambda f: (-1 if f.rank is None else f.rank, last if f.position is None else f.position))


def _limits(schedule: PipelineSchedule, memory: int | Sequence[int] | None) -> list[int] | None:
    if memory is None:
        return None
    limits = [memory] * schedule.world_size if isinstance(memory, int) else list(memory)
    if len(limits) != schedule.world_size or not all(isinstance(limit, int) and limit >= 0 for limit in limits):
        raise InvalidArgument(
            f"pipeline: memory is {memory}, expected a number of activations, or one for each of the"
            f" {schedule.world_size} ranks"
        )
    return limits


def _shape(schedule: PipelineSchedule) -> Iterator[Fault]:
    """Numbers without which nothing else can be said."""
    world = schedule.world_size
    for number, what in ((world, "ranks"), (schedule.stages, "stages"), (schedule.microbatches, "microbatches")):
        if number < 1:
            yield Fault(None, None, f"{number} {what}, expected at least 1")
    for stage, owner in enumerate(schedule.placement):
        if not 0 <= owner < world:
            yield Fault(None, None, f"stage {stage} is placed on rank {owner}, expected 0 to {world - 1}")
    for rank in sorted(set(range(world)) - set(schedule.placement)):
        yield Fault(rank, None, "no stage is placed on it, expected one or more")


def _actions(schedule: PipelineSchedule, places: Places) -> Iterator[Fault]:
    """Actions that are nobody's, somebody else's, or there twice; `places` gets the others."""
    for rank, mine in enumerate(schedule.ranks):
        for position, action in enumerate(mine):
            reason = _foreign(schedule, rank, action)
            if not reason and action in places:
                reason = f"a second time, after action {places[action][1]}"
            if reason:
                yield Fault(rank, position, reason, action)
            else:
                places[action] = (rank, position)


def _foreign(schedule: PipelineSchedule, rank: int, action: Action) -> str:
    stage, kind, microbatch = action
    if kind not in KINDS:
        return f"its kind is {kind}, expected one of {', '.join(KINDS)}"
    if not 0 <= stage < schedule.stages:
        return f"its stage is {stage}, expected 0 to {schedule.stages - 1}"
    if not 0 <= microbatch < schedule.microbatches:
        return f"its microbatch is {microbatch}, expected 0 to {schedule.microbatches - 1}"
    owner = schedule.placement[stage]
    return "" if owner == rank else f"stage {stage} is on rank {owner}"


def _missing(schedule: PipelineSchedule, places: Places) -> Iterator[Fault]:
    have = Counter((action.stage, action.kind) for action in places)
    for stage, owner in enumerate(schedule.placement):
        for kind in (FORWARD, BACKWARD):
            lack = schedule.microbatches - have[stage, kind]
            if lack:
                first = next(Action(stage, kind, m) for m in count() if Action(stage, kind, m) not in places)
                others = f", and {lack - 1} more {kind} of stage {stage}" if lack > 1 else ""
                yield Fault(owner, None, f"{first} is missing{others}")


def _order(schedule: PipelineSchedule, places: Places) -> Iterator[Fault]:
    """F before B before W, and microbatches that rise: in each kind, and in the gradients of weights."""
    latest: defaultdict[tuple[int, str], int] = defaultdict(lambda: -1)
    for action, (rank, position) in places.items():
        stage, kind, microbatch = action
        before = {BACKWARD: FORWARD, WEIGHT: BACKWARD}.get(kind)
        if before:
            needed = Action(stage, before, microbatch)
            at = places.get(needed, (rank, -1))[1]
            if at > position:
                yield Fault(rank, position, f"it comes before {needed}, action {at}", action)
        whole = kind == BACKWARD and (stage, microbatch) not in schedule.split
        for what, name in ((kind, kind), *([("weights", "weights' gradient")] if whole or kind == WEIGHT else [])):
            if latest[stage, what] > microbatch:
                after = f"the {name} of microbatch {latest[stage, what]}"
                yield Fault(rank, position, f"it comes after {after}, expected microbatches in rising order", action)
                break
            latest[stage, what] = microbatch


def _deadlock(schedule: PipelineSchedule) -> Iterator[Fault]:
    stuck = replay(schedule)
    if not stuck:
        return
    rank, seen = next(iter(stuck)), []
    while rank not in seen:
        seen.append(rank)
        rank = schedule.placement[stuck[rank][1].stage]
    cycle = seen[seen.index(rank) :]
    first = cycle.index(min(cycle))
    cycle = cycle[first:] + cycle[:first]
    links = []
    for rank, following in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        position, awaited = stuck[rank]
        action = schedule.ranks[rank][position]
        links.append(f"rank {rank} at action {position} ({action}) waits for {awaited} of rank {following}")
    for rank in cycle:
        position = stuck[rank][0]
        reason = f"deadlock: {', '.join(links)}" if rank == cycle[0] else f"in the deadlock of rank {cycle[0]}"
        yield Fault(rank, position, reason, schedule.ranks[rank][position])


def _memory(schedule: PipelineSchedule, limits: list[int] | None) -> Iterator[Fault]:
    """The first action of a rank at which it keeps too much."""
    for rank, (history, limit) in enumerate(zip(kept(schedule), limits or [], strict=False)):
        for position, number in enumerate(history):
            if number > limit:
                reason = f"the rank keeps {number:.0f} activations, expected at most {limit}"
                yield Fault(rank, position, reason, schedule.ranks[rank][position])
                break
