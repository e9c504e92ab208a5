"""Everything that decides a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch

from paracomm.errors import InvalidArgument
from paracomm.kernels import Backend, backend, runs
from paracomm.models.gpt import GPTConfig
from paracomm.parallel import Layout

DTYPES = {"float32": torch.float32, "float64": torch.float64}
REDUCERS = ("paracomm", "ddp")


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
        least_one = ("steps", "batch", "accumulate", "log_every", "eval_every", "eval_windows", "checkpoint_every")
        for name in (*least_one, "trace_steps"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"train: {name} is {getattr(self, name)}, expected at least 1")
        for name in ("lr", "clip", "bucket_mib"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"train: {name} is {getattr(self, name)}, expected more than 0")
        if self.dtype not in DTYPES:
            raise InvalidArgument(f"train: dtype is '{self.dtype}', expected one of {', '.join(DTYPES)}")
        if self.kernels not in get_args(Backend):
            expected = ", ".join(get_args(Backend))
            raise InvalidArgument(f"train: kernels is '{self.kernels}', expected one of {expected}")
        with backend(self.kernel_backend):
            runs(torch.empty(0, dtype=DTYPES[self.dtype]))
        if self.reducer not in REDUCERS:
            raise InvalidArgument(f"train: reducer is '{self.reducer}', expected one of {', '.join(REDUCERS)}")
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise InvalidArgument(f"train: name is '{self.name}', expected a plain folder name")
        if not self.prompt:
            raise InvalidArgument("train: the prompt is empty, expected at least one byte")
        if self.trace is not None and self.reducer == "ddp":
            raise InvalidArgument(
                "train: trace with reducer ddp: DistributedDataParallel waits inside of backward and does not say how "
                "long; use torch.profiler, or reducer paracomm"
            )
        self._check_layout()

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
