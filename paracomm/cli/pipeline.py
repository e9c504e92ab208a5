"""`paracomm pipeline`: a pipeline schedule as a table, whether it is right, and what it costs before anything runs."""

from __future__ import annotations

import json as json_module
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from paracomm.cli.options import count, real
from paracomm.errors import InvalidArgument
from paracomm.pipeline import (
    SCHEDULES,
    Costs,
    Fault,
    Link,
    PipelineSchedule,
    Timeline,
    build,
    faults,
    read_schedule,
    simulate,
)
from paracomm.pipeline.picture import draw, expect_picture
from paracomm.pipeline.table import table

MOST = 1 << 14
NAMES = ", ".join(SCHEDULES)


@dataclass(frozen=True)
class Given:
    """Of a rank and a microbatch: what is shared by the rank's stages, so that schedules compare."""

    forward_s: float
    backward_s: float
    weight_s: float
    link_s: float
    memory: int | None

    def faults(self, schedule: PipelineSchedule) -> list[Fault]:
        limit = None if self.memory is None else int(self.memory * stages_each(schedule))
        return faults(schedule, memory=limit)

    def simulate(self, schedule: PipelineSchedule) -> Timeline:
        each = stages_each(schedule)
        forward, backward, weight = self.forward_s / each, self.backward_s / each, self.weight_s / each
        costs = Costs(forward, backward - weight, weight, whole=backward)
        return simulate(schedule, costs, links=Link(latency_s=self.link_s), activation_bytes=1.0)


