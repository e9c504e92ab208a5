"""A schedule as a table for people: ranks across, levels down."""

from __future__ import annotations

from .order import order_of
from .schedule import COPY, DATA, SRC_RANK, Schedule


def table(schedule: Schedule, mark: int | None = None) -> str:
    """What each rank sends (c>p: chunk c to rank p; +: to be added there) and does by itself, level by level.

    Args:
        mark: the place of an operation to point an arrow at.
    """
    level = order_of(schedule).level
    cell: dict[tuple[int, int], list[str]] = {}
    marked: tuple[int, int] | None = None
    for i, op in enumerate(schedule.ops.tolist()):
        at = (level[i], op[SRC_RANK])
        text = _entry(schedule, op)
        if i == mark:
            marked, text = at, f"[{text}]"
        cell.setdefault(at, []).append(text)
    columns = [[f"rank {r}"] + [" ".join(cell.get((lv, r), [])) for lv in sorted(set(level))]
               for r in range(schedule.world_size)]  # fmt: skip
    widths = [max(len(x) for x in column) for column in columns]
    lines = []
    for row, lv in enumerate(["level", *(str(lv) for lv in sorted(set(level)))]):
        text = f"{lv:>5}  " + "  ".join(c[row].ljust(w) for c, w in zip(columns, widths, strict=True))
        arrow = marked is not None and lv == str(marked[0])
        lines.append(text.rstrip() + (f"   <-- here, rank {marked[1]}" if arrow and marked else ""))
    return "\n".join(lines) + "\n"


def _entry(schedule: Schedule, op: list[int]) -> str:
    kind, sr, sb, sc, dr, db, dc, span = op

    def region(buffer: int, chunk: int) -> str:
        name = "" if buffer == DATA else schedule.buffers[buffer] + "."
        return f"{name}{chunk}" if span == 1 else f"{name}{chunk}:{chunk + span}"

    sign = "" if kind == COPY else "+"
    there = "" if (db, dc) == (sb, sc) else "." + region(db, dc)
    return f"{region(sb, sc)}>{sign}{dr}{there}" if sr != dr else f"{region(db, dc)}{sign}={region(sb, sc)}"
