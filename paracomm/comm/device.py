"""The device side of a communicator: collectives of arrays in a GPU's memory, or in an emulated GPU's.

PARACOMM_DEVICE says which:

| value | arrays on GPUs | arrays on the CPU |
|---|---|---|
| not set | over device memory, which the ranks of a host map; staged between hosts | over the host's transports |
| emulated | refused | as an emulated GPU's memory; over the host's transports between hosts |
| host | staged through (pinned) host memory, over the host's transports | over the host's transports |
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from paracomm import _C
from paracomm.comm import spans
from paracomm.comm.arrays import HOST, View, is_cupy, name_of, view
from paracomm.comm.work import Work
from paracomm.errors import Error, InvalidArgument

_GOOD, _BAD = b"+", b"-"

MODES = {
    "": "arrays on GPUs go over device memory between the ranks of a host, and through host memory between hosts",
    "emulated": "PARACOMM_DEVICE=emulated: arrays on the CPU are memory of emulated GPUs",
    "host": "PARACOMM_DEVICE=host: arrays on GPUs go through host memory",
}
"""What each value of PARACOMM_DEVICE makes of arrays."""


def mode() -> str | None:
    """None, "emulated" or "host", as PARACOMM_DEVICE says. Raises InvalidArgument for any other value."""
    value = os.environ.get("PARACOMM_DEVICE", "")
    if value not in MODES:
        expected = " or ".join(repr(known) for known in MODES if known)
        raise InvalidArgument(f"PARACOMM_DEVICE is {value!r}, expected {expected}, or nothing")
    return value or None


@dataclass(frozen=True)
class Lane:
    """Where one operation runs: after what `stream` of the device holds."""

    device: Device
    stream: int


class Device:
    """A rank's device in a communicator. Made by `Communicator.use_device`."""

    def __init__(self, core: _C.Communicator, executor: _C.DeviceExecutor) -> None:
        self._core = core
        self._executor = executor
        self._in_flight: deque[tuple[_C.Work, list[Any]]] = deque()
        self.kind: str = executor.kind
        """ "cuda" or "emulated"."""
        self.index: int = executor.device
        """As CUDA counts in this process."""
        self.joins: bool = self.kind == "cuda"
        """Streams wait for operations, and the host goes on. Else there are no streams that callers know, and the host
        waits."""

    def __repr__(self) -> str:
        return f"Device({self.kind}:{self.index})"

    def stream(self, like: Any = None) -> int:
        """The number of the stream on this device that the array's library uses now (None: torch or, without it,
        CuPy); 0 where it is emulated."""
        return current_stream(self.index, like) if self.joins else 0

    def lane(self, found: View | None) -> Lane:
        """For an operation on that array.

        Raises:
            InvalidArgument: it is not on this device.
        """
        where = HOST if found is None else found.device
        if found is not None and where != (self.index if self.joins else HOST):
            raise InvalidArgument(f"the array is on {name_of(where)}, this communicator's device is {self!r}")
        named = None if found is None else found.stream
        return Lane(self, self.stream() if named is None else named)

    def run(
        self, lane: Lane, arguments: tuple[Any, ...], async_op: bool, result: Any, keep: tuple[Any, ...],
        finish: Callable[[], None] | None, label: spans.Label | None,
    ) -> Any:  # fmt: skip
        """The operation of the core's `arguments`; returns `result`, or its Work if `async_op`.

        Args:
            keep: the memory that it uses.
            finish: what is left to do after it.
            label: what a timeline shows of it.
        """
        # What is called without async_op needs nobody to keep its memory: what frees it comes later on the stream.
        kept = list(keep) if async_op else []
        # The host completes what has its memory; what follows an operation on a GPU goes onto a stream.
        core = self._launch(lane, arguments, kept, None if self.joins else finish)
        if label is not None and label is not spans.EARLIER:
            spans.launched(core, label)
        if async_op and self.joins:
            return DeviceWork(lane, core, result, kept, finish, label)
        work = Work(core, result, kept, label)
        if async_op:
            return work
        if not self.joins:
            return work.wait()
        self.join(core, lane.stream)
        if finish is not None:
            finish()
        return result

    def _launch(
        self, lane: Lane, arguments: tuple[Any, ...], kept: list[Any], finish: Callable[[], None] | None
    ) -> _C.Work:
        core = self._core.submit_device(*(lane.stream, *arguments, finish))
        # They are complete in their order; one that nobody waits for has its memory in use until then.
        while self._in_flight and self._in_flight[0][0].done():
            self._in_flight.popleft()
        if kept:
            self._in_flight.append((core, kept))
        return core

    def join(self, core: _C.Work, stream: int) -> None:
        """The stream goes on when the operation is complete. Does not block."""
        self._executor.join(core, stream)

    def bucket(self, arrays: Sequence[Any]) -> Bucket:
        """Arrays that go into one flat array together, again and again.

        Args:
            arrays: contiguous, of one dtype, on this device. They stay where they are.

        Raises:
            InvalidArgument: they are not.
        """
        return Bucket(self, self._executor, arrays)

    def forget(self) -> None:
        """Nothing is under way any more: the communicator is closed."""
        self._in_flight.clear()


