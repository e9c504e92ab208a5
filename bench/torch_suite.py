"""PyTorch's own distributed tests, those that the torch wheel carries, on Gloo and on this backend: what passes there
must pass here.

    python bench/torch_suite.py                        # worlds 2 and 4; a record in bench/results/torch_suite.jsonl
    python bench/torch_suite.py --worlds 2 --match 'all_reduce|ddp_join' --no-record

torch/testing/_internal/distributed/distributed_test.py decides by a backend's name which tests it gets. To get those of
Gloo, this backend's name is put wherever that file says "gloo" (in a copy in memory), and into the tables of
common_distributed.py that name Gloo. Half of its tests ask for GPUs or for NCCL. They run on CPU tensors:
torch_suite_source.py says what is replaced. The tables PROFILING_SUPPORTED_BACKENDS stay as they are: they ask for
events that torch's C++ ends in other threads, which Python cannot write; tests/backend/test_groups.py looks at ours.

At world 4 DDP under distributed autograd comes too, ddp_under_dist_autograd_test.py: its backward passes are threads
of C++.

Each test has its own processes and a minute. tests/backend/suite_exceptions.json has the reasons why tests pass on Gloo
only ("gloo_only") or on neither backend ("neither"). The status is 1 where one passes on Gloo only without a reason.
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
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch_suite_source
import typer

HERE = Path(__file__).resolve().parent
EXCEPTIONS = HERE.parent / "tests" / "backend" / "suite_exceptions.json"
TEST_LIMIT_S = 60
LONGER_LIMITS_S = {"test_ddp_uneven_inputs": 240}  # 252 trainings; torch itself gives them 400 s
AUTOGRAD_WORLD = 4
"""The world at which ddp_under_dist_autograd_test.py runs, whose worlds are its own."""
OURS = "paracomm"
NO_REASON = "NO REASON IS GIVEN"


# --- in a process of its own, with one backend and one world ---


def load_suite(backend: str, world_size: int) -> tuple[types.ModuleType, set[str]]:
    """distributed_test.py for CPU tensors, with `backend` in Gloo's place, and the tests whose gates were opened."""
    import torch.testing._internal.common_distributed as common

    path = Path(common.__file__).parent / "distributed" / "distributed_test.py"
    text = path.read_text()
    if backend != "gloo":
        for table in (common.DistTestCases.backend_feature, common.DistTestCases.skip_collective):
            for names in table.values():
                if "gloo" in names:
                    names.add(backend)
        common.DistTestCases.backend_feature["plugin"].add(backend)
        text = torch_suite_source.renamed(text, backend)
    common.TIMEOUT_OVERRIDE.clear()
    common.TIMEOUT_OVERRIDE |= LONGER_LIMITS_S
    module = types.ModuleType("distributed_test")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    torch_suite_source.without_streams()
    tree, opened = torch_suite_source.on_cpu(text, world_size)
    module.__dict__.update(torch_suite_source.names())
    exec(compile(tree, str(path), "exec", dont_inherit=True), module.__dict__)
    module.__dict__.update(torch_suite_source.names())  # over what it imports by these names
    return module, opened


def load_dist_autograd(backend: str) -> list[type]:
    """DDP below distributed autograd: the classes of ddp_under_dist_autograd_test.py, of 4 and of 6 ranks."""
    import torch.testing._internal.distributed.ddp_under_dist_autograd_test as original
    from torch.testing._internal.distributed.rpc.tensorpipe_rpc_agent_test_fixture import TensorPipeRpcAgentTestFixture

    path = Path(original.__file__)
    module = types.ModuleType("dist_autograd_test")
    sys.modules[module.__name__] = module
    exec(compile(torch_suite_source.renamed(path.read_text(), backend), str(path), "exec"), module.__dict__)
    kinds = module.DdpUnderDistAutogradTest, module.DdpComparisonTest
    return [type(kind.__name__, (TensorPipeRpcAgentTestFixture, kind), {}) for kind in kinds]


