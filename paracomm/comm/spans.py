"""What the communicator writes into the timeline: an operation while it is under way, and a thread that is blocked."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from paracomm.timeline import clock, record

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paracomm import _C

WORLD = "world"
"""The axis of a communicator that nobody has named."""

Label = dict[str, Any]
"""`axis` and `operation`, and what else is shown beside it. None in its place: nothing is shown."""
EARLIER: Label = {"axis": "unknown", "operation": "operation"}
"""Of what was launched before the record began."""


def blocked(label: Label) -> AbstractContextManager[None]:
    """Around what this thread is blocked in."""
    return record.span("wait", label["operation"], **label)


@contextmanager
def runs(label: Label) -> Iterator[None]:
    """Around an operation that this thread runs to its end."""
    start_ns = clock.now()
    try:
        with blocked(label):
            yield
    finally:
        record.add("communication", label["operation"], start_ns, clock.now(), lane=label["axis"], **label)


def launched(core: _C.Work, label: Label) -> None:
    """An operation that goes on by itself."""

    def times() -> tuple[int, int] | None:
        return (core.began_ns, core.ended_ns) if core.done() else None

    record.later("communication", label["operation"], times, lane=label["axis"], **label)
