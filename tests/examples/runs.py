"""An example as a test runs it: a few steps on ranks of its own, or the whole of it as make does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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


def whole_run(name: str) -> str:
    """Everything, on 2 ranks under torchrun; returns what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(ROOT / "examples" / f"{name}.py")], capture_output=True, text=True, timeout=880,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout and re.search(r"asked [\d.]+: ok", done.stdout), done.stdout
    return done.stdout
