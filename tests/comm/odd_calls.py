"""Runs odd calls on a pair of ranks that live as long as nothing breaks: a death or a hang is the fault of its call.

Each call ends on each rank as one of: right, wrong (and why), a named error, another error. A good all_reduce on the
same communicator follows each, so that nothing that was sent is left over. `judge` says what of that is not allowed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import pickle
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import paracomm
from tests.comm.odd_arrays import REFUSED, RIGHT
from tests.ranks import free_port

TIMEOUT_S = 4.0  # of an operation
LIMIT_S = 10.0  # of a call
PACKAGE = str(Path(paracomm.__file__).parent)
SENT = ("Timeout", "Mismatch", "PeerLost")


@dataclass
class Prepared:
    """A call with its arguments made: `check` says what is wrong with the result ("": nothing), `after_error` with the
    arguments once the call has failed."""

    call: Callable[[], Any]
    check: Callable[[Any], str] = lambda result: ""
    after_error: Callable[[], str] = lambda: ""


@dataclass(frozen=True)
class Case:
    name: str
    prepare: Callable[[Any], Prepared]
    """Of this rank's seat."""
    expect: str = "right or refused"
    alone: bool = False
    """The argument is odd on rank 0 only, or matters there only: rank 1 may find that rank 0 has left."""
    mismatch: bool = False
    """No rank can tell by itself: Mismatch is the right error."""
    ends: bool = False
    """The call leaves the communicator of no further use, whatever comes out."""


@dataclass
class Ended:
    """How a call ended on a rank."""

    kind: str
    """right, wrong, error, untested (its arguments could not be made), died, hung or stopped."""
    error: str = ""
    named: bool = False
    origin: str = ""
    text: str = ""
    after: str = ""
    """What the all_reduce that followed raised or got wrong."""
    closed: bool = False
    """The rank has left its communicator."""


# --- the ranks ---
class Seat:
    """A rank's place: a communicator of two, renewed when a call has spoilt it."""

    def __init__(self, rank: int, exchange: Callable[[bytes], list[bytes]], port: int) -> None:
        self.rank, self.exchange, self.port, self.peer = rank, exchange, port, 1 - rank
        self.turn = 0
        self.comm: Any = None
        self.store: Any = None

    def open(self) -> None:
        self.comm = paracomm.connect(self.rank, 2, self.exchange, timeout_s=TIMEOUT_S)

    def close(self) -> None:
        self.comm.close()

    def good_call(self) -> str:
        x = np.arange(5.0) + self.rank
        self.comm.all_reduce(x)
        return "" if x.tolist() == [1.0, 3.0, 5.0, 7.0, 9.0] else f"all_reduce gave {x.tolist()}"


class BackendSeat(Seat):
    """The same for torch.distributed's default process group."""

    def open(self) -> None:
        if self.store is None:
            self.store = dist.TCPStore("127.0.0.1", self.port, 2, is_master=self.rank == 0)
        self.turn += 1
        store = dist.PrefixStore(str(self.turn), self.store)
        limit = timedelta(seconds=TIMEOUT_S)
        dist.init_process_group("paracomm", store=store, rank=self.rank, world_size=2, timeout=limit)

    def close(self) -> None:
        dist.destroy_process_group()

    def good_call(self) -> str:
        x = torch.arange(5.0) + self.rank
        dist.all_reduce(x)
        return "" if x.tolist() == [1.0, 3.0, 5.0, 7.0, 9.0] else f"all_reduce gave {x.tolist()}"


def run_case(case: Case, seat: Seat) -> Ended:
    """The call, and what came of it on this rank."""
    try:
        prepared = case.prepare(seat)
    except Exception:
        return Ended("untested", text=traceback.format_exc())
    try:
        result = prepared.call()
    except Exception as error:
        ended = _failed(error)
        with contextlib.suppress(Exception):
            if wrong := prepared.after_error():
                ended.kind, ended.text = "wrong", f"{wrong} (after {ended.error}: {ended.text})"
        return ended
    except BaseException as error:
        return _failed(error)
    try:
        wrong = prepared.check(result)
    except Exception as error:
        return Ended("wrong", error=type(error).__name__, text=f"the result cannot be read: {error}")
    return Ended("wrong", text=wrong) if wrong else Ended("right")


