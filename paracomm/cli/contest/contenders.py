"""Who takes part in a contest: ours, torch.distributed, the MPIs, Intel's own benchmark, and the floor."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from paracomm.cli.contest.case import Case, Sample
from paracomm.cli.contest.launch import ContenderError, Group, Place, package_path
from paracomm.cli.contest.peers import MPIS, mpi_start, peers_folder


class Unsupported(Exception):
    """This contender has no such case; the table says so and goes on."""


class Runner(ABC):
    """One line of the table: measures cases, a round at a time."""

    label: str

    @abstractmethod
    def prepare(self, case: Case, sample: Sample) -> float:
        """Checks the case and returns about how many seconds a call takes. Raises Unsupported or ContenderError."""

    @abstractmethod
    def measure(self, case: Case, sample: Sample, iterations: int) -> None:
        """Adds one round to the sample."""

    def forget(self) -> None:  # noqa: B027 - most have nothing to free
        """Frees the buffers of the last case."""

    def close(self) -> None:  # noqa: B027
        """Ends the processes."""


class GroupRunner(Runner):
    """Ranks of `worker.py`. Several runners (private, arena, native) may share one group of processes."""

    def __init__(self, label: str, group: Group, memory: str = "private", native: bool = False) -> None:
        self.label, self.group, self.memory, self.native = label, group, memory, native

    def prepare(self, case: Case, sample: Sample) -> float:
        if self.native:
            if case.collective != "all_reduce" or not case.in_place or case.dtype != "float32" or case.op != "sum":
                raise Unsupported("the native loop is an in-place float32 sum")
            return max(statistics.median(times) for times in self._native(case, 50))
        replies = self.group.ask(case.command(self.memory))
        for reply in replies:
            if "unsupported" in reply:
                raise Unsupported(reply["unsupported"])
        sample.wrong = sum(reply["wrong"] for reply in replies)
        sample.algorithm, sample.transport = (str(replies[0].get(key, "")) for key in ("algorithm", "transport"))
        return max(min(reply["seconds"]) for reply in replies)

    def measure(self, case: Case, sample: Sample, iterations: int) -> None:
        if self.native:
            sample.add(self._native(case, max(iterations, 1000 if case.nbytes < 65536 else 0)))
            return
        replies = self.group.ask({"do": "time", "iterations": iterations, "warm_up": 2})
        sample.add([reply["seconds"] for reply in replies])

    def _native(self, case: Case, iterations: int) -> list[list[float]]:
        replies = self.group.ask(
            {"do": "native", "nbytes": case.nbytes, "iterations": iterations, "memory": self.memory}
        )
        if "unsupported" in replies[0]:
            raise Unsupported(replies[0]["unsupported"])
        return [reply["seconds"] for reply in replies]

    def forget(self) -> None:
        self.group.ask({"do": "forget"})

    def close(self) -> None:
        self.group.close()


# --- the floor ---


def build_floor() -> Path:
    """Compiles bench/floor.cpp for this CPU, once per change. Raises ContenderError where it cannot."""
    source = Path(package_path()) / "bench" / "floor.cpp"
    if not source.exists():
        raise ContenderError("the floor needs bench/floor.cpp of the source tree")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise ContenderError("the floor needs a C++20 compiler (g++)")
    program = Path(package_path()) / "build" / "bench" / "floor"
    if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-O3", "-march=native", "-std=c++20", "-pthread"]
    with tempfile.TemporaryDirectory(dir=program.parent) as folder:
        # Built aside and renamed, so that another run never starts half a program.
        fresh = Path(folder) / "floor"
        done = subprocess.run(
            [compiler, *flags, str(source), "-o", str(fresh)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            raise ContenderError(f"bench/floor.cpp does not compile: {done.stderr.strip().splitlines()[-1]}")
        fresh.rename(program)
    return program


class Floor(Runner):
    """The least traffic that the collective needs on one host, by threads over mapped buffers. Always in place."""

    label = "floor"

    def __init__(self, ranks: int) -> None:
        self._process = subprocess.Popen(
            [str(build_floor()), str(ranks), "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _ask(self, case: Case, iterations: int) -> list[float]:
        if case.dtype != "float32" or case.op != "sum" or case.collective == "barrier":
            raise Unsupported("the floor is a float32 sum")
        assert self._process.stdin and self._process.stdout
        line = ""
        with contextlib.suppress(OSError):
            self._process.stdin.write(f"{case.collective} {case.size} {iterations}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise ContenderError("the floor program ended")
        return [float(word) for word in line.split()]

    def prepare(self, case: Case, sample: Sample) -> float:
        return statistics.median(self._ask(case, 5))

    def measure(self, case: Case, sample: Sample, iterations: int) -> None:
        sample.add([self._ask(case, iterations)])

    def close(self) -> None:
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()


# --- Intel MPI Benchmarks: an MPI without Python ---

IMB_NAMES = {
    "all_reduce": "allreduce",
    "reduce": "reduce",
    "broadcast": "bcast",
    "all_gather": "allgather",
    "reduce_scatter": "reduce_scatter_block",
    "all_to_all": "alltoall",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
}


class Imb(Runner):
    """IMB-MPI1 of Intel MPI. It reports averages, so that p99 stays empty; it is started anew for each round."""

    label = "imb"

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        mpi_start("impi", ranks)
        if not (peers_folder() / "impi" / "bin" / "IMB-MPI1").exists():
            raise ContenderError("this Intel MPI has no IMB-MPI1")

    def prepare(self, case: Case, sample: Sample) -> float:
        if case.dtype != "float32" or case.op != "sum":
            raise Unsupported("IMB sums float32")
        return 0.0

    def measure(self, case: Case, sample: Sample, iterations: int) -> None:
        program = str(peers_folder() / "impi" / "bin" / "IMB-MPI1")
        # IMB counts what a rank sends to one other rank.
        nbytes = (
            case.size // self.ranks
            if case.collective in ("all_gather", "all_to_all", "gather", "scatter")
            else case.size
        )
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as lengths:
            lengths.write(f"{nbytes}\n")
            lengths.flush()
            arguments = [program, IMB_NAMES[case.collective], "-npmin", str(self.ranks), "-msglen", lengths.name]
            start = mpi_start("impi", self.ranks, arguments)
            try:
                done = subprocess.run(
                    start.argv,
                    env=os.environ | start.env,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=120,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise ContenderError("IMB-MPI1 did not end in 120 s") from None
        sample.p50s.append(parse_imb(done.stdout, nbytes))


def parse_imb(text: str, nbytes: int) -> float:
    """Seconds (t_max: of the slowest rank, as ours are) of the row for `nbytes`, or of the only row of a barrier."""
    for line in text.splitlines():
        words = line.split()
        if len(words) == 5 and words[0] == str(nbytes):
            return float(words[3]) * 1e-6
        if len(words) == 4 and words[0].isdecimal() and "." in words[2]:
            return float(words[2]) * 1e-6
    raise ContenderError(f"IMB-MPI1 printed no row for {nbytes} bytes")


# --- everybody ---

ALL = ("gloo", *MPIS, "imb", "floor")


def start_contender(name: str, place: Place) -> list[Runner]:
    """The runners of a peer. Raises ContenderError where it is not installed or cannot run here."""
    if name == "gloo":
        return [GroupRunner("gloo", Group("gloo", place.ranks, place.starts(), ["gloo"]))]
    if name.startswith("torch="):  # any other torch.distributed backend: torch=BACKEND[,MODULE]
        backend, _, module = name.removeprefix("torch=").partition(",")
        arguments = ["gloo", f"backend={backend}", f"module={module}"]
        return [GroupRunner(f"torch:{backend}", Group(name, place.ranks, place.starts(), arguments))]
    if place.hosts:
        raise ContenderError(f"{name} does not run between emulated hosts")
    if name in MPIS:
        return [GroupRunner(name, Group(MPIS[name].title, place.ranks, [mpi_start(name, place.ranks)], ["mpi"]))]
    if name == "floor":
        return [Floor(place.ranks)]
    if name == "imb":
        return [Imb(place.ranks)]
    raise ContenderError(f"no contender '{name}'; there are {', '.join(ALL)} and torch=BACKEND[,MODULE]")


def start_ours(
    place: Place,
    memory: Sequence[str],
    arrays: str = "torch",
    algorithm: str = "",
    transport: str = "",
    native: bool = False,
) -> list[Runner]:
    """paracomm's runners: one a kind of memory, and the native loop where asked for, over one group of processes."""
    options = [f"arrays={arrays}", f"algorithm={algorithm}", f"transport={transport}"]
    group = Group("paracomm", place.ranks, place.starts(), ["paracomm", *options])
    runners: list[Runner] = [GroupRunner(f"paracomm {kind}", group, kind) for kind in memory]
    if native:
        runners += [GroupRunner(f"native {kind}", group, kind, native=True) for kind in memory]
    return runners
