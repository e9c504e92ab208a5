"""What follows an operation on a GPU, in order, without the stream that computes having to wait for it.

    current stream    | gradients 0 | gradients 1 | gradients 2 | ... | waits for the event
    executor's own          [ all_reduce 0 ]   [ all_reduce 1 ]
    side stream                       | unpack 0 |        | unpack 1 | event

What the side stream reads was allocated for another stream, whose next tensors may get the same memory as soon as
nobody holds it: so it is held here until the side stream is through with it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class SideStream:
    """A stream of torch's beside the current one, on one GPU. Threads may share it.

    Args:
        device: a torch.device of a GPU, or its number.
        cuda: torch.cuda, or what stands in for it.
    """

    def __init__(self, device: Any, cuda: Any = None) -> None:
        if cuda is None:
            import torch

            cuda = torch.cuda
        self._cuda = cuda
        self._device = device
        self._stream = cuda.Stream(device)
        self._held: deque[tuple[Any, Any]] = deque()  # an event of this stream, and what was in use until it
        self._lock = threading.Lock()

    def now(self) -> Any:
        """An event after all that the current stream holds."""
        return self._cuda.current_stream(self._device).record_event()

    @contextmanager
    def after(self, event: Any, *held: Any) -> Iterator[list[Any]]:
        """This stream is the current one, and goes on after `event`. The list that is given holds, at the end, one
        event: after all that was put here. `held` is kept until then."""
        ends: list[Any] = []
        with self._cuda.stream(self._stream):
            self._stream.wait_event(event)
            yield ends
            ends.append(self._stream.record_event())
        self._hold(ends[0], held)

    def join(self, event: Any) -> None:
        """The current stream goes on after `event`. Does not block."""
        self._cuda.current_stream(self._device).wait_event(event)

    def _hold(self, event: Any, held: Any) -> None:
        with self._lock:
            self._held.append((event, held))
            if self._cuda.is_current_stream_capturing():  # an event must not be asked then
                return
            while self._held and self._held[0][0].query():
                self._held.popleft()


class SideStreams:
    """One side stream for every GPU, made when it is first asked for."""

    def __init__(self, cuda: Any = None) -> None:
        self._cuda = cuda
        self._streams: dict[Any, SideStream] = {}
        self._lock = threading.Lock()

    def of(self, device: Any) -> SideStream:
        with self._lock:
            if device not in self._streams:
                self._streams[device] = SideStream(device, self._cuda)
            return self._streams[device]