def pipeline(
    schedule: Annotated[str, typer.Argument(help=NAMES)] = "1f1b",
    ranks: Annotated[int, count("That share the model's stages.", most=MOST)] = 4,
    microbatches: Annotated[int, count("Of a step.", most=MOST)] = 8,
    stages_per_rank: Annotated[int | None, count("None: the schedule's own.", most=MOST)] = None,
    forward_ms: Annotated[float, real("Of all layers of a rank, for a microbatch.")] = 1.0,
    backward_ms: Annotated[float, real("The same, both parts of backward.")] = 2.0,
    weight_ms: Annotated[float, real("How much of that are the gradients of weights.")] = 1.0,
    link_ms: Annotated[float, real("From one rank to another.")] = 0.0,
    memory: Annotated[int | None, count("Microbatches whose activations a rank can keep.")] = None,
    file: Annotated[Path | None, typer.Option(help='Read it instead: a line a rank, "0F0 0F1 0B0 0B1".')] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it as .png or .svg; needs matplotlib.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Compare all schedules.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Shows a pipeline schedule, ranks x time slots, checks it, and simulates a step. Exits with 1 if it is wrong."""
    try:
        given = _given(forward_ms, backward_ms, weight_ms, link_ms, memory)
        if picture is not None:
            expect_picture(picture)
        if every:
            if file is not None or picture is not None:
                raise InvalidArgument("--all goes with neither --file nor --picture")
            right = compare(ranks, microbatches, stages_per_rank, given, json)
        elif file is not None:
            right = show(read_schedule(_text(file), file.stem), given, picture, json)
        else:
            right = show(_build(schedule, ranks, microbatches, stages_per_rank), given, picture, json)
    except InvalidArgument as error:
        raise typer.BadParameter(str(error)) from error
    if not right:
        raise typer.Exit(1)


def show(schedule: PipelineSchedule, given: Given, picture: Path | None, json: bool) -> bool:
    """Prints one schedule; whether it is right."""
    found = given.faults(schedule)
    timeline = None if found else given.simulate(schedule)
    if picture is not None and timeline is not None:
        draw(timeline, picture)
    console = Console(highlight=False)
    if not json:
        console.print(table(schedule, found, width=console.width))
    if json:
        print(json_module.dumps(_line(schedule, found, timeline)))
    elif timeline is None:
        unseen = "" if picture is None else "; no picture is drawn"
        console.print(f"[bold red]wrong[/]: {len(found)} fault{'s' if len(found) > 1 else ''}{unseen}")
    else:
        console.print(f"[bold green]right[/]: {_order(schedule)}")
        console.print(
            f"step {timeline.step_s * 1e3:.4g} ms, bubble {timeline.bubble:.1%} "
            f"(by rank {' '.join(f'{bubble:.1%}' for bubble in timeline.bubbles)}); "
            f"{timeline.bubble_within:.1%} from a rank's first action to its last"
        )
        console.print(f"most activations kept: {' '.join(_microbatches(schedule, timeline))} microbatches, by rank")
    return not found


def compare(ranks: int, microbatches: int, stages_per_rank: int | None, given: Given, json: bool) -> bool:
    """Prints every registered schedule in one table; whether all that can be are right."""
    shown = Table("schedule", "stages a rank", "step ms", "bubble", "most activations of a rank", "verdict")
    right = True
    for name in SCHEDULES:
        try:
            schedule = _build(name, ranks, microbatches, stages_per_rank)
        except InvalidArgument as error:
            if json:
                print(json_module.dumps({"schedule": name, "refused": str(error)}))
            shown.add_row(name, "", "", "", "", f"refused: {escape(str(error).removeprefix('pipeline: '))}")
            continue
        found = given.faults(schedule)
        timeline = None if found else given.simulate(schedule)
        right &= not found
        if json:
            print(json_module.dumps(_line(schedule, found, timeline)))
        figures = ["", "", ""]
        if timeline is not None:
            most = max(map(float, _microbatches(schedule, timeline)))
            figures = [f"{timeline.step_s * 1e3:.4g}", f"{timeline.bubble:.1%}", f"{most:g}"]
        verdict = escape(str(found[0])) if found else "right"
        shown.add_row(name, f"{stages_each(schedule):g}", *figures, verdict, style="red" if found else None)
    if not json:
        Console(highlight=False).print(shown)
    return right


def stages_each(schedule: PipelineSchedule) -> float:
    """Stages a rank, on average."""
    return max(1, schedule.stages) / max(1, schedule.world_size)


def _microbatches(schedule: PipelineSchedule, timeline: Timeline) -> list[str]:
    """Activations of each rank, in microbatches of all layers that a rank has."""
    return [f"{peak / stages_each(schedule):.3g}" for peak in timeline.peaks]


def _order(schedule: PipelineSchedule) -> str:
    number = sum(map(len, schedule.ranks))
    return f"{number} actions, each once and after what it needs; no deadlock; microbatches in rising order"


def _line(schedule: PipelineSchedule, found: list[Fault], timeline: Timeline | None) -> dict[str, Any]:
    line: dict[str, Any] = {
        "schedule": schedule.name, "ranks": schedule.world_size, "stages": schedule.stages,
        "microbatches": schedule.microbatches, "faults": list(map(str, found)),
    }  # fmt: skip
    if timeline is not None:
        line |= {
            "step_s": timeline.step_s, "bubble": timeline.bubble, "bubble_within": timeline.bubble_within,
            "bubbles": list(timeline.bubbles), "peaks": list(timeline.peaks),
        }  # fmt: skip
    return line


def _build(name: str, ranks: int, microbatches: int, stages_per_rank: int | None) -> PipelineSchedule:
    return build(name, ranks=ranks, microbatches=microbatches, stages_per_rank=stages_per_rank)


def _given(forward_ms: float, backward_ms: float, weight_ms: float, link_ms: float, memory: int | None) -> Given:
    if weight_ms > backward_ms:
        raise InvalidArgument(f"--weight-ms {weight_ms} is a part of --backward-ms {backward_ms}, expected no more")
    return Given(forward_ms * 1e-3, backward_ms * 1e-3, weight_ms * 1e-3, link_ms * 1e-3, memory)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"cannot read {file}: {error}") from error
