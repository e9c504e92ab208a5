"""The arena, and what a run leaves behind in the system: nothing."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from paracomm import _C
from tests.comm.cases import run_over

SHM = Path("/dev/shm")
GIB = 1 << 30


def arena(comm: Any) -> None:
    pages = _C.Arena.process()
    assert pages.bytes_in_use == 0
    x = comm.empty((30, 40), torch.bfloat16)
    assert x.dtype == torch.bfloat16 and x.shape == (30, 40) and not x.any()
    assert pages.contains(x.data_ptr(), x.nbytes)
    y = comm.empty(100_000, np.int64)
    assert isinstance(y, np.ndarray) and y.dtype == np.int64 and not y.any()
    assert comm.empty(3, "float64", like="torch").dtype == torch.float64
    assert comm.empty((2, 0)).shape == (2, 0)
    used = pages.bytes_in_use
    assert used >= x.nbytes + y.nbytes
    y[:] = 7
    part = y[10:20]
    del y
    gc.collect()
    assert pages.bytes_in_use == used  # a view holds on to it
    assert (comm.all_reduce(part) == 7 * comm.world_size).all()
    del part, x
    gc.collect()
    assert pages.bytes_in_use == 0
    again = comm.empty(100_000, np.int64)
    assert not again.any()  # zeroed anew
    with pytest.raises(Exception, match=f"arena: no {1 << 60} free bytes"):
        pages.allocate(1 << 60)


@pytest.mark.parametrize("transport", ["local", "shm"])
def test_arena(transport: str) -> None:
    run_over(transport, 1 if transport == "local" else 2, arena)


def pages_come_back(comm: Any) -> int:
    """Freed memory goes back to the system, whoever had it mapped."""
    for _ in range(4):
        x = comm.empty(16 << 20, np.uint8)
        x[:] = 1
        comm.all_reduce(x)
        del x
    comm.barrier()
    return psutil.Process().memory_info().shared


def test_freed_pages_go_back() -> None:
    assert max(run_over("shm", 2, pages_come_back)) < 200 << 20


def busy(comm: Any) -> list[str]:
    x = comm.empty(1 << 20)
    comm.all_reduce(x)
    comm.all_reduce(np.ones(1 << 20))
    with comm.split(0) as group:
        group.barrier()
    return sorted(os.listdir(SHM))


@pytest.mark.parametrize("transport", ["local", "shm", "tcp"])
def test_no_names_in_dev_shm(transport: str) -> None:
    before = sorted(os.listdir(SHM))
    during = run_over(transport, 2, busy)
    assert during == [before] * len(during)
    assert sorted(os.listdir(SHM)) == before


SMALL_SHM = """
mount -t tmpfs -o size=65536k none /dev/shm 2>/dev/null || exit 77
exec "$0" -c "$1"
"""
SMALL_SHM_MAIN = """
import numpy as np
from tests.comm.cases import run_over
def check(comm):
    x = comm.empty(48 << 20, np.uint8)
    x[:] = 1
    assert (comm.all_reduce(x) == 2).all()
    assert (comm.all_reduce(np.ones(24 << 20, np.float32)) == 2).all()
run_over("shm", 2, check)
"""


def test_small_dev_shm() -> None:
    """64 MiB of /dev/shm, as containers have it, and more data than that."""
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", SMALL_SHM, sys.executable, SMALL_SHM_MAIN]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=120)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()[-100:]}")
    assert done.returncode == 0, done.stderr


def beyond_31_bits(comm: Any, in_arena: bool) -> None:
    count = (1 << 31) + 1001
    x = comm.empty(count, np.uint8) if in_arena else np.zeros(count, np.uint8)
    x[-1], x[count // 2] = comm.rank + 1, comm.rank + 2
    comm.all_reduce(x)
    assert (x[-1], x[count // 2], x[0]) == (3, 5, 0)
    comm.broadcast(x[: count - 1], 1)
    assert x[-1] == 3
    if comm.rank == 0:
        comm.send(x, 1)
    else:
        x[-1] = 0
        comm.recv(x, 0)
        assert x[-1] == 3


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("in_arena", [False, True])
def test_more_than_31_bits_of_elements(transport: str, in_arena: bool) -> None:
    if psutil.virtual_memory().available < 8 * GIB:
        pytest.skip("needs 8 GiB of free memory")
    run_over(transport, 2, beyond_31_bits, in_arena)
