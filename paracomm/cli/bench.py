"""`paracomm bench`: collectives side by side with other libraries and with the floor, in one run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from paracomm.cli.contest import report
from paracomm.cli.contest.case import COLLECTIVES, IN_PLACE, ITEM_SIZE, cases_of, parse_sizes
from paracomm.cli.contest.contenders import ALL, Runner, start_contender, start_ours
from paracomm.cli.contest.contest import Contest, Effort
from paracomm.cli.contest.launch import ContenderError, Place
from paracomm.cli.contest.peers import HOW_TO_GET, MPIS, install
from paracomm.cli.options import count, real
from paracomm.errors import InvalidArgument

MEMORIES = ("private", "arena")
OPS = ("sum", "prod", "min", "max", "avg", "band", "bor", "bxor")


def bench(
    collective: Annotated[str, typer.Argument(help=f"{', '.join(COLLECTIVES)}, a list of them, or all")] = "all_reduce",
    ranks: Annotated[int, count("processes per contender", most=1024)] = 2,
    sizes: Annotated[str, typer.Option(help="bytes: FIRST:LAST[:FACTOR] (8:256M) or a list (8,1K,64M)")] = "8:64M",
    dtype: Annotated[str, typer.Option(help=", ".join(ITEM_SIZE))] = "float32",
    op: Annotated[str, typer.Option(help=", ".join(OPS))] = "sum",
    root: Annotated[int, count("rank of the root, where there is one", 0, 1023)] = 0,
    memory: Annotated[str, typer.Option(help="of our buffers: private,arena; empty: we take no part")] = "private",
    vs: Annotated[str, typer.Option(help=f"peers: any of {', '.join(ALL)}, torch=BACKEND[,MODULE]")] = "",
    arrays: Annotated[str, typer.Option(help="ours are torch tensors or numpy arrays")] = "torch",
    algorithm: Annotated[str, typer.Option(help="of ours; empty: what the tuner or the default chooses")] = "",
    transport: Annotated[str, typer.Option(help="of ours: tcp instead of shared memory")] = "",
    native: Annotated[bool, typer.Option(help="also our loop outside Python (all_reduce)")] = False,
    rounds: Annotated[int, count("visits of every contender per size")] = 3,
    seconds: Annotated[float, real("about how long one visit measures", above=0, most=3600)] = 0.25,
    json: Annotated[Path | None, typer.Option(help="append JSON lines to this file")] = None,
    install_peers: Annotated[bool, typer.Option(help="install the MPIs into .peers/ with pip, and end")] = False,
) -> None:
    """Time collectives beside other libraries and beside the floor.

    Every case is checked before it is timed. Each contender's ranks are processes of its own; all of them wait asleep
    while one is measured, and they take turns, so that the ratios of one run mean something on a noisy machine.
    """
    try:
        if install_peers:
            install(MPIS, typer.echo)
            return
        _check_arguments(collective, ranks, dtype, op, root, memory, arrays)
        wanted = COLLECTIVES if collective == "all" else tuple(collective.split(","))
        size_list = parse_sizes(sizes)
        runners = _start(Place(ranks), _split(memory), _split(vs), arrays, algorithm, transport, native)
    except (InvalidArgument, ContenderError) as error:
        typer.echo(f"paracomm bench: {error}", err=True)
        raise typer.Exit(2) from None
    contest = Contest(runners, Effort(rounds=rounds, seconds=seconds))
    wrong = 0
    try:
        for name in wanted:
            ways = IN_PLACE.get(name, (False,))
            typer.echo(f"\n{name}, {ranks} ranks, {rounds} rounds; a time is the slowest rank's median of a round")
            typer.echo(report.header(ways))
            for cases in cases_of(name, size_list, dtype, op, root, ranks):
                cells = contest.run_size(cases, _note)
                _note("")
                typer.echo("\n".join(report.rows(cells, ways)))
                wrong += sum(sample.wrong or 0 for cell in cells for _, sample in cell.samples.values())
                if json:
                    report.append_json(json, report.records(cells, report.about_this_run()))
    finally:
        contest.close()
    ours_out = [label for label in contest.out if label.startswith(("paracomm", "native"))]
    if wrong or ours_out:
        typer.echo(f"\n{wrong} wrong elements; ended early: {', '.join(ours_out) or 'none of ours'}", err=True)
        raise typer.Exit(1)


def _split(text: str) -> list[str]:
    # torch=BACKEND,MODULE has a comma of its own.
    parts: list[str] = []
    for part in filter(None, text.split(",")):
        if parts and parts[-1].startswith("torch=") and "," not in parts[-1] and part not in ALL:
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts


def _check_arguments(collective: str, ranks: int, dtype: str, op: str, root: int, memory: str, arrays: str) -> None:
    for what, value, known in (
        ("collective", collective.split(","), (*COLLECTIVES, "all")),
        ("dtype", [dtype], ITEM_SIZE),
        ("op", [op], OPS),
        ("memory", _split(memory), MEMORIES),
        ("arrays", [arrays], ("torch", "numpy")),
    ):
        unknown = [item for item in value if item not in known]
        if unknown:
            raise InvalidArgument(f"unknown {what} '{unknown[0]}'; there are {', '.join(known)}")
    if ranks < 1 or not 0 <= root < ranks:
        raise InvalidArgument(f"{ranks} ranks with root {root}: expected at least one rank and a root among them")


def _start(
    place: Place, memory: list[str], peers: list[str], arrays: str, algorithm: str, transport: str, native: bool
) -> list[Runner]:
    """Everybody who can take part; the others are named with the reason."""
    runners: list[Runner] = []
    try:
        if memory:
            runners += start_ours(place, memory, arrays, algorithm, transport, native)
        for name in peers:
            try:
                runners += start_contender(name, place)
            except ContenderError as error:
                typer.echo(f"left out: {name}: {error}")
        if not runners:
            raise ContenderError(f"nobody takes part; peers come with: {HOW_TO_GET}")
    except BaseException:
        for runner in runners:
            runner.close()
        raise
    return runners


def _note(text: str) -> None:
    """What is going on, on a line that the next one overwrites; nothing where nobody watches."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def main(**options: Any) -> None:
    """`python -m paracomm.cli.bench`: the command without the rest of the command line."""
    typer.run(bench)


if __name__ == "__main__":
    main()
