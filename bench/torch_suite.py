"""PyTorch's own distributed tests, those that the torch wheel carries, on Gloo and on this backend: what passes there
must pass here.

    python bench/torch_suite.py                        # worlds 2 and 4; a record in bench/results/torch_suite.jsonl
    python bench/torch_suite.py --worlds 2 --match all_reduce --no-record

torch/testing/_internal/distributed/distributed_test.py decides by a backend's name which tests it gets. To get those of
Gloo, this backend's name is put wherever that file says "gloo" (in a copy in memory), and into the tables of
common_distributed.py that name Gloo. torch itself is left as it is, and so are its own gates. So are the tables
PROFILING_SUPPORTED_BACKENDS: they ask for events that torch's C++ ends in other threads, which Python cannot write;
tests/backend/test_groups.py looks at ours.

Exceptions, each with its reason, are in tests/backend/suite_exceptions.json.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import types
import unittest
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).resolve().parent
EXCEPTIONS = HERE.parent / "tests" / "backend" / "suite_exceptions.json"
TEST_LIMIT_S = 60
OURS = "paracomm"


# --- in a process of its own, with one backend and one world ---


def load_suite(backend: str) -> types.ModuleType:
    """distributed_test.py as it is for Gloo, with `backend` in Gloo's place."""
    import torch.testing._internal.common_distributed as common

    path = Path(common.__file__).parent / "distributed" / "distributed_test.py"
    text = path.read_text()
    if backend != "gloo":
        for table in (common.DistTestCases.backend_feature, common.DistTestCases.skip_collective):
            for names in table.values():
                if "gloo" in names:
                    names.add(backend)
        common.DistTestCases.backend_feature["plugin"].add(backend)
        text = re.sub(r'(?<!"backend_name"\) == )"gloo"', f'"{backend}"', text)  # that test reads Gloo's own settings
        text = re.sub(r"(==|=) dist\.Backend\.GLOO", rf'\1 dist.Backend("{backend}")', text)
    common.TIMEOUT_OVERRIDE.clear()
    module = types.ModuleType("distributed_test")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    exec(compile(text, str(path), "exec", dont_inherit=True), module.__dict__)
    return module


