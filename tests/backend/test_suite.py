"""PyTorch's own distributed tests: a few of them here, those of groups by `make slow`, all by
`make exhaustive` and by `python bench/torch_suite.py`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).resolve().parents[2] / "bench" / "torch_suite.py"


def run(*arguments: str, timeout_s: float) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RUNNER), "--no-record", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NO REASON" not in done.stdout, done.stdout
    return done.stdout


def test_some() -> None:
    """Reductions of several tensors, of sparse ones, of what is a GPU's to torch, and DDP with a static graph."""
    match = "all_reduce_coalesced_full|reduce_sum_cuda$|ddp_static_graph"
    assert "PASS  8 of 8 that pass on gloo pass" in run("--worlds", "2", "--match", match, timeout_s=240)


@pytest.mark.slow
def test_groups() -> None:
    """Every collective, of all ranks and of some."""
    out = run("--worlds", "4", "--match", "group", timeout_s=600)
    assert re.search(r"PASS  [1-9]\d of [1-9]\d that pass on gloo pass", out)


@pytest.mark.exhaustive
def test_all() -> None:
    """At world 4, where more of its tests run than at 2; `bench/torch_suite.py` runs both."""
    assert re.search(r"PASS  2\d\d of 2\d\d that pass on gloo pass", run("--worlds", "4", timeout_s=880))
