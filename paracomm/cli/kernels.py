"""`paracomm tune kernels`: what Triton's kernels cost on a GPU that is not there, and configurations chosen by that."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from paracomm.cli.options import count
from paracomm.errors import Error
from paracomm.kernels.config import ARCHES, table
from paracomm.kernels.select import interpreted, triton_missing

COLUMNS = ("kernel", "regs", "stack", "shared KiB", "blocks/SM", "HGMMA", "HMMA", "TMA", "serial", "overlap", "fits")


def kernels(
    only: Annotated[str, typer.Argument(help="Kernels whose name contains this; all if left out.")] = "",
    arch: Annotated[list[int] | None, typer.Option(help="80, 90; both if left out.")] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Print what is shipped; choose nothing.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write what was chosen into the package's tables.")] = False,
    enough: Annotated[int, count("Candidates that may be shipped, to choose from.")] = 6,
    jobs: Annotated[int, count("Compilers at a time (--estimate).", most=1024)] = 1,
) -> None:
    """Compile kernels ahead of time, read their machine code, rank configurations by a model of its loops: no GPU."""
    arches = tuple(arch or ARCHES)
    unknown = [each for each in arches if each not in ARCHES]
    if unknown:
        raise typer.BadParameter(f"no table for sm_{unknown[0]}; there are {', '.join(map(str, ARCHES))}")
    obstacle = "TRITON_INTERPRET is set: nothing can be compiled" if interpreted() else triton_missing()
    if obstacle is not None:
        typer.echo(f"paracomm tune kernels: {obstacle}", err=True)
        raise typer.Exit(1)
    try:
        if estimate:
            show(only, arches, jobs)
        else:
            choose(only, arches, write, enough)
    except Error as error:
        typer.echo(f"paracomm tune kernels: {error}", err=True)
        raise typer.Exit(1) from error


def show(only: str, arches: tuple[int, ...], jobs: int) -> None:
    """Every shipped case: all figures are static."""
    for arch in arches:
        shown = Table(*COLUMNS, title=f"sm_{arch}, static figures: nothing was run")
        for row in described(only, arch, jobs):
            shown.add_row(*row)
        Console(width=170).print(shown)


def described(only: str, arch: int, jobs: int) -> Iterator[tuple[str, ...]]:
    from paracomm.kernels.static.golden import Figures, figures_of
    from paracomm.kernels.static.shipped import cases

    names = [case.name for case in cases(arch) if only in case.name]
    with ProcessPoolExecutor(jobs) as pool:
        for name, found in zip(names, pool.map(figures_of, names, [arch] * len(names)), strict=True):
            assert isinstance(found, Figures)
            shares = ("", "") if found.serial is None else (f"{found.serial:.1%}", f"{found.overlap:.0%}")
            yield (
                name, str(found.registers), str(found.stack), f"{found.shared / 1024:.0f}", str(found.occupancy),
                str(found.hgmma), str(found.hmma), str(found.utmaldg), *shares, found.refusal or "yes",
            )  # fmt: skip


def choose(only: str, arches: tuple[int, ...], write: bool, enough: int) -> None:
    from paracomm.kernels.static import tune

    for arch in arches:
        chosen = copy.deepcopy(table(arch))
        for kernel, dtype, size, candidate in tune.tune(arch, only, enough):
            before = table(arch).get(kernel, {}).get(dtype, {}).get(str(size))
            note = "as before" if before == candidate.row else f"before {before}"
            typer.echo(f"sm_{arch} {kernel} {dtype} {size}: {candidate.row}, serial {candidate.serial:.1%}; {note}")
            tune.merge(chosen, kernel, dtype, size, candidate.row)
        if write:
            tune.dump(chosen, arch)
