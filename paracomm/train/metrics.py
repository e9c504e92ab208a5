"""Where the figures of a run go: JSON lines, TensorBoard, the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class MetricLog:
    """Appends records to `folder`/metrics.jsonl and their numbers to TensorBoard events in `folder`.

    On resume from `first_step` > 0 the records of later steps, which a killed run left behind, are dropped.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            _drop_after(self.path, first_step)
        self._file = self.path.open("a")
        self._board = _tensorboard(folder, first_step)

    @property
    def has_tensorboard(self) -> bool:
        """False where the tensorboard package is not installed."""
        return self._board is not None

    def write(self, step: int, values: dict[str, float | None]) -> None:
        """One record; None is a figure that was not measured."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a killed run left unfinished is not one."""
    return list(_records(path.read_text().splitlines()))


def _records(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return


def _drop_after(path: Path, step: int) -> None:
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in kept))
    os.replace(part, path)


def _tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "tensorboard":
            raise
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)


class Display:
    """What a person sees of a run: a progress bar on a terminal, lines elsewhere, nothing on ranks other than 0."""

    def __init__(self, steps: int, first_step: int, *, rank: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, quiet=rank != 0)
        self._live = self.console.is_terminal and rank == 0
        self._steps = steps
        self._every = max(1, steps // 10)
        self._printed = first_step
        self._task: TaskID | None = None
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("train", total=steps, completed=first_step, figures="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def advance(self, step: int, values: dict[str, float | None] | None = None) -> None:
        """`step` steps are done; `values` are a record's, where this step has one."""
        assert self._task is not None
        self._bar.update(self._task, completed=step)
        if values is None:
            return
        figures = describe(values)
        self._bar.update(self._task, figures=figures)
        if not self._live and (step - self._printed >= self._every or step == self._steps):
            self._printed = step
            self.say(f"step {step}/{self._steps}  {figures}")


def describe(values: dict[str, float | None]) -> str:
    """Loss, tokens/s and the share of the step spent waiting, for one line."""
    share = values["wait_share"]
    wait = "wait n/a" if share is None else f"wait {share:.1%}"
    loss = f"loss {values['loss']:.3f} ({values['bits_per_byte']:.2f} bits/byte)"
    return f"{loss}  {values['tokens_per_s']:,.0f} tok/s  {wait}"
