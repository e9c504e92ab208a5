"""Options that are numbers: whole ones and real ones, each with its range. What is outside ends a command with 2."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import typer

MOST = 10**9
"""Of a count for which nothing smaller suggests itself."""


def count(help: str, least: int = 1, most: int = MOST, **details: Any) -> Any:
    """An option that is a whole number from `least` to `most`."""
    return typer.Option(min=least, max=most, help=help, **details)


def real(help: str, *, least: float = 0.0, above: float | None = None, most: float = math.inf, **details: Any) -> Any:
    """An option that is a finite number from `least` (above `above`, if that is given) to `most`."""
    low = f"at least {least:g}" if above is None else f"above {above:g}"
    expected = f"a finite number {low}" + ("" if most == math.inf else f" and at most {most:g}")

    def check(value: float | None) -> float | None:
        if value is None:
            return None
        high_enough = value >= least if above is None else value > above
        if not (math.isfinite(value) and high_enough and value <= most):
            raise typer.BadParameter(f"expected {expected}, got {value:g}")
        return value

    return typer.Option(callback=check, help=help, **details)


def parts(text: str, option: str, read: Callable[[str], Any]) -> list[Any]:
    """Each part of a list with commas, read by `read`, which raises ValueError for what it cannot."""
    found = []
    for part in text.split(","):
        try:
            found.append(read(part.strip()))
        except (ValueError, OverflowError) as error:
            raise typer.BadParameter(f"{text!r}: {error}", param_hint=f"'{option}'") from error
    return found
