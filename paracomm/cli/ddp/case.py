"""What is trained, and by which engine and hook."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from paracomm.errors import InvalidArgument
from paracomm.hooks import HOOKS

ENGINES = ("paracomm", "gloo", "ddp+paracomm")
"""Our reducer over our communicator; torch DDP over Gloo; torch DDP over the torch.distributed backend "paracomm"."""
PLAIN = "plain"


@dataclass(frozen=True)
class Job:
    """The training job that every arrangement runs: the train command's model, text and optimizer."""

    width: int = 128
    depth: int = 4
    heads: int = 4
    context: int = 128
    batch: int = 12
    steps: int = 40
    warm_up: int = 3
    lr: float = 3e-3
    lr_steps: int = 0
    """Length of the learning rate's schedule; 0: `steps`."""
    bucket_mib: float = 2.0
    seed: int = 0

    def warmed_up(self, hooks: Iterable[str]) -> Job:
        """The same job, measured once the hooks of these names have ended their own warm-up."""
        return replace(self, warm_up=self.warm_up + max((HOOKS[n].warm_up for n in hooks if n in HOOKS), default=0))

    def check(self, ranks: int) -> None:
        """Raises InvalidArgument where ranks do not share the batch evenly or nothing would be measured."""
        if self.batch % ranks:
            raise InvalidArgument(f"a batch of {self.batch} sequences does not divide by {ranks} ranks")
        if self.steps < 1 or self.warm_up < 1:
            raise InvalidArgument(
                f"{self.steps} steps after {self.warm_up} for warming up, expected at least 1 of each"
            )


@dataclass(frozen=True)
class Arrangement:
    """An engine and a hook: "plain", a name of paracomm.hooks.HOOKS, or "torch:NAME" of torch's own."""

    engine: str
    hook: str

    @property
    def label(self) -> str:
        return f"{self.engine} {self.hook}"

    def described(self, job: Job) -> dict[str, Any]:
        """As a worker takes it."""
        return asdict(self) | {"job": asdict(job)}


@dataclass
class Outcome:
    """What an arrangement came to. Seconds are medians over the steps, of the slowest rank."""

    arrangement: Arrangement
    step_s: float = 0.0
    compute_s: float = 0.0
    bytes_per_step: float = 0.0
    """Sent by the rank that sends most."""
    counted_by: str = ""
    losses: list[float] | None = None
    parameters: int = 0
    trouble: str = ""

    @property
    def exposed_s(self) -> float:
        """What a step takes beyond the same step without communication."""
        return max(0.0, self.step_s - self.compute_s)

    @property
    def final_loss(self) -> float | None:
        """The mean over the last tenth of the steps, at least ten, in nats a byte."""
        if not self.losses:
            return None
        last = self.losses[-max(10, len(self.losses) // 10) :]
        return sum(last) / len(last)

    def record(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "engine": self.arrangement.engine,
            "hook": self.arrangement.hook,
            "step_s": self.step_s,
            "compute_s": self.compute_s,
            "exposed_s": self.exposed_s,
            "bytes_per_step": self.bytes_per_step,
            "counted_by": self.counted_by,
            "final_loss": self.final_loss,
            "parameters": self.parameters,
            "trouble": self.trouble,
        }
