"""Everything that decides a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
import torch.distributed as dist

from paracomm.errors import InvalidArgument
from paracomm.kernels import Backend, backend, runs
from paracomm.models.gpt import GPTConfig
from paracomm.parallel import Layout

DTYPES = {"float32": torch.float32, "float64": torch.float64}
REDUCERS = ("paracomm", "ddp")
LEAST = {
    "steps": 1, "batch": 1, "accumulate": 1, "log_every": 1, "eval_every": 1, "eval_windows": 1, "checkpoint_every": 1,
    "trace_steps": 1, "warmup": 0, "sample_bytes": 0, "seed": 0,
}  # fmt: skip
"""Of each setting that is a whole number."""
MOST, MOST_SEED = 10**9, 2**63 - 1


@dataclass(frozen=True)
class TrainConfig:
    """One run. `batch` is the global batch in sequences; ranks of dp and accumulation split it evenly.

    Raises InvalidArgument for what cannot be, in a setting or in the layout, as far as it shows without the ranks, and
    Error for kernels "triton" where they cannot run.
    """

    model: GPTConfig = field(default_factory=GPTConfig)
    layout: Layout = field(default_factory=Layout)
    steps: int = 2000
    batch: int = 12
    accumulate: int = 1
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    kernels: str = "auto"
    data: Path | None = None
    name: str = "gpt"
    runs: Path = Path("runs")
    log_every: int = 20
    eval_every: int = 500
    eval_windows: int = 192
    checkpoint_every: int = 500
    checkpoint: Path | None = None
    resume: bool = False
    bucket_mib: float = 2.0
    reducer: str = "paracomm"
    backend: str = "gloo"
    prompt: str = "def "
    sample_bytes: int = 400
    trace: Path | None = None
    trace_steps: int = 3

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            self._expect_count(name, least)
        for name in ("lr", "clip", "bucket_mib", "weight_decay"):
            self._expect_real(name)
        for name in ("data", "runs", "checkpoint", "trace"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, Path(value))
            elif not isinstance(value, Path) and (value is not None or name == "runs"):
                raise InvalidArgument(f"train: {name} is {value!r}, expected a path")
        for name in ("dtype", "kernels", "reducer", "backend", "name", "prompt"):
            if not isinstance(getattr(self, name), str):
                raise InvalidArgument(f"train: {name} is {getattr(self, name)!r}, expected a text")
        if self.model.vocabulary < 256:
            raise InvalidArgument(f"train: a vocabulary of {self.model.vocabulary}, expected at least the 256 bytes")
        if self.dtype not in DTYPES:
            raise InvalidArgument(f"train: dtype is '{self.dtype}', expected one of {', '.join(DTYPES)}")
        if self.kernels not in get_args(Backend):
            expected = ", ".join(get_args(Backend))
            raise InvalidArgument(f"train: kernels is '{self.kernels}', expected one of {expected}")
        with backend(self.kernel_backend):
            runs(torch.empty(0, dtype=DTYPES[self.dtype]))
        if self.reducer not in REDUCERS:
            raise InvalidArgument(f"train: reducer is '{self.reducer}', expected one of {', '.join(REDUCERS)}")
        if self.reducer == "ddp":
            self._expect_backend()
        if not self.name or "/" in self.name or "\0" in self.name or self.name.startswith("."):
            raise InvalidArgument(f"train: name is '{self.name}', expected a plain folder name")
        if not self.prompt:
            raise InvalidArgument("train: the prompt is empty, expected at least one byte")
        try:
            _ = self.prompt_bytes
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"train: the prompt {self.prompt!r} has no bytes: {error}") from error
        if self.trace is not None and self.reducer == "ddp":
            raise InvalidArgument(
                "train: trace with reducer ddp: DistributedDataParallel waits inside of backward and does not say how "
                "long; use torch.profiler, or reducer paracomm"
            )
        self._check_layout()

    def _expect_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidArgument(f"train: {name} is {value!r}, expected a whole number, at least {least}")
        most = MOST_SEED if name == "seed" else MOST
        if value > most:
            raise InvalidArgument(f"train: {name} is {value}, expected at most {most}")

    def _expect_real(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InvalidArgument(f"train: {name} is {value!r}, expected a number")
        if not (value >= 0 if name == "weight_decay" else value > 0):
            least = "at least 0" if name == "weight_decay" else "more than 0"
            raise InvalidArgument(f"train: {name} is {value}, expected {least}")
        if math.isinf(value) and name != "clip":
            raise InvalidArgument(f"train: {name} is {value}, expected a finite number")

    def _expect_backend(self) -> None:
        """Of one name, or of one a device, as "cpu:gloo,cuda:nccl"."""
        known = list(dist.Backend.backend_list) if dist.is_available() else []
        for part in self.backend.split(","):
            if part.rpartition(":")[2].lower() not in known or part.rpartition(":")[2].lower() == "undefined":
                names = ", ".join(name for name in known if name != "undefined")
                raise InvalidArgument(f"train: backend is '{self.backend}', expected one of {names}")

    def _check_layout(self) -> None:
        shape, layout = self.model, self.layout
        layout.check(
            heads=shape.heads,
            kv_heads=shape.key_value_heads,
            vocabulary=shape.vocabulary,
            length=shape.context,
            layers=shape.depth + 2,
        )
        if layout.dp is not None:
            self.share(layout.dp)
        if self.reducer == "ddp" and replace(layout, dp=None) != Layout():
            raise InvalidArgument(
                f"train: reducer ddp with {layout}: DistributedDataParallel is plain data parallelism; use reducer "
                "paracomm"
            )

    @property
    def kernel_backend(self) -> Backend:
        return cast("Backend", self.kernels)

    @property
    def prompt_bytes(self) -> bytes:
        """Bytes of a command line that are no UTF-8 are as they were typed."""
        return self.prompt.encode("utf-8", "surrogateescape")

    @property
    def folder(self) -> Path:
        """Where metrics of this run lie."""
        return self.runs / self.name

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints lie: `checkpoint`, or else beside the metrics."""
        return self.folder / "checkpoints" if self.checkpoint is None else self.checkpoint

    def share(self, dp: int) -> int:
        """Sequences that one of `dp` ranks sees in one backward pass."""
        parts = dp * self.accumulate
        if self.batch % parts:
            raise InvalidArgument(
                f"train: a batch of {self.batch} sequences does not divide by {dp} ranks of dp x "
                f"{self.accumulate} accumulation steps"
            )
        rows = self.batch // parts
        self.layout.check(rows=rows)
        return rows

    def described(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
