"""`paracomm trace`: what the steps of a traced run were made of."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paracomm.errors import Error, InvalidArgument

if TYPE_CHECKING:
    from rich.table import Table

    from paracomm.timeline import Shares
    from paracomm.timeline.chrome import Document


def trace(
    folder: Annotated[Path, typer.Argument(help="Where `paracomm train --trace` wrote, a file a rank.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write one trace of all ranks, for ui.perfetto.dev.", show_default=False)
    ] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option(help="What torch.profiler exported, put under its rank in --output; may be repeated."),
    ] = None,
) -> None:
    """Say for each rank which share of its steps was compute, exposed communication, bubble, and the rest.

    A moment counts once, as what the main thread did: communication behind its computing is no part of the 100 %.
    """
    from paracomm.timeline import merged, read, shares
    from paracomm.timeline.chrome import read_json

    try:
        documents = read(folder)
        found = [shares(document) for document in documents]
        if merge and output is None:
            raise InvalidArgument("trace: --merge needs --output, where the whole goes")
        if output is not None:
            output.write_text(json_module.dumps(merged(documents, [read_json(path) for path in merge or []])))
    except Error as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if json:
        print(json_module.dumps({"ranks": [each.described() for each in found]}, indent=2))
        return
    _print(documents, found)
    if output is not None:
        print(f"{output}: open it at ui.perfetto.dev or chrome://tracing")


def _print(documents: list[Document], found: list[Shares]) -> None:
    from rich.console import Console

    console = Console()
    table = _table(found)
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=1000)).maximum)
    console.print(table)
    errors = [document["paracomm"]["clock_error_us"] for document in documents]
    if max(errors) > 0:
        console.print(f"between hosts, clocks may be {max(errors):.0f} us apart")


def _table(found: list[Shares]) -> Table:
    from rich.table import Table

    blocked = sorted({key for each in found for key in each.exposed_ns})
    table = Table(title="shares of a step, %")
    for name in ("rank", "steps", "ms a step", "compute"):
        table.add_column(name, justify="right")
    for axis, operation in blocked:
        table.add_column(f"{axis or '?'}\n{operation}", justify="right")
    for name in ("bubble", "rest", "in all", "behind\ncompute"):
        table.add_column(name, justify="right")
    for each in found:
        parts = [each.compute_ns, *(each.exposed_ns.get(key, 0) for key in blocked), each.bubble_ns, each.rest_ns]
        tenths = in_tenths(parts)
        behind = 1000 * each.overlapped_ns / max(each.total_ns, 1)
        shown = [f"{value / 10:.1f}" for value in (*tenths, sum(tenths), behind)]
        table.add_row(str(each.rank), str(each.steps), f"{each.total_ns / 1e6 / each.steps:.2f}", *shown)
    return table


def in_tenths(parts: list[int]) -> list[int]:
    """Tenths of a percent of their sum, rounded so that they add up to 1000: the largest remainders go up."""
    whole = max(sum(parts), 1)
    down = [part * 1000 // whole for part in parts]
    rest = sorted(range(len(parts)), key=lambda i: -(parts[i] * 1000 % whole))
    for i in rest[: (1000 if sum(parts) else 0) - sum(down)]:
        down[i] += 1
    return down
