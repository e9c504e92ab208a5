"""The command `paracomm bench ddp`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from paracomm.cli.contest import report
from paracomm.cli.contest.launch import Place
from paracomm.cli.ddp.case import ENGINES, PLAIN, Arrangement, Job
from paracomm.cli.ddp.run import picture, run, table
from paracomm.cli.options import count, parts, real
from paracomm.errors import InvalidArgument
from paracomm.hooks import HOOKS

WIDTH = 100
"""Of the table where it goes to a file or a pipe."""


def ddp(
    engines: Annotated[str, typer.Option(help=f"any of {', '.join(ENGINES)}")] = "paracomm,gloo",
    hooks: Annotated[str, typer.Option(help=f"{PLAIN}, {', '.join(HOOKS)}, torch:FUNCTION")] = "plain,int8,int4",
    ranks: Annotated[int, count("processes", most=1024)] = 2,
    hosts: Annotated[str, typer.Option(help="of each rank (0,0,1,1), emulated by bench/hosts.sh; empty: here")] = "",
    steps: Annotated[int, count("timed steps, after the hooks' own warm-up")] = 40,
    width: Annotated[int, count("of the model")] = 128,
    depth: Annotated[int, count("of the model")] = 4,
    context: Annotated[int, count("bytes a sequence")] = 128,
    batch: Annotated[int, count("sequences a step, over all ranks")] = 12,
    bucket_mib: Annotated[float, real("size of a bucket", above=0)] = 2.0,
    json: Annotated[Path | None, typer.Option(help="append JSON lines to this file")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw a picture (.png, .svg, .pdf); needs matplotlib")] = None,
) -> None:
    """Train a GPT by engines and gradient hooks side by side.

    For each: time of a step, the communication in it that computing does not hide, bytes on the wire, and the loss
    beside that of the first arrangement. The engines are our reducer over our communicator (paracomm), torch DDP over
    Gloo (gloo), and torch DDP over the torch.distributed backend (ddp+paracomm).
    """
    console = Console(stderr=True)
    try:
        arrangements = _arrangements(engines, hooks)
        place = Place(ranks, tuple(parts(hosts, "--hosts", _host) if hosts else ()))
        if place.hosts and len(place.hosts) != ranks:
            raise InvalidArgument(f"{len(place.hosts)} hosts are given for {ranks} ranks")
        if plot is not None:
            _expect_matplotlib()
        job = Job(width=width, depth=depth, context=context, batch=batch, steps=steps, bucket_mib=bucket_mib)
        job = job.warmed_up(arrangement.hook for arrangement in arrangements)
        outcomes = run(job, arrangements, place, console.print)
    except InvalidArgument as error:
        typer.echo(f"paracomm bench ddp: {error}", err=True)
        raise typer.Exit(2) from None
    size = next((o.parameters for o in outcomes if o.parameters), 0)
    shown = Console()
    if not shown.is_terminal:
        shown.width = WIDTH
    shown.print(table(outcomes, f"GPT of {size:,} parameters, batch {batch} x {context}, {ranks} ranks"))
    if json is not None:
        about = report.about_this_run() | {"bench": "ddp", "ranks": ranks, "batch": batch, "context": context}
        report.append_json(json, (about | outcome.record() for outcome in outcomes))
    if plot is not None:
        picture(outcomes, plot)
    if any(outcome.trouble for outcome in outcomes):
        for outcome in outcomes:
            if outcome.trouble:
                typer.echo(f"{outcome.arrangement.label}: {outcome.trouble}", err=True)
        raise typer.Exit(1)


def _host(text: str) -> int:
    if not re.fullmatch(r"\d{1,4}", text):
        raise ValueError(f"a host is a number from 0 on, got {text!r}")
    return int(text)


def _arrangements(engines: str, hooks: str) -> list[Arrangement]:
    found = []
    for engine in filter(None, engines.split(",")):
        if engine not in ENGINES:
            raise InvalidArgument(f"no engine '{engine}'; there are {', '.join(ENGINES)}")
        for hook in filter(None, hooks.split(",")):
            if hook != PLAIN and hook not in HOOKS and not hook.startswith("torch:"):
                raise InvalidArgument(f"no hook '{hook}'; there are {PLAIN}, {', '.join(HOOKS)}, torch:FUNCTION")
            found.append(Arrangement(engine, hook))
    if not found:
        raise InvalidArgument("nothing to run: name at least one engine and one hook")
    return found


def _expect_matplotlib() -> None:
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidArgument("--plot needs matplotlib: pip install 'paracomm[plot]'")
