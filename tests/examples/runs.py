"""An example as a test runs it: a few steps on ranks of its own, or the whole of it as make does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from learning import Example, Verdict, options_of
from ranks import Rank, run_ranks

ROOT = Path(__file__).resolve().parents[2]


def on_rank(rank: Rank, example: Example, options: Any) -> tuple[Verdict, list[str]]:
    said: list[str] = []
    with rank.connect() as comm:
        return example(comm, options, said.append), said


def few_steps(example: Example, defaults: dict[str, Any], world_size: int = 2, **changes: Any) -> list[Any]:
    """(verdict, what was said) of every rank."""
    layout = {name: changes.pop(name) for name in ("tp", "cp", "zero") if name in changes}
    options = options_of(None, [], **(defaults | changes))
    vars(options).update(layout)
    return run_ranks(world_size, on_rank, example, options, timeout_s=240)


def expect_beaten(verdict: Verdict) -> None:
    """An example that has not learned must not pass."""
    assert not verdict.passed and verdict.value == verdict.value, "\n".join(verdict.lines())
