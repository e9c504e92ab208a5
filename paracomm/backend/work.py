"""`torch.distributed.Work` over operations of the core, and the futures that go with it."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from paracomm import background
from paracomm.comm.compiled import untraced
from paracomm.comm.streams import SideStream
from paracomm.errors import Error, InvalidArgument

Tensors = list[torch.Tensor]


def seconds(timeout: timedelta | None) -> float | None:
    """None where torch means "the default": nothing, zero (kNoTimeout) or less (kUnsetTimeout)."""
    if timeout is None:
        return None
    if not isinstance(timeout, timedelta):
        raise InvalidArgument(f"a timeout is a datetime.timedelta, got {timeout!r}")
    value = timeout.total_seconds()
    return value if value > 0 else None


class _Whole(dist.Work):
    """A Work whose Python half lives as long as the half of C++.

    torch's C++ may hold its half alone, as the reducer does for DistributedDataParallel.join. Without the Python half
    no override is found, and c10d::Work::wait has no end. So a Python half that dies first is kept until nobody holds
    the other (see _holders), or, where that cannot be seen, the last ones are.
    """

    def __del__(self) -> None:
        with _kept_lock:
            if _holders is None:
                _last.append(self)
                return
            for work in [work for work in _kept if _holders(work) == 1]:
                _kept.discard(work)
            if _holders(self) > 1:
                _kept.add(self)

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def synchronize(self) -> None:
        self.wait()


class Work(_Whole):
    """One call of a collective, a send or a receive: one or more operations of the core, which complete themselves.

    Args:
        parts: operations of the core, which have wait(timeout_s) and done().
        value: what the future holds, or a function of it.
        publisher: of the group's collectives; None: of a send, a receive or an exchange of such.
        backward: of the group, if the reducer may have called.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        value: Callable[[], Tensors] | Tensors,
        publisher: Publisher | None = None,
        backward: Backward | None = None,
    ) -> None:
        super().__init__()
        self._parts, self._value = parts, value
        self._publisher, self._backward = publisher, backward
        self._future: Any = None

    # torch's C++ calls these two through its trampoline, Python calls them all.
    def wait(self, timeout: timedelta | None = None) -> bool:
        """Raises what the operation failed with, on every call. Any number of threads may wait."""
        limit_s = seconds(timeout)
        for part in self._parts:
            part.wait(limit_s)
        return True

    def get_future(self) -> Any:
        """A torch.futures.Future of the tensors. Never waits, but where Python asks for it in a backward pass.

        There gradient hooks do, whose callbacks start collectives of their own (as PowerSGD's do). Callbacks that ran
        on another thread would start them in another order on every rank.
        """
        for_cpp = not called_from_python("get_future")
        if not for_cpp and torch._C._current_graph_task_id() != -1:
            self.wait()
        with _futures:
            if self._future is None:
                # An exception that is set is a value to C++; one that a callback raises is a RuntimeError to Python.
                trigger = future_of(self.value())
                self._future = trigger.then(self._outcome) if for_cpp else trigger
                promise = Promise(self, trigger, for_cpp)
                if self.is_completed():
                    promise.keep()
                else:
                    if for_cpp and self._backward is not None:
                        self._backward.expect(promise)
                    else:
                        (self._publisher or Publisher()).put(promise)
            return self._future

    def _outcome(self, done: Any) -> Tensors:
        self.wait()
        value: Tensors = done.value()
        return value

    def value(self) -> Tensors:
        return self._value() if callable(self._value) else self._value

    def is_completed(self) -> bool:
        return all(part.done() for part in self._parts)

    def exception(self) -> BaseException | None:
        return self.failure() if self.is_completed() else None

    def failure(self) -> BaseException | None:
        """What the operation failed with, once it is over, which this waits for."""
        try:
            self.wait()
        except Exception as error:
            return error
        return None

    def result(self) -> Tensors:
        self.wait()
        return self.value()

    def source_rank(self) -> int:
        """The rank that a receive got its message from; -1 for anything else."""
        return int(self._parts[0].source) if len(self._parts) == 1 else -1

    _source_rank = source_rank


class DeviceWork(_Whole):
    """A call on tensors of a GPU. All of it is on streams; no method but `wait` with a timeout blocks the host. What
    the operation fails with is raised by whoever asks after that, and by later calls."""

    def __init__(self, parts: Sequence[Any], value: Callable[[], Tensors] | Tensors, side: SideStream) -> None:
        super().__init__()
        self._parts, self._side = parts, side
        self._future: Any = None
        with side.after(side.now(), parts, value) as ends:
            for part in parts:
                part.wait()
            self._value = value() if callable(value) else value
        self._event = ends[0]

    def wait(self, timeout: timedelta | None = None) -> bool:
        """The current stream waits; with a timeout, so does the host."""
        self._raise()
        limit_s = seconds(timeout)
        if limit_s is not None:
            for part in self._parts:
                part.wait(limit_s)
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

    def exception(self) -> BaseException | None:
        return next((error for part in self._parts if (error := part.exception()) is not None), None)

    def result(self) -> Tensors:
        self.wait()
        return self._value

    def source_rank(self) -> int:
        return -1

    _source_rank = source_rank

    def _raise(self) -> None:
        if (error := self.exception()) is not None:
            raise error


