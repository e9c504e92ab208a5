"""The handle of an asynchronous operation."""

from __future__ import annotations

from typing import Any

from paracomm import _C
from paracomm.comm import spans
from paracomm.comm.arguments import seconds
from paracomm.timeline import record


class Work:
    """An operation under way. Its arrays must stay as they are until `wait()` returned or `done()` is true.

    The Work holds their memory, also when an array is dropped or set to another one. What it cannot hold is the memory
    inside a torch storage that is resized meanwhile (`x.untyped_storage().resize_(0)`): no backend can.
    """

    joins = False
    """True: `wait()` only lets the current stream wait."""

    def __init__(
        self,
        core: _C.Work,
        result: Any,
        keep: list[Any],
        label: spans.Label | None = spans.EARLIER,
    ):
        self._core = core
        self._result = result
        self._keep = keep  # the memory that the operation uses
        self._label = label

    def wait(self, timeout_s: float | None = None) -> Any:
        """Blocks until the operation is complete and returns its result. A waiting thread runs the operation itself.

        Raises:
            Timeout: not complete after `timeout_s` seconds (None: the operation's own timeout). The communicator is of
                no further use then, on any rank: the operation still had the caller's memory in use.
            PeerLost, Mismatch, Error: what the operation failed with, on every call.
        """
        limit = seconds("timeout_s", timeout_s)
        if record.current is None or self._label is None or self._core.done():
            self._core.wait(limit)
        else:
            with spans.blocked(self._label):
                self._core.wait(limit)
        self._keep.clear()
        return self._result

    def done(self) -> bool:
        """True when the operation is complete, its results are where they belong, or it has failed. Never blocks."""
        over: bool = self._core.done()
        if over:
            self._keep.clear()
        return over

    test = done

    @property
    def source(self) -> int:
        """The rank that a receive got its message from; -1 before that and for anything else."""
        return self._core.source

    def exception(self) -> BaseException | None:
        """What the operation failed with; None while it runs and when it succeeded. Never blocks."""
        if not self._core.done():
            return None
        try:
            self._core.wait(0.0)
        except Exception as error:
            return error
        return None
