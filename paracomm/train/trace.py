"""`--trace`: some steps of a run, recorded on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from paracomm import timeline
from paracomm.errors import InvalidArgument

WARM_UP = 3
"""Steps that are left out where there are enough: the first ones make plans, buckets and the optimizer's state."""


def make_folder(folder: Path) -> None:
    """Makes it. Raises InvalidArgument where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(f"train: cannot write a trace to '{folder}': {error.strerror}") from error


class Tracer:
    """Records `steps` of the steps first..end-1 into `folder`/rank-N.json; nothing if `folder` is None.

    Use it as a context, with step() around each step, on every rank of `comm`. Raises InvalidArgument for a folder that
    cannot be made.
    """

    def __init__(
        self, folder: Path | None, steps: int, first: int, end: int, comm: Any, say: Callable[[str], None]
    ) -> None:
        self._folder, self._comm, self._say = folder, comm, say
        self._from = max(first, min(first + WARM_UP, end - steps))
        self._until = min(self._from + steps, end) if folder is not None else self._from
        self._on = False

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number`."""
        if number == self._from < self._until:
            timeline.start(self._comm)
            self._on = True
        with timeline.span("step", f"step {number}"):
            yield
        if self._on and number + 1 == self._until:
            self._end()
            self._say(f"steps {self._from} to {number} were traced: paracomm trace {self._folder}")

    def _end(self) -> None:
        self._on = False
        assert self._folder is not None
        record = timeline.stop()
        record.write(self._folder / f"rank-{record.rank}.json")

    def __enter__(self) -> Tracer:
        if self._from < self._until and self._folder is not None:
            make_folder(self._folder)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._on:  # a step failed: what it did until then may say why
            self._end()