def future_of(value: Tensors) -> Any:
    """A future for these tensors: it has to know of the GPUs where they are, to have streams wait for each other."""
    return torch.futures.Future(devices=sorted({tensor.device for tensor in value if tensor.is_cuda}, key=str))


class Promise:
    """A future, and the work that it waits for. Several threads may keep it; the first does."""

    def __init__(self, work: Work, future: Any, for_cpp: bool) -> None:
        self._work, self._future, self._for_cpp = work, future, for_cpp
        self._kept = False

    def settle(self) -> BaseException | None:
        """Waits for the work; returns what it failed with."""
        return self._work.failure()

    def keep(self) -> None:
        """Completes the future, whose callbacks run in this thread."""
        error = self.settle()
        with _promises:
            if self._kept:
                return
            self._kept = True
        if error is None or self._for_cpp:  # a callback raises it to C++
            self._future.set_result(self._work.value())
        else:
            self._future.set_exception(error)


class Backward:
    """What DistributedDataParallel's reducer has asked one group for in a backward pass.

    On one host nobody begins it before the end of the pass: moving bytes costs processor time there, so that nothing
    could be hidden behind computing. Then, before the reducer waits for the futures in C++, which would make a
    RuntimeError of each error, the thread of the pass waits for the operations and raises what they failed with. Where
    that end does not come, as in a callback of the reducer's own, another thread goes on a moment after the last call.
    """

    MOMENT_S = 0.05
    _under_way: ClassVar[set[Backward]] = set()
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, kick: Callable[[], None]) -> None:
        self._kick = kick
        self._promises: list[Promise] = []
        self._task = -1
        self._last = 0.0
        self._watched = False
        self._begin: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def called(self) -> None:
        """An operation was launched."""
        with self._lock:
            self._last = time.monotonic()
            self._under_way.add(self)
            if self._watched:
                return
            self._watched = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="paracomm backward", daemon=True)
                self._thread.start()
        self._begin.put(None)

    def expect(self, promise: Promise) -> None:
        """Its future was asked for."""
        task = torch._C._current_graph_task_id()
        with self._lock:
            self._promises.append(promise)
            queued, self._task = self._task == task, task
        if not queued and task != -1:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._end)
        self.called()

    def _end(self) -> None:
        with self._lock:
            promises, self._promises, self._task = self._promises, [], -1
            self._under_way.discard(self)
            others = list(self._under_way)
        for group in others:  # what other ranks may wait for first
            group._kick()
        errors = [promise.settle() for promise in promises]
        for promise in promises:
            promise.keep()
        for error in errors:
            if error is not None:
                raise error

    def _watch(self) -> None:
        while True:
            self._begin.get()
            while (left_s := self._last + self.MOMENT_S - time.monotonic()) > 0:
                time.sleep(left_s)
            with self._lock:
                self._watched = False
                promises = list(self._promises)
            with background.busy(), contextlib.suppress(Error):  # a forked child has no operations
                self._kick()
            with background.busy():
                for promise in promises:
                    promise.keep()
            del promises


class Publisher:
    """Threads that wait for operations and complete their futures; a group has one for its collectives, a send or a
    receive, which may have to wait for a later one, its own.

    One thread leads: it waits for the operations in their order. Before it completes a future, whose callbacks may take
    any time and wait for later operations, it hands the lead to another thread.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Promise] = queue.SimpleQueue()
        self._lead = threading.Lock()
        self._count = threading.Lock()
        self._spare = 0  # threads that lead or wait for the lead

    def put(self, promise: Promise) -> None:
        self._queue.put(promise)
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
                    promise = self._queue.get()
                    stack.enter_context(background.busy())
                    promise.settle()
                    with self._count:
                        self._spare -= 1
                if not self._queue.empty():
                    self._provide()
                try:
                    promise.keep()
                finally:
                    del promise
            with self._count:
                self._spare += 1


def called_from_python(method: str) -> bool:
    """Whether Python code called `method` of the caller's; where torch's C++ did, the last frame is of whoever called
    that, or there is none."""
    try:
        return method in sys._getframe(2).f_code.co_names
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

    joins = False

    def wait(self, timeout_s: float | None = None) -> None:
        pass

    def done(self) -> bool:
        return True


def _count_of_holders() -> Callable[[Any], int] | None:
    """A function that counts who holds the C++ half of a Work, its Python half included. None: this torch's objects
    look otherwise.

    torch has no call for that. An object of pybind11 begins, after Python's header, with the pointer to its C++ half; a
    c10::intrusive_ptr_target begins with a table of functions and the count.
    """

    def holders(work: Any) -> int:
        half = ctypes.c_size_t.from_address(id(work) + object.__basicsize__).value
        return ctypes.c_uint32.from_address(half + ctypes.sizeof(ctypes.c_void_p)).value

    probe = type("Probe", (dist.Work,), {})()
    if not hasattr(probe, "boxed"):
        return None
    alone = holders(probe)
    boxes = [probe.boxed() for _ in range(3)]
    together = holders(probe)
    del boxes
    return holders if (alone, together, holders(probe)) == (1, 4, 1) else None


_holders = _count_of_holders()
_kept: set[Any] = set()
_last: deque[Any] = deque(maxlen=16)
_kept_lock, _futures, _promises = threading.RLock(), threading.RLock(), threading.Lock()
COMPLETED = _Completed()
for kind in (_Whole, Work, DeviceWork, _Completed):
    untraced(kind)