class Outcomes(unittest.TestResult):
    """Writes a line for each test as it ends."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.started = path, 0.0

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.started = time.monotonic()
        print(f"=== {test.id()}", flush=True)

    def note(self, test: unittest.TestCase, outcome: str, why: str = "") -> None:
        record = {"test": test.id().rsplit(".", 1)[-1], "outcome": outcome, "why": why[-3000:]}
        with open(self.path, "a") as lines:
            lines.write(json.dumps(record | {"seconds": round(time.monotonic() - self.started, 2)}) + "\n")

    def addSuccess(self, test: unittest.TestCase) -> None:
        self.note(test, "passed")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.note(test, "skipped", reason)

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        self.note(test, "failed", self._exc_info_to_string(err, test))  # type: ignore[attr-defined]

    addError = addFailure


def run_here(backend: str, world_size: int, names: list[str], path: str) -> None:
    """Runs the named tests (all if none is named) and writes their outcomes to `path`."""
    os.environ |= {"BACKEND": backend, "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    os.environ["DISTRIBUTED_TESTS_DEFAULT_TIMEOUT"] = str(TEST_LIMIT_S)
    folder = tempfile.mkdtemp(prefix="paracomm-suite-")
    os.environ |= {"TEMP_DIR": folder, "TMPDIR": folder}
    os.environ["INIT_METHOD"] = f"file://{folder}/shared_init_file"
    import torch

    torch.set_num_threads(1)
    suite = load_suite(backend)

    class TorchSuite(suite.TestDistBackend, suite.DistributedTest._DistTestBase):  # type: ignore[misc, name-defined]
        def setUp(self) -> None:
            super().setUp()
            # torch is here already; a new interpreter would import it for seconds.
            self._start_processes(multiprocessing.get_context("fork").Process)

    known = unittest.TestLoader().getTestCaseNames(TorchSuite)
    result = Outcomes(path)
    for name in names or known:
        TorchSuite(name).run(result)


# --- in the process that compares ---


def run_suite(backend: str, world_size: int, names: list[str], limit_s: float) -> dict[str, dict[str, Any]]:
    """Outcome by test. A test that took the process with it has failed; the others are run again without it."""
    found: dict[str, dict[str, Any]] = {}
    end = time.monotonic() + limit_s
    with tempfile.TemporaryDirectory(prefix="paracomm-suite-") as folder:
        path = os.path.join(folder, "outcomes.jsonl")
        with open(os.path.join(folder, "log"), "w") as log:
            command = [sys.executable, str(Path(__file__).resolve()), "--one", backend, str(world_size), path, *names]
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                process.wait(max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
        if os.path.exists(path):
            for line in Path(path).read_text().splitlines():
                record = json.loads(line)
                found[record["test"]] = record
        if not found:
            raise SystemExit(f"no test of {backend} ran:\n{Path(folder, 'log').read_text()[-3000:]}")
    return found


def exceptions() -> dict[str, str]:
    """Test -> why it is no fault of the backend."""
    reasons: dict[str, str] = json.loads(EXCEPTIONS.read_text())
    return reasons


def compare(gloo: dict[str, Any], ours: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Prints what differs. The record of this world."""
    passes = [test for test, record in gloo.items() if record["outcome"] == "passed"]
    short = [test for test in passes if ours.get(test, {"outcome": "missing"})["outcome"] != "passed"]
    excused, reasons = [test for test in short if test in exceptions()], exceptions()
    for name, outcomes in (("gloo", gloo), (OURS, ours)):
        counts = Counter(record["outcome"] for record in outcomes.values())
        typer.echo(f"  {name:<9} {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    for test in short:
        typer.echo(f"  passes on gloo only: {test}: {reasons.get(test, 'NO REASON IS GIVEN')}")
        if test not in reasons:
            why = ours.get(test, {"why": "it did not run"})["why"].split("To execute this test")[0]
            typer.echo("    " + "\n    ".join(why.strip().splitlines()[-8:]))
    for test, record in gloo.items():
        if record["outcome"] == "failed" and ours.get(test, {}).get("outcome") == "passed":
            typer.echo(f"  passes on {OURS} only: {test}")
    share = (len(passes) - len(short)) / len(passes) if passes else 0.0
    verdict = "PASS " if share >= 0.98 else "SHORT"
    typer.echo(f"  {verdict} {share:.4f} of {len(passes)} that pass on gloo pass, asked 0.98")
    return {"world_size": world_size, "pass_on_gloo": len(passes), "share": share, "short": short, "excused": excused}


def main(
    worlds: Annotated[str, typer.Option(help="world sizes, by commas")] = "2,4",
    match: Annotated[str, typer.Option(help="only tests whose name holds this")] = "",
    record: Annotated[bool, typer.Option(help="append to bench/results/torch_suite.jsonl")] = True,
    limit_s: Annotated[float, typer.Option(help="of one backend at one world, in seconds")] = 900.0,
) -> None:
    """PyTorch's distributed tests on Gloo and on paracomm. The status is 1 where less than 98 % of Gloo's pass."""
    import torch

    short = False
    source = Path(torch.__file__).parent / "testing" / "_internal" / "distributed" / "distributed_test.py"
    names = re.findall(r"^        def (test_\w+)\(self", source.read_text(), re.MULTILINE)
    chosen = [name for name in names if match in name] if match else []
    for world_size in map(int, worlds.split(",")):
        typer.echo(f"world of {world_size}, torch {torch.__version__}")
        gloo, ours = (run_suite(backend, world_size, chosen, limit_s) for backend in ("gloo", OURS))
        outcome = compare(gloo, ours, world_size) | {"torch": torch.__version__, "time": time.time()}
        short |= outcome["share"] < 0.98
        if record:
            with open(HERE / "results" / "torch_suite.jsonl", "a") as lines:
                lines.write(json.dumps(outcome) + "\n")
    raise typer.Exit(int(short))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        run_here(sys.argv[2], int(sys.argv[3]), sys.argv[5:], sys.argv[4])
    else:
        typer.run(main)
