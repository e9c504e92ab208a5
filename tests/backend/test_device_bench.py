"""bench/gpu_check.sh's part that needs several ranks, as far as it goes without a GPU: on emulated ones."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from paracomm.cli.contest.case import Case
from tests.ranks import Rank, run_ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_collectives", ROOT / "bench/gpu_collectives.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_collectives", module)
    spec.loader.exec_module(module)
    return module


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=os.environ | settings, text=True, capture_output=True, timeout=100)


# --- the table ---
def test_columns_are_those_of_nccl_tests(bench: ModuleType) -> None:
    case = Case("all_reduce", 1 << 30, "float32", "sum", 0, True, 8)
    line = bench.Line(case, "nccl", 5000.0, 0)
    assert line.algbw == pytest.approx(214.748365) and line.busbw == pytest.approx(214.748365 * 2 * 7 / 8)
    words = line.text().split()
    assert words == ["1073741824", "268435456", "float32", "sum", "-1", "5000.00", "214.75", "375.81", "0", "nccl"]
    names = bench.HEADER.splitlines()[0].split()[1:]
    assert names == ["size", "count", "type", "redop", "root", "time", "algbw", "busbw", "#wrong", "engine"]
    copy = bench.Line(Case("broadcast", 8, "float32", "sum", 2, True, 8), "copy", 2.0, None)
    assert copy.text().split()[3:] == ["none", "2", "2.00", "0.00", "0.00", "N/A", "copy"]
    assert copy.busbw == copy.algbw and copy.record()["wrong"] is None


def rows_of(bench: ModuleType, rank: Rank, collective: str) -> list[int]:
    """Elements that are wrong: of the collective, and of one that does nothing."""
    in_place = collective in ("all_reduce", "reduce", "broadcast")
    case = Case(collective, 240, "float32", "sum", 0, in_place, rank.world_size)
    with rank.connect() as comm:
        ours = bench.Rank(comm, comm, torch.device("cpu"))
        bound = bench.bind_ours(ours, case)
        idle = bench.Bound(lambda: None, bench.bind_ours(ours, case).result.fill_(99))
        return [bench.wrong_elements(ours, case, bound), bench.wrong_elements(ours, case, idle)]


@pytest.mark.parametrize(
    "collective", ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all"]
)
def test_wrong_elements_are_counted(bench: ModuleType, collective: str) -> None:
    for good, idle in run_ranks(3, lambda rank: rows_of(bench, rank, collective)):
        assert good == 0 and idle == {"reduce_scatter": 60, "reduce": 60}.get(collective, 180)


def test_a_wrong_bit_is_seen(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    right = bench.result_of
    calls = iter(range(10**6))
    monkeypatch.setattr(bench, "result_of", lambda *args: right(*args) + (next(calls) == 0))
    with Rank(0, 1, lambda blob: [blob]).connect() as comm:
        assert bench.compare_bits(bench.Rank(comm, comm, torch.device("cpu")), ["float32"], [5], said.append) == 1
    assert said[0].startswith("bits differ: all_reduce[") and "sum torch.float32 x 5" in said[0]


# --- the scripts ---
def test_ranks_that_are_threads(tmp_path: Path) -> None:
    done = run(
        sys.executable, str(ROOT / "bench/gpu_collectives.py"), "--threads", "2", "--quick", "--sizes", "8:4K:512",
        "--rounds", "1", "--out", str(tmp_path / "lines"), PARACOMM_DEVICE="emulated",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "results are the host's, bit by bit (2 ranks)" in done.stdout and "differ" not in done.stdout
    records = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert len(records) == 2 * 2 * 6 and {record["engine"] for record in records} == {"paracomm", "copy"}
    assert all(record["wrong"] == 0 and record["device"] == "emulated GPU" for record in records[::2])


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(
            "gpu_collectives.py --quick --sizes 8 --rounds 1 --collectives all_reduce", marks=pytest.mark.slow
        ),
        "gpu_ddp.py",
    ],
)
def test_ranks_that_are_processes(script: str, tmp_path: Path) -> None:
    name, *options = script.split()
    out = ["--out", str(tmp_path / "lines")] if options else []
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run(*launch, str(ROOT / "bench" / name), *options, *out, PARACOMM_DEVICE="emulated")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal on all ranks") == (3 if name == "gpu_ddp.py" else 0)


STUB = """#!/bin/bash
case "$*" in
  *device_count*) echo {gpus} ;;
  *"gpu_check.py --can-run") exit {kernels} ;;
  *--can-run) exit {collectives} ;;
  *) echo "$@" >> {log}; [[ "$*" != *"{broken}"* ]] ;;
esac
"""


def what_is_run(
    folder: Path, gpus: int, kernels: int = 0, collectives: int = 0, broken: str = "#"
) -> tuple[int, list[str]]:
    """gpu_check.sh with a Python that writes down what it is asked to run."""
    stub, log = folder / "python", folder / "log"
    stub.write_text(STUB.format(gpus=gpus, kernels=kernels, collectives=collectives, log=log, broken=broken))
    stub.chmod(0o755)
    done = run("bash", str(ROOT / "bench/gpu_check.sh"), PYTHON=str(stub))
    return done.returncode, log.read_text().splitlines() if log.exists() else []


def test_one_gpu_is_shared_by_threads_and_by_processes(tmp_path: Path) -> None:
    status, commands = what_is_run(tmp_path, gpus=1)
    assert status == 0 and len(commands) == 5
    assert commands[2] == "bench/gpu_collectives.py --threads 4"
    assert all("--nproc-per-node 2" in command for command in commands[3:])


def test_several_gpus_have_a_rank_each(tmp_path: Path) -> None:
    status, commands = what_is_run(tmp_path, gpus=8, kernels=3)
    assert status == 0 and len(commands) == 2
    assert all("--nproc-per-node 8 bench/gpu_" in command for command in commands)


@pytest.mark.parametrize("broken", ["test_gpu.py", "gpu_check.py", "gpu_collectives.py", "gpu_ddp.py"])
def test_what_goes_wrong_is_in_the_exit_code(broken: str, tmp_path: Path) -> None:
    status, commands = what_is_run(tmp_path, gpus=2, broken=broken)
    assert status == 1 and len(commands) == 4


def test_nothing_to_run_on(tmp_path: Path) -> None:
    assert what_is_run(tmp_path, gpus=0, kernels=3, collectives=3) == (3, [])
