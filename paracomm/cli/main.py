"""The `paracomm` command: a subcommand is the function of the module paracomm.cli.NAME that has the module's name."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

import typer

COMMANDS = {
    "bench": "Measure collectives beside their peers and the floor; `bench ddp`: training by gradient hooks.",
    "train": "Train a GPT in any layout of ranks.",
    "trace": "Say what the steps of `train --trace` were made of, for each rank.",
    "verify": "Prove the schedules of all algorithms, and measure the proof with mutants.",
    "simulate": "Cost algorithms on a described topology.",
    "pipeline": "Show, check, simulate and draw the schedules of pipeline parallelism.",
    "tune": "Choose algorithms by simulation and measurement; `tune kernels`: Triton's configurations, with no GPU.",
    "doctor": "Show what was built and what this machine offers.",
}

NESTED = {("bench", "ddp"): "paracomm.cli.ddp.command", ("tune", "kernels"): "paracomm.cli.kernels"}
"""Commands of two words: the module that has the second one's function."""


def build_app(arguments: Sequence[str]) -> typer.Typer:
    """The command line for these arguments.

    Only the module of the subcommand that is asked for is imported, so that one that is broken hides no other, and
    shows its own error. Modules that do not exist are not offered.
    """
    app = typer.Typer(no_args_is_help=True, add_completion=False)

    @app.callback()
    def group() -> None:
        """Collective communication as data: prove it, simulate it, tune it, run it."""

    asked = next((a for a in arguments if not a.startswith("-")), None)
    name, *rest = [*arguments[:2], ""]
    if (name, rest[0]) in NESTED:
        module = importlib.import_module(NESTED[name, rest[0]])
        group_app = typer.Typer(no_args_is_help=True, help=COMMANDS[name])
        group_app.callback()(lambda: None)
        group_app.command(rest[0])(getattr(module, rest[0]))
        app.add_typer(group_app, name=name)
        return app
    for name, summary in COMMANDS.items():
        if importlib.util.find_spec(f"paracomm.cli.{name}") is None:
            continue
        if name == asked:
            module = importlib.import_module(f"paracomm.cli.{name}")
            app.command(name)(getattr(module, name))
        else:
            app.command(name, help=summary)(lambda: None)
    return app


def main() -> None:
    """Entry point of the `paracomm` script."""
    build_app(sys.argv[1:])()
