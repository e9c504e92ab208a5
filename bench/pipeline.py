"""The bars of pipelines, one function each: `python bench/pipeline.py against-torch`.

against-torch  2 and 4 ranks of this host: the same model in the same stages, ours and torch.distributed.pipelining on
               Gloo in turns in one run, in every schedule that both have.
bubbles        4 ranks, every schedule, stages that sleep instead of computing: idle time beside the simulator's.
cutting        2 and 4 ranks, a large vocabulary: stages by measured cost beside equally many layers in each.

A bar prints PASS or SHORT with its figure, and JSON lines go to bench/results/.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import pipeline_cutting_rank as cut_rank
import typer
from bars import Bar, run_bars
from layouts import measure, slowest
from pipeline_rank import TORCHS, Task

from paracomm.cli.contest.launch import ContenderError, Place
from paracomm.pipeline import SCHEDULES
from paracomm.pipeline.simulate import Costs, simulate

WORKER = Path(__file__).resolve().parent / "pipeline_rank.py"


def against_torch(bar: Bar) -> None:
    """Decoder of 6.6 M parameters in 10 layers, 8 microbatches of 2 long or short sequences."""
    for ranks in (2, 4):
        for schedule in TORCHS:
            for context in (128, 16):
                task = Task(schedule, context=context)
                what = f"{schedule}, {ranks} ranks, {task.microbatches} x {task.batch // task.microbatches} x {context}"
                try:
                    replies = measure(task, Place(ranks), WORKER)
                except ContenderError as error:
                    typer.echo(f"  {error}")
                    bar.hold(what, None, 1)
                    continue
                ours, theirs = slowest(replies, "ours"), slowest(replies, "torch")
                typer.echo(
                    f"  {what}: ours {statistics.median(ours) * 1e3:.1f} ms, torch "
                    f"{statistics.median(theirs) * 1e3:.1f} ms"
                )
                figure = statistics.median(t / o for t, o in zip(theirs, ours, strict=True))
                bar.hold(f"step rate over torch, {what}", figure, 1.0)
                bar.records.append(asdict(task) | {"what": "row", "ranks": ranks, "ours": ours, "torch": theirs})


def bubbles(bar: Bar) -> None:
    """Each schedule with emulated compute times, 4 ranks, 8 microbatches: the bubble measured and simulated."""
    for schedule in SCHEDULES:
        task = Task(schedule, seconds=0.05, rounds=3)
        try:
            replies = measure(task, Place(4), WORKER)
        except ContenderError as error:
            bar.hold(f"did not run: {error}", None, 1)
            continue
        plan = task.schedule(4)
        rest = plan.stages - 1
        costs = Costs(task.seconds, [0.0, *[task.seconds] * rest], [2 * task.seconds, *[task.seconds] * rest])
        expected = simulate(plan, costs).bubble
        step = statistics.median(slowest(replies, "step"))
        busy = 3 * task.seconds * task.microbatches * plan.stages / plan.world_size
        found = 1 - busy / step
        what = f"{schedule}: measured {100 * found:.1f} %, simulated {100 * expected:.1f} %"
        bar.hold(what, 100 * abs(found - expected), 3, at_least=False, unit=" points apart")
        bar.records.append(asdict(task) | {"what": "row", "step": step, "measured": found, "simulated": expected})


def cutting(bar: Bar) -> None:
    """1F1B, decoders whose head takes as long as all blocks together. 4 ranks on 2 cores share what the cores give, and
    the rank that has the head does not get a core of its own: there a cut by cost must only not be slower."""
    tasks = ((2, cut_rank.Task("1f1b", 24576), 1.15), (4, cut_rank.Task("1f1b", 24576, depth=18), 1.0))
    for ranks, task, asked in tasks:
        what = f"{ranks} ranks, {task.depth} blocks, vocabulary {task.vocabulary}"
        try:
            replies = measure(task, Place(ranks), WORKER.with_name("pipeline_cutting_rank.py"))
        except ContenderError as error:
            typer.echo(f"  {error}")
            bar.hold(what, None, asked)
            continue
        even, measured = slowest(replies, "even"), slowest(replies, "measured")
        cuts, expected = replies[0]["cuts"], replies[0]["expected"]
        for name, seconds in (("even", even), ("measured", measured)):
            ranks_ms = " ".join(f"{each * 1e3:.0f}" for each in expected[name])
            typer.echo(
                f"  {what}: {name} {cuts[name]}, a microbatch by rank {ranks_ms} ms, step "
                f"{statistics.median(seconds) * 1e3:.0f} ms"
            )
        figure = statistics.median(e / m for e, m in zip(even, measured, strict=True))
        bar.hold(f"step rate over equally many layers, {what}", figure, asked)
        row = {"what": "row", "ranks": ranks, "even": even, "measured": measured, "costs": replies[0]["costs"]}
        bar.records.append(asdict(task) | row | {"cuts": cuts})


BARS = {"cutting": cutting, "against-torch": against_torch, "bubbles": bubbles}


def main(names: Annotated[list[str], typer.Argument(help=f"{', '.join(BARS)}, or all")]) -> None:
    """Measure bars. The status is 1 where one is short."""
    run_bars(BARS, names, "pipeline-")


if __name__ == "__main__":
    typer.run(main)
