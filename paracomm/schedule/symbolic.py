"""Execution of a schedule on expressions instead of numbers.

A chunk's value is a leaf (the input of one rank) or a reduction of values in a fixed order. Equal expressions have
equal numbers, so "the same bits on every rank" is a comparison of two ints. Reduces into exactly the same region in a
row collect operands; the reduction is made, and rounds, when the region is next read or another region that overlaps it
is reduced into. The first two operands commute, because addition, rounded once, does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from ..errors import ScheduleError
from .collectives import meaning_of
from .order import Cells, cells_of, order_of
from .schedule import DST_BUFFER, FIRST_SCRATCH, KIND, REDUCE, SPAN, SRC_BUFFER, Schedule


@dataclass(frozen=True)
class Values:
    """The outcome of a symbolic run."""

    final: list[int]  #: expression of every cell at the end, -1 where undefined
    nodes: dict[tuple[int, ...], int]  #: reductions: operands -> number; leaves are cell numbers
    complete: list[bool]  #: of each operation: a reduce whose region then holds every rank's contribution
    size: list[int]  #: of each operation: the size number of its first chunk (see Meaning.size)
    wasted: list[tuple[int, str]]  #: operations that change nothing or that nobody needs, and why


def fault(schedule: Schedule, message: str, op: int | None = None) -> NoReturn:
    """Raise ScheduleError with the operations around the fault and an arrow at it."""
    text = f"{schedule.collective} [{schedule.name}] world_size={schedule.world_size}: {message}"
    if op is not None:
        rows = schedule.ops[max(0, op - 6) : op + 4]
        for i, row in enumerate(rows, start=max(0, op - 6)):
            text += f"\n{'--> ' if i == op else '    '}{i:4d}  {schedule.op_text(row)}"
            text += f"    <- {message}" if i == op else ""
    if schedule.world_size * max(1, len(schedule)) <= 600:
        try:
            from .table import table

            text += "\n" + table(schedule, mark=op)
        except ScheduleError:
            pass
    raise ScheduleError(text)


def values_of(schedule: Schedule) -> Values:
    """Run the schedule on expressions.

    Raises:
        ScheduleError: a region is read before anything is in it, a contribution enters a reduction twice, or the two
            ends of a move have different sizes.
    """
    found: Values = schedule.cached("values", _run)
    return found


def describe_expression(values: Values, schedule: Schedule, number: int) -> str:
    """An expression as text, e.g. "(x0 + x1) + x2"."""
    if number < 0:
        return "undefined"
    back = {v: k for k, v in values.nodes.items()}
    cells = cells_of(schedule)

    def text(e: int, top: bool = False) -> str:
        if e not in back:
            return "x" + cells.name(schedule, e).split(".")[0]
        inner = " + ".join(text(x) for x in back[e])
        return inner if top else f"({inner})"

    return text(number, True)


def _run(schedule: Schedule) -> Values:
    """One long function, because a call for every chunk of every operation would double the time of a proof."""
    cells, meaning = cells_of(schedule), meaning_of(schedule)
    ops = schedule.ops
    spans = ops[:, SPAN]
    chunks, user, barrier = schedule.chunks, cells.user, schedule.collective == "barrier"
    value = [-1] * cells.count
    value[:user] = np.where(meaning.defined, np.arange(user), -1).tolist()
    size = meaning.size.tolist() + [-1] * (cells.count - user)
    mask = [0] * user
    for cell in range(user):
        mask[cell] = 1 << (cell // chunks)
    topic = [cell % chunks for cell in range(user)]  # the chunk that an expression is about
    if not meaning.reducing:
        topic = [-1] * user
    everyone = (1 << schedule.world_size) - 1
    nodes: dict[tuple[int, ...], int] = {}
    open_run: list[list[int] | None] = [None] * cells.count
    run_node, node = [-1] * cells.count, order_of(schedule).node
    last_write = [-1] * cells.count
    needed = bytearray(len(ops))
    complete, sizes, wasted = [False] * len(ops), [0] * len(ops), []

    def close(cell: int) -> None:
        operands = open_run[cell]
        assert operands is not None
        open_run[cell] = None
        if operands[0] > operands[1]:
            operands[0], operands[1] = operands[1], operands[0]
        key = tuple(operands)
        number = nodes.get(key)
        if number is None:
            number = nodes[key] = len(mask)
            total = 0
            for operand in key:
                total |= mask[operand]
            mask.append(total)
            topic.append(topic[key[0]])
        value[cell] = number

    held = [0] * cells.count  # contributions in an open run
    reducing = (ops[:, KIND] == REDUCE).tolist()
    index: list[int] = np.repeat(np.arange(len(ops)), spans).tolist()
    offset = np.arange(int(spans.sum())) - np.repeat(np.cumsum(spans) - spans, spans)
    sources = (np.repeat(np.array(cells.src, np.int64), spans) + offset).tolist()
    targets = (np.repeat(np.array(cells.dst, np.int64), spans) + offset).tolist()
    first = (offset == 0).tolist()
    for i, a, b, leads in zip(index, sources, targets, first, strict=True):
        if open_run[a] is not None:
            close(a)
        x = value[a]
        if x < 0:
            fault(schedule, f"{cells.name(schedule, a)} is read before anything is in it", i)
        z = size[a]
        if leads:
            sizes[i] = z
        if last_write[a] >= 0:
            needed[last_write[a]] = 1
        if reducing[i]:
            if value[b] < 0 and open_run[b] is None:
                fault(schedule, f"{cells.name(schedule, b)} is reduced into before anything is in it", i)
            if size[b] != z:
                fault(schedule, _size_message(schedule, cells, a, b, size), i)
            run = open_run[b]
            if run is not None and run_node[b] != node[i]:
                close(b)
                run = None
            if run is None:
                y = value[b]
                if topic[y] != topic[x] or topic[x] < 0:
                    fault(schedule, f"{cells.name(schedule, b)} mixes different chunks, or is not to be reduced", i)
                open_run[b] = run = [y]
                run_node[b] = node[i]
                held[b] = mask[y]
                if last_write[b] >= 0:
                    needed[last_write[b]] = 1
            elif topic[run[0]] != topic[x]:
                fault(schedule, f"{cells.name(schedule, b)} mixes different chunks", i)
            run.append(x)
            if held[b] & mask[x] and not barrier:
                twice = _ranks(held[b] & mask[x])
                fault(schedule, f"the contribution of rank {twice} enters {cells.name(schedule, b)} twice", i)
            if barrier and held[b] | mask[x] == held[b]:
                wasted.append((i, "brings nothing new"))
            held[b] |= mask[x]
            complete[i] = held[b] == everyone and not barrier
        else:
            if size[b] != z:
                if b < user:
                    fault(schedule, _size_message(schedule, cells, a, b, size), i)
                size[b] = z
            if open_run[b] is not None:
                close(b)
            if value[b] == x:
                wasted.append((i, f"{cells.name(schedule, b)} holds that value already"))
            value[b] = x
        last_write[b] = i
    for cell in range(cells.count):
        if open_run[cell] is not None:
            close(cell)
        if cell < user and meaning.required[cell] and last_write[cell] >= 0:
            needed[last_write[cell]] = 1
    _runs_need_all(schedule, needed)
    wasted += [(i, "nobody uses what it writes") for i, used in enumerate(needed) if not used]
    _check_packing(schedule, cells)
    return Values(value, nodes, complete, sizes, wasted)


def _runs_need_all(schedule: Schedule, needed: bytearray) -> None:
    """All operands of a reduction are needed if the reduction is."""
    node = order_of(schedule).node
    used = {k for k, flag in zip(node, needed, strict=True) if flag}
    for i, k in enumerate(node):
        if k in used:
            needed[i] = 1


def _ranks(mask: int) -> str:
    return ", ".join(str(r) for r in range(mask.bit_length()) if mask >> r & 1)


def _size_message(schedule: Schedule, cells: Cells, a: int, b: int, size: list[int]) -> str:
    was = "nothing" if size[b] < 0 else f"the size of chunk {size[b]}"
    return f"{cells.name(schedule, a)} has the size of chunk {size[a]}, {cells.name(schedule, b)} has {was}"


def _check_packing(schedule: Schedule, cells: Cells) -> None:
    """Chunks of uneven sizes lie in scratch as they were copied in: later spans must begin where that one did."""
    ops = schedule.ops
    if not len(ops) or ops[:, SPAN].max() == 1 or max(ops[:, [SRC_BUFFER, DST_BUFFER]].max(), 0) < FIRST_SCRATCH:
        return
    begin: dict[int, int] = {}
    rows = zip(ops[:, [KIND, SPAN]].tolist(), cells.src, cells.dst, strict=True)
    for i, ((kind, span), a, b) in enumerate(rows):
        touched = [(a, True), (b, kind == REDUCE)]
        for first, read in touched:
            if first < cells.user:
                continue
            for c in range(first, first + span):
                if not read:
                    begin[c] = first
                elif begin[c] != first:
                    fault(schedule, f"{cells.name(schedule, first)} must be used in the spans it was filled in", i)
