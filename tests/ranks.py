"""Runs a function on N ranks, as forked processes or as threads, in milliseconds instead of a torchrun's seconds.

    from ranks import Rank, run_ranks

    def check_sum(rank: Rank, count: int) -> None:
        comm = rank.connect()
        ...

    run_ranks(4, check_sum, 1000)

Whatever ranks raise comes back with their tracebacks. A rank that hangs is killed when the time is up, and named.
"""

import contextlib
import os
import pickle
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest

TIMEOUT_S = 60.0


@dataclass
class Rank:
    """What a rank's function is given. `exchange` gathers everyone's bytes, in rank order: all ranks must call it."""

    rank: int
    world_size: int
    exchange: Callable[[bytes], list[bytes]]
    threads: bool = False

    def connect(self, **options: Any) -> Any:
        """This rank's communicator: `paracomm.connect(...)`; ranks that are threads use the transport "local"."""
        import paracomm

        if self.threads:
            options.setdefault("transport", "local")
        return paracomm.connect(self.rank, self.world_size, exchange=self.exchange, **options)


@dataclass
class Outcome:
    """How a rank ended: it returned `value`, raised `error`, died of `exit_code`, or did not end at all."""

    rank: int
    ended: bool = False
    value: Any = None
    error: BaseException | None = None
    traceback: str = ""
    exit_code: int | None = None
    seconds: float = 0.0

    @property
    def failure(self) -> str:
        """Empty if the rank returned."""
        if not self.ended:
            return f"rank {self.rank} had not ended after {self.seconds:.1f} s"
        if self.error is not None or self.traceback:
            return f"rank {self.rank} raised after {self.seconds:.2f} s:\n{self.traceback}"
        if self.exit_code:
            return f"rank {self.rank} died of {exit_reason(self.exit_code)} after {self.seconds:.2f} s"
        return ""


