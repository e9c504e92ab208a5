"""examples/ddp_hook.py under torchrun, as its first lines say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ddp_hook.py"


@pytest.mark.parametrize("backend", ["paracomm", "gloo"])
def test_before_and_after(backend: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(EXAMPLE)]
    done = subprocess.run(
        [*command, "--backend", backend, "--steps", "60"], capture_output=True, text=True, timeout=150,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.strip().splitlines()
    losses = [float(re.search(r"loss ([\d.]+)", line)[1]) for line in (before, after)]
    assert max(losses) < 1.5, done.stdout  # guessing among 8 is 2.08
    if backend == "paracomm":
        sent = [float(re.search(r"sent ([\d.]+) kB", line)[1]) for line in (before, after)]
        assert 3.8 < sent[0] / sent[1] < 4, done.stdout
    else:
        assert "not counted" in before and "not counted" in after
