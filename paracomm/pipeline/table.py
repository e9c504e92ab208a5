"""A schedule as a table for people: ranks down, time slots across, what is wrong marked in it, and why below it.

Every action takes one slot, and begins in the first one in which its rank is free and what it takes is there:

              0    1    2    3    4    5
    rank 0  0F0  0F1            0B0  0B1
    rank 1       1F0  1B0  1F1  1B1

What can never begin (in a deadlock, or because something is missing) follows behind a gap, in its rank's order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group
from rich.text import Text

from paracomm.errors import InvalidArgument
from paracomm.pipeline.action import BACKWARD, FORWARD, WEIGHT, Action, PipelineSchedule
from paracomm.pipeline.verify import Fault

MARK = "!"
STYLES = {FORWARD: "cyan", BACKWARD: "green", WEIGHT: "yellow"}
WRONG = "bold white on red"


def slots(schedule: PipelineSchedule) -> list[list[tuple[int, int]]]:
    """slots[rank] are (slot, position) of the rank's actions, in order; of any schedule, a wrong one too."""
    done: dict[Action, int] = {}
    placed: list[list[tuple[int, int]]] = [[] for _ in schedule.ranks]
    free = [0] * schedule.world_size
    moved = True
    while moved:
        moved = False
        for rank, mine in enumerate(schedule.ranks):
            while (position := len(placed[rank])) < len(mine):
                before = [done.get(needed) for needed in _needs(mine[position], schedule.stages)]
                if None in before:
                    break
                slot = max([free[rank], *(end for end in before if end is not None)])
                placed[rank].append((slot, position))
                done[mine[position]] = free[rank] = slot + 1
                moved = True
    stuck = max(free, default=0) + 1
    for mine, row in zip(schedule.ranks, placed, strict=True):
        row += [(stuck + i, position) for i, position in enumerate(range(len(row), len(mine)))]
    return placed


def _needs(action: Action, stages: int) -> Iterator[Action]:
    stage, kind, microbatch = action
    if kind == FORWARD and stage > 0:
        yield Action(stage - 1, FORWARD, microbatch)
    elif kind == BACKWARD:
        yield Action(stage, FORWARD, microbatch)
        if stage + 1 < stages:
            yield Action(stage + 1, BACKWARD, microbatch)
    elif kind == WEIGHT:
        yield Action(stage, BACKWARD, microbatch)


def table(schedule: PipelineSchedule, faults: Sequence[Fault] = (), *, width: int = 100) -> Group:
    """For a rich console: forward, backward and weights in colours, faults in red with their reasons below.

    Args:
        faults: of paracomm.pipeline.faults(schedule).
        width: characters of a line; a longer schedule is broken into parts, one below the other.

    Raises InvalidArgument for a width that holds not even one slot.
    """
    return Group(*_lines(schedule, faults, width))


def plain(schedule: PipelineSchedule, faults: Sequence[Fault] = (), *, width: int = 100) -> str:
    """The same as text without colours: what is wrong has a "!" behind it."""
    return "".join(line.plain.rstrip() + "\n" for line in _lines(schedule, faults, width))


def _lines(schedule: PipelineSchedule, faults: Sequence[Fault], width: int) -> list[Text]:
    wrong = {(fault.rank, fault.position) for fault in faults if fault.position is not None}
    cells = [
        {slot: (schedule.ranks[rank][at], (rank, at) in wrong) for slot, at in row}
        for rank, row in enumerate(slots(schedule))
    ]
    names = [f"rank {rank}" for rank in range(schedule.world_size)]
    last = max((slot for row in cells for slot in row), default=-1)
    texts = [_form(*cell) for row in cells for cell in row.values()]
    room = max(map(len, [*texts, str(last)])) + 1
    head = max(map(len, names), default=0) + 1
    each = (width - head) // room
    if each < 1:
        raise InvalidArgument(f"table: {width} characters, expected at least {head + room}")
    lines: list[Text] = []
    for begin in range(0, last + 1, each):
        part = range(begin, min(begin + each, last + 1))
        lines += [Text("")] if lines else []
        lines.append(Text(" " * head + "".join(str(slot).rjust(room) for slot in part), "dim", no_wrap=True))
        lines += [_line(name.ljust(head), cells[rank], part, room) for rank, name in enumerate(names)]
    return lines + [Text(f"{MARK} {fault}", "red") for fault in faults]


def _form(action: Action, wrong: bool) -> str:
    return f"{action}{MARK}" if wrong else str(action)


def _line(name: str, row: dict[int, tuple[Action, bool]], part: range, room: int) -> Text:
    line = Text(name, no_wrap=True)
    for slot in part:
        if slot not in row:
            line.append(" " * room)
            continue
        action, wrong = row[slot]
        text = _form(action, wrong)
        line.append(" " * (room - len(text)))
        line.append(text, WRONG if wrong else STYLES.get(action.kind, ""))
    return line
