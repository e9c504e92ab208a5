"""The record of this process: who writes into it, and when it is on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from paracomm.errors import Error
from paracomm.timeline.chrome import write
from paracomm.timeline.clock import Clock, align, now

Kind = Literal["step", "compute", "communication", "wait", "bubble"]
"""compute: this thread works. communication: an operation is under way, whoever carries it. wait: this thread is
blocked on a collective. bubble: it is blocked on a neighbour of the pipeline; waits inside of it are part of it. step:
what shares are counted of."""
Times = Callable[[], tuple[int, int] | None]

_OFF = nullcontext()


class Event(NamedTuple):
    """start_ns, end_ns: of clock.now(). lane: of what is under way by itself; "": what `thread`, by its number, did.

    asked_ns: when it was asked for, where that was before it started.
    """

    kind: str
    name: str
    start_ns: int
    end_ns: int
    lane: str
    thread: int
    details: dict[str, Any]
    asked_ns: int = 0


class Record:
    """Events of one rank between start() and stop()."""

    def __init__(self, rank: int, world_size: int, clock: Clock) -> None:
        self.rank = rank
        self.world_size = world_size
        self.clock = clock
        self.thread = threading.get_ident()
        """Who started it: the shares of a step are of what this thread did."""
        self.threads: dict[int, str] = {}
        """Names of all that wrote."""
        self.events: list[Event] = []
        self.start_ns = now()
        self.end_ns = 0
        """0 while it is on."""
        self._later: list[tuple[Event, Times]] = []

    def event(
        self, kind: str, name: str, start_ns: int, end_ns: int, lane: str, details: dict[str, Any], asked_ns: int = 0
    ) -> Event:
        """An event of the calling thread, which the caller puts where it belongs."""
        thread = threading.get_ident()
        if thread not in self.threads:
            self.threads[thread] = threading.current_thread().name
        return Event(kind, name, start_ns, end_ns, lane, thread, details, asked_ns)

    def close(self) -> None:
        """Nothing is added any more. What is still under way has the record's end as its own."""
        self.end_ns = now()
        for event, times in self._later:
            start_ns, end_ns = times() or (event.start_ns, self.end_ns)
            self.events.append(event._replace(start_ns=start_ns, end_ns=end_ns))
        self._later = []

    def write(self, path: str | Path) -> None:
        """As Chrome's trace format, JSON; the folder is made where it does not exist."""
        write(self, Path(path))


current: Record | None = None
"""What everybody writes into; None: nothing is recorded, and that is all that a span costs to find out."""


class _Span:
    __slots__ = ("details", "kind", "name", "record", "start_ns")

    def __init__(self, record: Record, kind: str, name: str, details: dict[str, Any]) -> None:
        self.record, self.kind, self.name, self.details = record, kind, name, details

    def __enter__(self) -> None:
        self.start_ns = now()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self.record.end_ns:
            event = self.record.event(self.kind, self.name, self.start_ns, now(), "", self.details)
            self.record.events.append(event)


def span(kind: Kind, name: str, **details: Any) -> AbstractContextManager[None]:
    """Records what this thread does inside as `name`; spans of a thread lie inside of each other or apart.

    Args:
        details: what is shown beside it, as JSON takes it. Of a wait, `axis` and `operation` say what it is counted as.
    """
    record = current
    return _OFF if record is None else _Span(record, kind, name, details)


def add(kind: Kind, name: str, start_ns: int, end_ns: int, *, lane: str, **details: Any) -> None:
    """Records what was under way by itself from start_ns to end_ns (time.perf_counter_ns), in a lane of that name."""
    record = current
    if record is not None:
        record.events.append(record.event(kind, name, start_ns, end_ns, lane, details))


def later(kind: Kind, name: str, times: Times, *, lane: str, **details: Any) -> None:
    """Like add(), for what has begun now: stop() asks `times` for (start_ns, end_ns), None where it has not ended."""
    record = current
    if record is not None:
        asked = now()
        record._later.append((record.event(kind, name, asked, 0, lane, details, asked), times))


def start(comm: Any = None) -> Record:
    """Begins a record of this process, of which this thread is the main one. Collective over `comm`, if given.

    Args:
        comm: a paracomm.Communicator, over which clocks are aligned: its rank 0's time is everybody's.

    Raises Error if there is a record already, and what communication raises.
    """
    global current
    if current is not None:
        raise Error("timeline: start() came twice, expected a stop() between")
    clock = align(comm)
    current = Record(0 if comm is None else comm.rank, 1 if comm is None else comm.world_size, clock)
    return current


def stop() -> Record:
    """Ends the record and returns it. Raises Error if there is none."""
    global current
    if current is None:
        raise Error("timeline: stop() came without a start()")
    record, current = current, None
    record.close()
    return record
