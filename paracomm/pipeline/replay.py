"""The order in which the actions of a schedule can run, whatever they cost."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable

from paracomm.pipeline.action import BACKWARD, FORWARD, WEIGHT, Action, PipelineSchedule


def takes(action: Action, stages: int) -> list[Action]:
    """What must have run before it, on its own rank or on another one."""
    stage, kind, microbatch = action
    if kind == FORWARD:
        return [Action(stage - 1, FORWARD, microbatch)] if stage else []
    if kind == WEIGHT:
        return [Action(stage, BACKWARD, microbatch)]
    own = [Action(stage, FORWARD, microbatch)]
    return own if stage == stages - 1 else [*own, Action(stage + 1, BACKWARD, microbatch)]


def replay(
    schedule: PipelineSchedule, visit: Callable[[int, Action], None] = lambda rank, action: None
) -> dict[int, tuple[int, Action]]:
    """Calls visit(rank, action) for each action that can run, after those that it takes.

    Sends do not block, and the buffers between ranks have no limit. Returns rank -> (position, awaited) of the ranks
    that do not come to their end: the position of the action that cannot run, and what it waits for.
    """
    done: set[Action] = set()
    position = [0] * schedule.world_size
    awaited: dict[int, Action] = {}
    waiting: defaultdict[Action, list[int]] = defaultdict(list)
    ready = deque(range(schedule.world_size))
    while ready:
        rank = ready.popleft()
        awaited.pop(rank, None)
        mine = schedule.ranks[rank]
        while position[rank] < len(mine):
            action = mine[position[rank]]
            missing = next((needed for needed in takes(action, schedule.stages) if needed not in done), None)
            if missing is not None:
                awaited[rank] = missing
                waiting[missing].append(rank)
                break
            visit(rank, action)
            done.add(action)
            position[rank] += 1
            ready.extend(waiting.pop(action, ()))
    return {rank: (position[rank], awaited[rank]) for rank in sorted(awaited)}
