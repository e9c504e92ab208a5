"""Stand-ins for what only a GPU has: streams and events that do nothing but write down who waits for what."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any


class Cuda:
    """torch.cuda with streams that do nothing but write down what is put on them, in `log`."""

    def __init__(self, capturing: bool = False) -> None:
        self.log: list[str] = []
        self.done = self.capturing = capturing
        self._current = self._stream("current")

    def _stream(self, name: str) -> Any:
        return _Stream(self, name)

    def Stream(self, device: Any) -> Any:
        return self._stream("side")

    def current_stream(self, device: Any) -> Any:
        return self._current

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    @contextmanager
    def stream(self, stream: Any) -> Any:
        before, self._current = self._current, stream
        yield
        self._current = before


class _Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def record_event(self) -> _Event:
        event = _Event(self.cuda, f"{self.name}:{len(self.cuda.log)}")
        self.cuda.log.append(f"{self.name} records {event.name}")
        return event

    def wait_event(self, event: _Event) -> None:
        self.cuda.log.append(f"{self.name} waits for {event.name}")


class _Event:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def query(self) -> bool:
        assert not self.cuda.capturing, "an event was asked during a capture"
        return self.cuda.done
