"""`torch.distributed.Work` over operations of the core, and the futures that go with it."""

from __future__ import annotations

import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from paracomm import background
from paracomm.comm.compiled import untraced
from paracomm.comm.streams import SideStream, event_after
from paracomm.errors import Timeout


def seconds(timeout: timedelta | None) -> float | None:
    """None where torch means "the default": nothing, zero (kNoTimeout) or less (kUnsetTimeout)."""
    value = 0.0 if timeout is None else timeout.total_seconds()
    return value if value > 0 else None


class Work(dist.Work):
    """One call of a collective, a send or a receive: one or more operations of the core, and what follows them.

    No future is completed by the core's progress thread: callbacks run inside `set_result`, and may wait for other
    operations.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        value: list[torch.Tensor],
        finish: Callable[[], None] | None = None,
        publisher: Publisher | None = None,
        overlaps: bool = False,
    ) -> None:
        super().__init__()
        self._publisher = publisher  # of the group's collectives; None: a send, a receive or an exchange of such
        self._overlaps = overlaps
        self._parts = parts
        self._value = value
        self._finish = finish
        self._waiting = threading.Lock()  # one thread waits and finishes; others wait for it
        self._settled = False
        self._error: BaseException | None = None
        self._event: Any = None  # of tensors on a GPU, whose last steps are on a stream
        self._future: Any = None
        if _FORGETFUL:
            _unsettled.add(self)

    # torch's C++ calls these two through its trampoline, Python calls them all.
    def wait(self, timeout: timedelta | None = None) -> bool:
        """Raises what the operation failed with, on every call."""
        if not self._settled:
            self._settle(seconds(timeout))
        if self._error is not None:
            raise self._error
        if self._event is not None:  # another stream may have been the current one of whoever settled this
            self._event.wait(torch.cuda.current_stream(self._event.device))
        return True

    def get_future(self) -> Any:
        """A torch.futures.Future of the tensors.

        That of a collective is complete: this waits, and raises what the operation failed with. Callbacks then run in
        the caller's thread, in the program's order, so that collectives which they start (as PowerSGD's do) come in
        one order on all ranks; and on one host, where moving bytes costs processor time, nothing could be hidden
        behind computing anyway. Between hosts torch's own reducer, whose callbacks start none, does not wait here.
        """
        if self._publisher is None:
            return self._later(Publisher())
        if not self._settled and self._overlaps and not _called_from_python():
            return self._later(self._publisher)
        self.wait()
        with _futures:
            if self._future is None:
                self._future = future_of(self._value)
                self._future.set_result(self._value)
            return self._future

    def _later(self, publisher: Publisher) -> Any:
        """The same, completed by another thread. To C++ and in `then` its error is a RuntimeError that quotes ours."""
        with _futures:
            if self._future is None:
                # `set_exception` would be a value to C++; what a callback raises is an error to everybody.
                trigger = future_of(self._value)
                self._future = trigger.then(self._outcome)
                publisher.put(self, trigger)
            return self._future

    def is_completed(self) -> bool:
        return self._settled or all(part.done() for part in self._parts)

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def exception(self) -> BaseException | None:
        if not self._settled and self.is_completed():
            self._settle(None)
        return self._error

    def result(self) -> list[torch.Tensor]:
        self.wait()
        return self._value

    def synchronize(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        """The rank that a receive got its message from; -1 for anything else."""
        return int(self._parts[0].source) if len(self._parts) == 1 else -1

    _source_rank = source_rank

    def _settle(self, timeout_s: float | None) -> None:
        """Returns when the operation is complete or has failed."""
        if not self._waiting.acquire(timeout=-1 if timeout_s is None else timeout_s):
            raise Timeout(f"the operation was not complete {timeout_s:g} s after wait() was called")
        try:
            if self._settled:
                return
            try:
                for part in self._parts:
                    part.wait(timeout_s)
                if self._finish is not None:
                    self._finish()
                self._event = event_after(self._value)
            except Exception as error:
                self._error = error
            self._settled = True
            self._finish = None
            if _FORGETFUL:
                _unsettled.discard(self)
                _settled_last.append(self)  # every tensor of a coalesced functional collective waits for the same Work
        finally:
            self._waiting.release()

    def _outcome(self, done: Any) -> list[torch.Tensor]:
        if self._error is not None:
            raise self._error
        value: list[torch.Tensor] = done.value()
        return value


class DeviceWork(dist.Work):
    """A call on tensors of a GPU. All of it is on streams, `finish` on the side stream; no method but `wait` with a
    timeout blocks the host. What the operation fails with is raised by whoever asks after that, and by later calls."""

    def __init__(
        self, part: Any, value: list[torch.Tensor], finish: Callable[[], None] | None, side: SideStream
    ) -> None:
        super().__init__()
        self._part, self._value, self._side = part, value, side
        self._future: Any = None
        with side.after(side.now(), part, value, finish) as ends:
            part.wait()
            if finish is not None:
                finish()
        self._event = ends[0]
        if _FORGETFUL:
            _settled_last.append(self)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """The current stream waits; with a timeout, so does the host."""
        self._raise()
        limit_s = seconds(timeout)
        if limit_s is not None:
            self._part.wait(limit_s)
        self._side.join(self._event)
        return True

    def get_future(self) -> Any:
        """Complete at once, on the side stream: whoever waits for it has their current stream wait."""
        self._raise()
        with _futures:
            if self._future is None:
                self._future = future_of(self._value)
                with self._side.after(self._event):
                    self._future.set_result(self._value)
            return self._future

    def is_completed(self) -> bool:
        return self.exception() is not None or bool(self._event.query())

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def exception(self) -> BaseException | None:
        error: BaseException | None = self._part.exception()
        return error

    def result(self) -> list[torch.Tensor]:
        self.wait()
        return self._value

    def synchronize(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        return -1

    _source_rank = source_rank

    def _raise(self) -> None:
        error = self.exception()
        if error is not None:
            raise error


def future_of(value: list[torch.Tensor]) -> Any:
    """A future for these tensors: it has to know of the GPUs where they are, to have streams wait for each other."""
    return torch.futures.Future(devices=sorted({tensor.device for tensor in value if tensor.is_cuda}, key=str))


class Publisher:
    """Threads that wait for operations and complete their futures; a group has one for its collectives, a send or a
    receive, which may have to wait for a later one, its own.

    One thread leads: it waits for the operations in their order. Before it completes a future, whose callbacks may take
    any time and wait for later operations, it hands the lead to another thread.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Work, Any]] = queue.SimpleQueue()
        self._lead = threading.Lock()
        self._count = threading.Lock()
        self._spare = 0  # threads that lead or wait for the lead

    def put(self, work: Work, trigger: Any) -> None:
        self._queue.put((work, trigger))
        self._provide()

    def _provide(self) -> None:
        with self._count:
            if self._spare > 0:
                return
            self._spare += 1
        threading.Thread(target=self._serve, name="paracomm futures", daemon=True).start()

    def _serve(self) -> None:
        while True:
            with ExitStack() as stack:
                with self._lead:
                    work, trigger = self._queue.get()
                    stack.enter_context(background.busy())
                    work._settle(None)
                    with self._count:
                        self._spare -= 1
                if not self._queue.empty():
                    self._provide()
                try:
                    trigger.set_result(work._value)
                finally:
                    del work, trigger
            with self._count:
                self._spare += 1


def _called_from_python() -> bool:
    """Whether Python code called `get_future`; if torch's C++ did, the last frame is of whoever called that."""
    try:
        return "get_future" in sys._getframe(2).f_code.co_names
    except ValueError:  # a thread of C++
        return False


class _Completed(dist.Work):
    """What synchronous calls return: they are over."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def exception(self) -> None:
        return None

    def synchronize(self) -> None:
        pass


class Past:
    """An operation that is over, for `Work(parts=...)`: what this rank sent to itself, say."""

    def __init__(self, source: int = -1) -> None:
        self.source = source

    def wait(self, timeout_s: float | None = None) -> None:
        pass

    def done(self) -> bool:
        return True


# torch 2.6 lets the Python half of a Work go while C++ holds the other, and then waits without end; 2.13 keeps it.
_FORGETFUL = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
_unsettled: set[Work] = set()
_settled_last: deque[dist.Work] = deque(maxlen=16)
_futures = threading.Lock()
COMPLETED = _Completed()
for kind in (Work, DeviceWork, _Completed):
    untraced(kind)