def _failed(error: BaseException) -> Ended:
    """Named: ours, or raised by torch's own code before ours was reached."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    # gate.py only passes on what torch raises.
    ours = any(name.startswith(PACKAGE) and not name.endswith("backend/gate.py") for name in frames)
    outside = not ours and any("/torch/" in name for name in frames)
    named = isinstance(error, paracomm.Error) or (outside and isinstance(error, Exception))
    origin = "paracomm" if ours or isinstance(error, paracomm.Error) else f"torch: {Path(frames[-1]).name}"
    text = (str(error).strip().splitlines() or [""])[0]
    return Ended("error", type(error).__name__, named, origin, text[:200])


def _rank_main(rank: int, cases: Sequence[Case], kind: type[Seat], pipe: Connection, port: int, log: str) -> None:
    os.setsid()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable(descriptor)
    warnings.simplefilter("ignore")

    def exchange(blob: bytes) -> list[bytes]:
        pipe.send(("exchange", bytes(blob)))
        blobs: list[bytes] | None = pipe.recv()
        if blobs is None:
            raise paracomm.PeerLost("the other rank does not connect")
        return blobs

    seat = kind(rank, exchange, port)
    seat.open()
    pipe.send(("ended", Ended("right")))
    while (number := pipe.recv()) is not None:
        case = cases[number]
        ended = run_case(case, seat)
        spoilt = case.ends or (case.alone and ended.kind != "right") or ended.error in SENT
        if not spoilt:
            try:
                ended.after = seat.good_call()
            except Exception as error:
                ended.after = f"{type(error).__name__}: {str(error)[:200]}"
        ended.closed = bool(spoilt or ended.after)
        if ended.closed:
            # As a program that ends on this error does: the other rank learns of it.
            with contextlib.suppress(Exception):
                seat.close()
        pipe.send(("ended", ended))
        if ended.closed and pipe.recv() == "renew":
            seat.open()
            pipe.send(("ended", Ended("right")))
        if number % 64 == 0:
            gc.collect()
    os._exit(0)


# --- the parent ---
class Pair:
    """Two forked ranks, and what they say."""

    def __init__(self, cases: Sequence[Case], kind: type[Seat], folder: Path) -> None:
        self.processes, self.pipes, self.logs = [], [], []
        folder.mkdir()
        port = free_port()
        for rank in range(2):
            ours, theirs = get_context("fork").Pipe()
            log = str(folder / f"log{rank}")
            process = get_context("fork").Process(
                target=_rank_main, args=(rank, cases, kind, theirs, port, log), name=f"rank {rank}"
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
            self.logs.append(log)
        self.whole = all(ended.kind == "right" for ended in self.collect(60.0))

    def tell(self, message: Any) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(message)

    def collect(self, limit_s: float) -> list[Ended]:
        """One end of each rank, serving exchanges meanwhile."""
        ends: list[Ended | None] = [None, None]
        blobs: dict[int, bytes] = {}
        deadline = time.monotonic() + limit_s
        while None in ends:
            open_pipes = [self.pipes[r] for r in range(2) if ends[r] is None]
            ready = wait(open_pipes, max(0.0, deadline - time.monotonic()))
            if not ready:
                return [end or Ended("hung", text=self._stack(r)) for r, end in enumerate(ends)]
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    what, payload = pipe.recv()
                except (EOFError, OSError, pickle.UnpicklingError):
                    self.processes[rank].join(5)
                    code = self.processes[rank].exitcode or 0
                    reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                    ends[rank] = Ended("died", error=reason, text=self._log(rank))
                    deadline = min(deadline, time.monotonic() + TIMEOUT_S + 1)
                    continue
                if what == "exchange":
                    blobs[rank] = payload
                else:
                    ends[rank] = payload
            if len(blobs) == 2:
                self.tell([blobs.pop(0), blobs.pop(1)])
            elif blobs and any(ends[1 - rank] is not None for rank in blobs):
                for rank in list(blobs):
                    del blobs[rank]
                    self.pipes[rank].send(None)
        return [end for end in ends if end is not None]

    def _stack(self, rank: int) -> str:
        with contextlib.suppress(OSError):
            os.kill(self.processes[rank].pid, signal.SIGABRT)
            self.processes[rank].join(2)
        return self._log(rank)

    def _log(self, rank: int) -> str:
        lines = Path(self.logs[rank]).read_text(errors="replace").splitlines()
        return " | ".join(line.strip() for line in lines if "paracomm" in line or "terminate" in line)[-400:]

    def end(self) -> None:
        self.tell(None)
        for process in self.processes:
            process.join(0.2)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        for pipe in self.pipes:
            pipe.close()


@dataclass
class Report:
    calls: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    """The name of the case, and what is not allowed about it."""
    right: int = 0
    refused: int = 0
    torchs: dict[str, int] = field(default_factory=dict)
    """Errors that torch raised before our code was reached, by file and type."""
    pairs: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each call, and of what its end needs: a new communicator, two new ranks."""

    def __str__(self) -> str:
        lines = [f"{self.calls} calls on {self.pairs} pairs: {self.right} right, {self.refused} refused, "
                 f"{len(self.failures)} failures"]  # fmt: skip
        lines += [f"  {name}: {why}" for name, why in self.failures]
        slowest = sorted(self.seconds, key=self.seconds.__getitem__, reverse=True)[:5]
        lines += [f"  {self.seconds[name]:.2f} s: {name}" for name in slowest]
        lines += [f"  raised by torch itself: {count} x {origin}" for origin, count in sorted(self.torchs.items())]
        return "\n".join(lines)