class Outcomes(unittest.TestResult):
    """Writes a line for each test as it ends."""

    def __init__(self, path: str, opened: set[str]) -> None:
        super().__init__()
        self.path, self.opened, self.started = path, opened, 0.0

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.started = time.monotonic()
        print(f"=== {test.id()}", flush=True)

    def note(self, test: unittest.TestCase, outcome: str, why: str = "") -> None:
        name = test.id().rsplit(".", 1)[-1]
        record = {"test": name, "outcome": outcome, "gated": name in self.opened, "why": why[-3000:]}
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
    """Runs the tests of these names (all if there is none) and writes their outcomes to `path`."""
    os.environ |= {"BACKEND": backend, "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    os.environ["DISTRIBUTED_TESTS_DEFAULT_TIMEOUT"] = str(TEST_LIMIT_S)
    folder = tempfile.mkdtemp(prefix="paracomm-suite-")
    os.environ |= {"TEMP_DIR": folder, "TMPDIR": folder}
    os.environ["INIT_METHOD"] = f"file://{folder}/shared_init_file"
    import torch
    from torch.testing._internal.common_distributed import MultiProcessTestCase

    torch.set_num_threads(1)
    suite, opened = load_suite(backend, world_size)

    kinds: list[Any] = [type("TorchSuite", (suite.DistributedTest._DistTestBase, suite.TestDistBackend), {})]
    if world_size == AUTOGRAD_WORLD:
        kinds += [type(kind.__name__, (kind, MultiProcessTestCase), {}) for kind in load_dist_autograd(backend)]
    result = Outcomes(path, opened)
    for kind in kinds:
        # torch is here already; a new interpreter would import it for seconds.
        kind.setUp = _forking(kind.setUp)
        for name in unittest.TestLoader().getTestCaseNames(kind):
            if not names or name in names:
                kind(name).run(result)


def _forking(set_up: Callable[[Any], None]) -> Callable[[Any], None]:
    def call(self: Any) -> None:
        set_up(self)
        self._start_processes(multiprocessing.get_context("fork").Process)

    return call


# --- in the process that compares ---


def run_suite(backend: str, world_size: int, names: list[str], limit_s: float) -> dict[str, dict[str, Any]]:
    """Outcome by test. A test that took the process with it has failed; the others are run again without it."""
    found: dict[str, dict[str, Any]] = {}
    end = time.monotonic() + limit_s
    with tempfile.TemporaryDirectory(prefix="paracomm-suite-") as folder:
        path, log_path = Path(folder, "outcomes.jsonl"), Path(folder, "log")
        while left := [name for name in names if name not in found]:
            arguments = ["--one", backend, str(world_size), str(path), *left]
            with open(log_path, "w") as log:
                command = [sys.executable, str(Path(__file__).resolve()), *arguments]
                process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
                try:
                    process.wait(max(1.0, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, 9)
                    process.wait()
                    raise SystemExit(f"{backend}: {len(left)} tests had not run after {limit_s:g} s") from None
            lines = path.read_text().splitlines() if path.exists() else []
            found |= {record["test"]: record for record in map(json.loads, lines)}
            began = re.findall(r"^=== .*\.(test_\w+)$", log_path.read_text(), re.MULTILINE)
            if not began:
                raise SystemExit(f"no test of {backend} ran:\n{log_path.read_text()[-3000:]}")
            died = {"test": began[-1], "outcome": "failed", "gated": False, "why": f"status {process.returncode}"}
            found.setdefault(began[-1], died)
    return found


def reasons(kind: str) -> dict[str, str]:
    """Test -> why it passes on Gloo only, or on neither: `kind` is "gloo_only" or "neither"."""
    texts: dict[str, list[str]] = json.loads(EXCEPTIONS.read_text())[kind]
    return {test: why for why, tests in texts.items() for test in tests}


def compare(gloo: dict[str, Any], ours: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Prints what differs. The record of this world."""
    skipped = [test for test in gloo if gloo[test]["outcome"] == "skipped" and ours[test]["outcome"] == "skipped"]
    ran = sorted(gloo.keys() - set(skipped))

    def those(on_gloo: bool, on_ours: bool) -> list[str]:
        wanted = on_gloo, on_ours
        return [test for test in ran if tuple(found[test]["outcome"] == "passed" for found in (gloo, ours)) == wanted]

    both, short, more, neither = those(True, True), those(True, False), those(False, True), those(False, False)
    for name, tests in (("both", both), ("gloo only", short), (f"{OURS} only", more), ("neither", neither)):
        marked = sum(gloo[test]["gated"] for test in tests)
        typer.echo(f"  pass on {name:<14} {len(tests):>3}, of which marked for GPUs or another backend {marked}")
    for why, count in Counter(gloo[test]["why"] for test in skipped).most_common():
        typer.echo(f"  skipped by torch    {count:>3}: {why}")
    excuses, known = reasons("gloo_only"), reasons("neither")
    for test in short:
        typer.echo(f"  passes on gloo only: {test}: {excuses.get(test, NO_REASON)}")
        if test not in excuses:
            typer.echo("    " + "\n    ".join(_lines(ours[test])[-8:]))
    for test in more:
        typer.echo(f"  passes on {OURS} only: {test}: {_last_line(gloo[test])}")
    for test in neither:
        typer.echo(f"  passes on neither: {test}: {known.get(test, f'{NO_REASON}: {_last_line(ours[test])}')}")
    excused = [test for test in short if test in excuses]
    passes = len(both) + len(short)
    verdict = "PASS " if len(short) == len(excused) else "SHORT"
    typer.echo(f"  {verdict} {len(both)} of {passes} that pass on gloo pass, {len(excused)} have a reason why not")
    return {
        "world_size": world_size, "pass_on_gloo": passes, "pass_on_both": len(both), "short": short, "excused": excused,
        "marked": sum(gloo[test]["gated"] for test in both), "only_ours": more, "neither": neither,
        "skipped": len(skipped),
    }  # fmt: skip


def _lines(record: dict[str, Any]) -> list[str]:
    return record["why"].split("To execute this test")[0].strip().splitlines() or [record["outcome"]]


def _last_line(record: dict[str, Any]) -> str:
    return _lines(record)[-1][:160]


def main(
    worlds: Annotated[str, typer.Option(help="world sizes, by commas")] = "2,4",
    match: Annotated[str, typer.Option(help="only tests in whose name this regular expression is found")] = "",
    record: Annotated[bool, typer.Option(help="append to bench/results/torch_suite.jsonl")] = True,
    limit_s: Annotated[float, typer.Option(help="of one backend at one world, in seconds")] = 1800.0,
) -> None:
    """PyTorch's distributed tests on Gloo and on paracomm. Status 1: one that passes on Gloo fails without a reason."""
    import torch

    good = True
    folder = Path(torch.__file__).parent / "testing" / "_internal" / "distributed"
    for world_size in map(int, worlds.split(",")):
        names = torch_suite_source.test_names((folder / "distributed_test.py").read_text(), {"_DistTestBase"})
        if world_size == AUTOGRAD_WORLD:
            text = (folder / "ddp_under_dist_autograd_test.py").read_text()
            names += torch_suite_source.test_names(text, {"DdpUnderDistAutogradTest", "DdpComparisonTest"})
        chosen = [name for name in names if re.search(match, name)]
        typer.echo(f"world of {world_size}, torch {torch.__version__}")
        gloo, ours = (run_suite(backend, world_size, chosen, limit_s) for backend in ("gloo", OURS))
        outcome = compare(gloo, ours, world_size) | {"torch": torch.__version__, "time": time.time()}
        good &= len(outcome["short"]) == len(outcome["excused"])
        if record:
            with open(HERE / "results" / "torch_suite.jsonl", "a") as lines:
                lines.write(json.dumps(outcome) + "\n")
    raise typer.Exit(int(not good))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        run_here(sys.argv[2], int(sys.argv[3]), sys.argv[5:], sys.argv[4])
    else:
        typer.run(main)