class Bucket:
    """Arrays packed into a flat one, and unpacked: one launch each, in which floats are cast and scaled."""

    def __init__(self, device: Device, executor: _C.DeviceExecutor, arrays: Sequence[Any]) -> None:
        self._device, self._executor = device, executor
        self._arrays = list(arrays)
        views = [view(array) for array in self._arrays]
        if not views:
            raise InvalidArgument("a bucket needs at least one array")
        for found in views:
            device.lane(found)
            if not found.contiguous or found.dtype != views[0].dtype or not found.writable:
                raise InvalidArgument("arrays of a bucket are contiguous, writable and of one dtype")
        self.count = sum(found.count for found in views)
        """Elements of the flat array."""
        offset, items = 0, []
        for found in views:
            items.append((found.address, found.count, offset))
            offset += found.count
        self._core = executor.bucket(items, views[0].dtype)

    def pack(self, flat: Any, scale: float = 1.0) -> None:
        """flat[...] = the arrays, one after the other, times `scale`, in flat's dtype.

        Raises:
            InvalidArgument: flat has another size or device; or a cast or scale of what are no floats.
        """
        self._convert(self._executor.pack, flat, scale)

    def unpack(self, flat: Any, scale: float = 1.0) -> None:
        """The arrays = the parts of flat times `scale`, in the arrays' dtype. Raises as pack."""
        self._convert(self._executor.unpack, flat, scale)

    def _convert(self, convert: Callable[..., None], flat: Any, scale: float) -> None:
        found = view(flat)
        lane = self._device.lane(found)
        if found.count != self.count or not found.contiguous:
            raise InvalidArgument(f"the flat array has {found.count} elements, expected {self.count} in one piece")
        convert(self._core, found.address, found.dtype, scale, lane.stream)
        if not self._device.joins:
            self._executor.synchronize(lane.stream)


class DeviceWork(Work):
    """An operation on a GPU. `wait()` lets the current stream wait for it, and the host goes on; with `timeout_s` the
    host waits as well."""

    joins = True

    def __init__(
        self, lane: Lane, core: _C.Work, result: Any, keep: list[Any], finish: Callable[[], None] | None,
        label: spans.Label | None,
    ) -> None:  # fmt: skip
        super().__init__(core, result, keep, label)
        self._lane = lane
        self._finish = finish
        self._finishing = threading.Lock()

    def wait(self, timeout_s: float | None = None) -> Any:
        """Lets the stream that torch or CuPy uses now wait for the operation, and returns its result.

        Raises:
            Timeout, PeerLost, Mismatch, Error: as Work.wait, where the operation has ended already, or `timeout_s` is
                given. Otherwise a failure is raised by the communicator's next call, and by `Communicator.check`.
        """
        if timeout_s is not None or self._core.done():
            super().wait(timeout_s)
            self._after()
            return self._result
        stream = self._lane.device.stream(self._result)
        self._lane.device.join(self._core, stream)
        self._after()
        if stream == self._lane.stream:
            self._keep.clear()  # whoever uses that memory next comes later on this stream
        return self._result

    def done(self) -> bool:
        """Work.done, for what comes next on the current stream. Never blocks."""
        over = super().done()
        if over and self.exception() is None:
            self._after()
        return over

    test = done

    def _after(self) -> None:
        """Puts onto the current stream, once, what puts the result into its array."""
        with self._finishing:
            finish, self._finish = self._finish, None
            if finish is not None:
                finish()


def make(core: _C.Communicator, exchange: Callable[[bytes], list[bytes]], kind: str, index: int) -> Device:
    """This rank's device of a communicator whose ranks can map each other's memory. Collective.

    Args:
        exchange: every rank's bytes, in rank order, from this rank's.
        kind: "cuda" or "emulated".

    Raises:
        InvalidArgument: on every rank, if one of them has no such device or cannot reach another one's.
    """
    executor, card = None, b""
    try:
        executor = _C.make_device(core, kind, index)
        card = _GOOD + executor.publish()
    except Error as error:
        card = _BAD + str(error).encode()
    try:
        cards = _agreed(core, exchange(card))
        assert executor is not None  # or its card had said so
        outcome = _GOOD
        try:
            executor.connect(cards)
        except Error as error:
            outcome = _BAD + str(error).encode()
        _agreed(core, exchange(outcome))
        core.attach_device(executor)
    except BaseException:
        if executor is not None:
            executor.close()
        raise
    return Device(core, executor)


def _agreed(core: _C.Communicator, answers: Sequence[bytes]) -> list[bytes]:
    """What ranks answered; all raise if one did not do well."""
    for rank, answer in enumerate(answers):
        if not answer.startswith(_GOOD):
            raise InvalidArgument(
                f"no collective can run on devices: rank {rank} ({core.hosts[rank]}): {answer[1:].decode()}"
            )
    return [answer[1:] for answer in answers]


def emulated_index(core: _C.Communicator) -> int:
    """Ranks of a host take the emulated GPUs in turn."""
    return core.local_ranks.index(core.rank) % max(1, _C.emulated_gpus())


def current_index() -> int:
    """The device that torch or CuPy uses now; 0 where neither is there."""
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        return int(torch.cuda.current_device())
    if (cupy := sys.modules.get("cupy")) is not None:
        return int(cupy.cuda.Device().id)
    return 0


def current_stream(index: int, like: Any = None) -> int:
    """The number of the stream on device `index` that the array's library uses now (None: torch or, without it, CuPy);
    0, the default one, where neither is there."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and torch.cuda.is_available() and not is_cupy(like):
        return int(torch.cuda.current_stream(index).cuda_stream)
    if cupy is not None:
        with cupy.cuda.Device(index):
            return int(cupy.cuda.get_current_stream().ptr)
    return 0