def run_cases(cases: Sequence[Case], kind: type[Seat], folder: Path) -> Report:
    """Every case on two ranks, in order; after a death, a hang or a spoilt communicator on two new ones."""
    report, pair = Report(), None
    folder.mkdir(exist_ok=True)
    try:
        for number, case in enumerate(cases):
            began = time.monotonic()
            if pair is None:
                report.pairs += 1
                pair = Pair(cases, kind, folder / str(report.pairs))
                assert pair.whole, f"two ranks cannot start: {pair._log(0)} {pair._log(1)}"
            pair.tell(number)
            ends = pair.collect(LIMIT_S)
            report.calls += 1
            why = judge(case, ends)
            if why:
                report.failures.append((case.name, why))
            else:
                report.right += ends[0].kind == "right"
                report.refused += ends[0].kind == "error"
            for ended in ends:
                if ended.kind == "error" and ended.named and ended.origin.startswith("torch"):
                    origin = f"{ended.origin}: {ended.error}"
                    report.torchs[origin] = report.torchs.get(origin, 0) + 1
            pair = _go_on(pair, ends, why)
            report.seconds[case.name] = time.monotonic() - began
    finally:
        if pair is not None:
            pair.end()
    return report


def _go_on(pair: Pair, ends: list[Ended], why: str) -> Pair | None:
    """The same pair if it can be used, with a new communicator if the call has ended the old one; None otherwise."""
    usable = not why and all(ended.kind in ("right", "error") for ended in ends)
    if usable and not any(ended.closed for ended in ends):
        return pair
    if usable and all(ended.closed for ended in ends):
        pair.tell("renew")
        if all(ended.kind == "right" for ended in pair.collect(20.0)):
            return pair
    pair.end()
    return None


def judge(case: Case, ends: Sequence[Ended]) -> str:
    """What is not allowed about the outcomes of both ranks; "" if nothing is."""
    first = ends[0]
    for rank, ended in enumerate(ends):
        where = f"rank {rank}"
        if ended.kind in ("died", "hung", "untested"):
            return f"{where} {ended.kind} {ended.error} {ended.text}"
    for rank, ended in enumerate(ends):
        where = f"rank {rank}"
        if ended.kind == "wrong":
            return f"{where}: {ended.text}"
        if ended.kind == "error" and not ended.named:
            return f"{where}: {ended.origin} raised {ended.error}: {ended.text}"
        other = ends[1 - rank]
        left_alone = case.alone and other.kind == "error" and other.error not in SENT
        left_alone |= case.mismatch
        if ended.kind == "error" and ended.error in SENT and not left_alone:
            return f"{where}: refused only after sending: {ended.error}: {ended.text}"
    if not case.alone and (first.kind, first.error) != (ends[1].kind, ends[1].error):
        return "differs: " + ", ".join(f"rank {r} {e.kind} {e.error} {e.text}" for r, e in enumerate(ends))
    for rank, ended in enumerate(ends):
        if ended.after and not (case.alone and ends[1 - rank].kind == "error"):
            return f"rank {rank}: the next all_reduce: {ended.after}"
    if case.expect == RIGHT and first.kind != "right":
        return f"refused: {first.error}: {first.text}"
    if case.expect == REFUSED and first.kind != "error":
        return "accepted"
    return ""


def one_by_one(*cases: Iterator[Case]) -> list[Case]:
    """All cases, whose names differ."""
    found = [case for some in cases for case in some]
    names = [case.name for case in found]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    assert not twice, twice
    return found