class RanksFailed(AssertionError):
    """At least one rank did not return; the message holds each one's traceback, the earliest first."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    threads: bool = False,
    timeout_s: float = TIMEOUT_S,
    **kwargs: Any,
) -> list[Any]:
    """Runs `function(Rank, *args, **kwargs)` on every rank and returns the results in rank order.

    Raises RanksFailed if a rank raised, died or hung; a `pytest.skip` on any rank skips the test.
    """
    outcomes = rank_outcomes(world_size, function, *args, threads=threads, timeout_s=timeout_s, **kwargs)
    for outcome in outcomes:
        if isinstance(outcome.error, pytest.skip.Exception):
            raise outcome.error
    failures = [outcome.failure for outcome in sorted(outcomes, key=lambda outcome: outcome.seconds) if outcome.failure]
    if failures:
        raise RanksFailed(f"{len(failures)} of {world_size} ranks failed\n\n" + "\n".join(failures))
    return [outcome.value for outcome in outcomes]


def rank_outcomes(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    threads: bool = False,
    timeout_s: float = TIMEOUT_S,
    casualties: Iterable[int] = (),
    **kwargs: Any,
) -> list[Outcome]:
    """Like `run_ranks`, but reports how every rank ended instead of raising.

    `casualties` are ranks that may never end, such as one that stops itself: nobody waits for them, and they are killed
    when the others are done.
    """
    if threads:
        return _run_threads(world_size, function, args, kwargs, timeout_s)
    return _run_processes(world_size, function, args, kwargs, timeout_s, frozenset(casualties))


def exit_reason(exit_code: int) -> str:
    """ "SIGKILL" for -9, "exit code 3" for 3."""
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- processes ---
@dataclass
class _Child:
    outcome: Outcome
    process: Any
    connection: Connection
    pidfd: int
    blob: bytes | None = None


def _run_processes(
    world_size: int,
    function: Callable[..., Any],
    args: tuple,
    kwargs: dict,
    timeout_s: float,
    casualties: frozenset[int],
) -> list[Outcome]:
    children: list[_Child] = []
    environment = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    start = time.monotonic()
    try:
        for rank in range(world_size):
            ours, theirs = get_context("fork").Pipe()
            own = {name: str(value) for name, value in (environment | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            process = get_context("fork").Process(
                target=_child_main, args=(theirs, own, rank, world_size, function, args, kwargs), name=f"rank {rank}"
            )
            process.start()
            theirs.close()
            children.append(_Child(Outcome(rank), process, ours, os.pidfd_open(process.pid)))
        _serve(children, start, timeout_s, casualties)
    finally:
        for child in children:
            _end(child)
    return [child.outcome for child in children]


def say_goodbye(rank: Rank, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """run_ranks(n, say_goodbye, function, ...): function(rank, ...), and then the end that an interpreter has.

    The processes of run_ranks just stop, and a neighbour that still reads what a rank sent last would raise PeerLost.
    """
    from paracomm.comm import communicator

    found = function(rank, *args, **kwargs)
    communicator.close_all()
    return found


def _child_main(
    connection: Connection,
    environment: dict[str, str],
    rank: int,
    world_size: int,
    function: Callable[..., Any],
    args: tuple,
    kwargs: dict,
) -> None:
    os.setsid()  # whatever this rank starts dies with it
    os.environ.update(environment)

    def exchange(blob: bytes) -> list[bytes]:
        connection.send(("exchange", bytes(blob)))
        return connection.recv()

    try:
        message = pickle.dumps(("value", function(Rank(rank, world_size, exchange), *args, **kwargs)))
    except pytest.skip.Exception as skip:  # cannot be pickled
        message = pickle.dumps(("skip", skip.msg))
    except BaseException as error:  # an exit and an interrupt are outcomes too
        text = traceback.format_exc()
        try:
            message = pickle.dumps(("error", error, text))
            pickle.loads(message)
        except Exception:
            message = pickle.dumps(("error", None, text))
    connection.send_bytes(message)


def _serve(children: list[_Child], start: float, timeout_s: float, casualties: frozenset[int]) -> None:
    """Answers exchanges and notes endings until every rank but the casualties has ended, or the time is up."""
    while awaited := [child for child in children if not child.outcome.ended]:
        left = start + timeout_s - time.monotonic()
        if left <= 0 or all(child.outcome.rank in casualties for child in awaited):
            break
        ready = wait([child.connection for child in awaited] + [child.pidfd for child in awaited], left)
        for child in awaited:
            if child.connection in ready or child.pidfd in ready:
                _listen(child, dead=child.pidfd in ready)
        if all(child.blob is not None for child in children):
            blobs = [child.blob for child in children]
            for child in children:
                child.blob = None
                with contextlib.suppress(BrokenPipeError):
                    child.connection.send(blobs)
        for child in awaited:
            child.outcome.seconds = time.monotonic() - start


def _listen(child: _Child, dead: bool) -> None:
    try:
        while child.connection.poll():
            kind, *payload = child.connection.recv()
            if kind == "exchange":
                child.blob = payload[0]
            elif kind == "value":
                child.outcome.value, child.outcome.ended = payload[0], True
            elif kind == "skip":
                child.outcome.error, child.outcome.ended = pytest.skip.Exception(payload[0]), True
            else:
                child.outcome.error, child.outcome.traceback, child.outcome.ended = payload[0], payload[1], True
    except (EOFError, ConnectionResetError):
        dead = True
    child.outcome.ended |= dead


def _end(child: _Child) -> None:
    """Lets a rank that has reported finish by itself; kills any other, and all that either started."""
    if child.outcome.ended:
        wait([child.pidfd], 5)
    # Before it is reaped, so that its number cannot have become someone else's.
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(child.process.pid, signal.SIGKILL)
    child.process.join()
    child.outcome.exit_code = child.process.exitcode
    child.process.close()
    child.connection.close()
    os.close(child.pidfd)


# --- threads ---
def _run_threads(
    world_size: int, function: Callable[..., Any], args: tuple, kwargs: dict, timeout_s: float
) -> list[Outcome]:
    outcomes = [Outcome(rank) for rank in range(world_size)]
    blobs = [b""] * world_size
    barrier = threading.Barrier(world_size)
    start = time.monotonic()

    def rank_main(outcome: Outcome) -> None:
        def exchange(blob: bytes) -> list[bytes]:
            blobs[outcome.rank] = bytes(blob)
            barrier.wait(timeout_s)
            gathered = list(blobs)
            barrier.wait(timeout_s)
            return gathered

        try:
            outcome.value = function(Rank(outcome.rank, world_size, exchange, threads=True), *args, **kwargs)
        except BaseException as error:
            outcome.error, outcome.traceback = error, traceback.format_exc()
            barrier.abort()
        outcome.seconds, outcome.ended = time.monotonic() - start, True

    # Daemons: a thread cannot be killed, and one that hangs must not keep the test run from ending.
    workers = [threading.Thread(target=rank_main, args=(outcome,), daemon=True) for outcome in outcomes]
    for worker in workers:
        worker.start()
    for worker, outcome in zip(workers, outcomes, strict=True):
        worker.join(max(0.0, start + timeout_s - time.monotonic()))
        if not outcome.ended:
            outcome.seconds = time.monotonic() - start
    return outcomes
