"""The table on the screen, with nccl-tests' columns, and JSON lines for programs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from paracomm.cli.contest.case import REDUCING, ROOTED, Case, Sample
from paracomm.cli.contest.contest import Cell
from paracomm.version import __version__

HEAD = f"{'size':>12} {'count':>11} {'type':>8} {'redop':>5} {'root':>4}  "
HEAD += f"{'contender':<17} {'algorithm':<12} {'transport':<9}"
WAY = f"{'time':>9} {'p99':>9} {'algbw':>7} {'busbw':>7} {'#wrong':>6}"
UNITS = f"{'(B)':>12} {'(elements)':>11} {'':>8} {'':>5} {'':>4}  {'':<17} {'':<12} {'':<9}"
WAY_UNITS = f"{'(us)':>9} {'(us)':>9} {'(GB/s)':>7} {'(GB/s)':>7} {'':>6}"


def header(ways: Iterable[bool]) -> str:
    ways = list(ways)
    names = {False: "out of place", True: "in place"}
    titles = "  ".join(f"{names[way]:^{len(WAY)}}" for way in ways)
    return "\n".join(
        (
            f"{'':{len(HEAD)}}  {titles}",
            "  ".join([HEAD, *[WAY for _ in ways], f"{'floor':>6}"]),
            "  ".join([UNITS, *[WAY_UNITS for _ in ways], f"{'share':>6}"]),
        )
    )


def figures(case: Case, sample: Sample) -> dict[str, Any]:
    """time_us and p99_us, bandwidths in GB/s (10^9), #wrong."""
    p99 = sample.p99
    return {
        "time_us": sample.p50 * 1e6,
        "p99_us": None if p99 is None else p99 * 1e6,
        "algbw": case.size / sample.p50 / 1e9,
        "busbw": case.bus_factor * case.size / sample.p50 / 1e9,
        "wrong": sample.wrong,
        "round_p50s_us": [p50 * 1e6 for p50 in sample.p50s],
    }


def show(case: Case, sample: Sample) -> str:
    if not sample.p50s:
        return f"{'-':>9} {'':>9} {'':>7} {'':>7} {'':>6}"
    f = figures(case, sample)
    p99 = "" if f["p99_us"] is None else number(f["p99_us"])
    wrong = "" if f["wrong"] is None else str(f["wrong"])
    return f"{number(f['time_us']):>9} {p99:>9} {f['algbw']:>7.2f} {f['busbw']:>7.2f} {wrong:>6}"


def number(microseconds: float) -> str:
    return f"{microseconds:.2f}" if microseconds < 1000 else f"{microseconds:.0f}"


def floor_share(cells: Iterable[Cell], cell: Cell) -> float | None:
    """The floor's time over this cell's better time; None where there is no floor."""
    floors = [best(other) for other in cells if other.runner.label == "floor"]
    mine = best(cell)
    return floors[0] / mine if floors and floors[0] and mine and cell.runner.label != "floor" else None


def best(cell: Cell) -> float | None:
    """Seconds of the faster way."""
    times = [sample.p50 for _, sample in cell.samples.values() if sample.p50s]
    return min(times) if times else None


def rows(cells: list[Cell], ways: Iterable[bool]) -> list[str]:
    """One line a contender; under it, why a figure is missing."""
    lines = []
    for cell in cells:
        case, sample = next((pair for pair in cell.samples.values() if pair[1].p50s), next(iter(cell.samples.values())))
        redop = case.op if case.collective in REDUCING else "none"
        root = str(case.root) if case.collective in ROOTED else "-1"
        share = floor_share(cells, cell)
        left = f"{case.size:>12} {case.count:>11} {case.dtype:>8} {redop:>5} {root:>4}  {cell.runner.label:<17} "
        left += f"{sample.algorithm or '-':<12.12} {sample.transport or '-':<9.9}"
        troubles = sorted({sample.trouble for _, sample in cell.samples.values() if sample.trouble})
        if troubles and not any(sample.p50s for _, sample in cell.samples.values()):
            lines.append(f"{left}  {troubles[0].splitlines()[0]}")
            continue
        shown = [show(*cell.samples[way]) for way in ways if way in cell.samples]
        lines.append("  ".join([left, *shown, f"{share:>6.2f}" if share else f"{'':>6}"]))
    return lines


def records(cells: list[Cell], about: dict[str, Any]) -> list[dict[str, Any]]:
    """One record a contender and way, for JSON lines."""
    found = []
    for cell in cells:
        for in_place, (case, sample) in cell.samples.items():
            record: dict[str, Any] = about | {
                "collective": case.collective,
                "contender": cell.runner.label,
                "ranks": case.world_size,
                "size": case.size,
                "count": case.count,
                "type": case.dtype,
                "redop": case.op if case.collective in REDUCING else None,
                "root": case.root if case.collective in ROOTED else None,
                "in_place": in_place,
                "algorithm": sample.algorithm or None,
                "transport": sample.transport or None,
            }
            if sample.p50s:
                record |= figures(case, sample) | {"floor_share": floor_share(cells, cell)}
            else:
                record["trouble"] = sample.trouble
            found.append(record)
    return found


def about_this_run() -> dict[str, Any]:
    """Where and when: goes into every record."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
    }


def append_json(path: Path, found: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        for record in found:
            stream.write(json.dumps(record) + "\n")
