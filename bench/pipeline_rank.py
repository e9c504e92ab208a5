"""One rank of bench/pipeline.py: `pipeline_rank.py SOCKET TASK`, which layouts_rank.serve answers for."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from layouts_rank import serve, timed, timed_together
from torch import Tensor, nn
from torch.distributed import pipelining

from paracomm.models import Decoder, DecoderConfig
from paracomm.parallel import Mesh, Pipeline
from paracomm.parallel.pipeline.runner import Step
from paracomm.parallel.pipeline.stage import Stage, make_stages
from paracomm.pipeline import PipelineSchedule, build, cut_evenly

AGREEMENT = 1e-4
TORCHS: dict[str, str] = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}
"""What torch.distributed.pipelining calls a schedule of ours."""


@dataclass(frozen=True)
class Task:
    """kind: a schedule, with as many stages a rank as it has by default. `batch` sequences of `context`."""

    kind: str
    width: int = 256
    depth: int = 8
    context: int = 128
    batch: int = 16
    microbatches: int = 8
    vocabulary: int = 512
    rounds: int = 15
    seconds: float = 0.0
    """Of an emulated F, B or W; 0: a real model beside torch's."""

    def model(self) -> Decoder:
        return Decoder(DecoderConfig(self.width, self.depth, 8, self.context, vocabulary=self.vocabulary, tied=False))

    def tokens(self, index: int) -> Tensor:
        """[batch, context + 1]."""
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, self.vocabulary, (self.batch, self.context + 1), generator=generator)

    def schedule(self, ranks: int) -> PipelineSchedule:
        return build(self.kind, ranks=ranks, microbatches=self.microbatches)


class Ours:
    def __init__(self, task: Task, comm: Any) -> None:
        mesh = Mesh(comm, pp=comm.world_size)
        self.pipeline = Pipeline(task.model(), mesh, task.schedule(comm.world_size))
        self.optimizer = self.pipeline.optimizer(torch.optim.AdamW, lr=1e-3, fused=True)

    def step(self, tokens: Tensor) -> float:
        """The mean loss, on the rank of the last stage."""
        self.optimizer.zero_grad()
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        loss = self.pipeline.forward_backward(batch, divisor=batch["targets"].numel())
        self.pipeline.finish()
        self.optimizer.step()
        return float(loss)


class TorchStage(nn.Module):
    """The same layers as torch takes them: one tensor in, one out, the loss outside."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.stage.layers:
            x = layer.call(x)
        return x


class Theirs:
    def __init__(self, task: Task) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        schedule = task.schedule(ranks)
        model = task.model()
        layers = model.layers()
        here = schedule.stages_of(rank)
        parts = make_stages(model, layers, cut_evenly(len(layers), schedule.stages), here)
        stages = [
            pipelining.PipelineStage(TorchStage(part), part.index, schedule.stages, torch.device("cpu"))
            for part in parts
        ]
        kind = getattr(pipelining, TORCHS[task.kind], None) or getattr(pipelining.schedules, TORCHS[task.kind])
        self.schedule = kind(stages if len(stages) > 1 else stages[0], task.microbatches, loss_fn=mean_loss)
        self.first, self.last = 0 in here, schedule.stages - 1 in here
        parameters = [parameter for part in parts for parameter in part.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def step(self, tokens: Tensor) -> float:
        self.optimizer.zero_grad()
        losses: list[Tensor] = []
        inputs = (tokens[:, :-1].contiguous(),) if self.first else ()
        targets = {"target": tokens[:, 1:].contiguous(), "losses": losses} if self.last else {}
        self.schedule.step(*inputs, **targets)
        self.optimizer.step()
        return float(torch.stack(losses).mean()) if losses else 0.0


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def against_torch(task: Task, comm: Any) -> dict[str, Any]:
    """Seconds of a step in turns of ours and torch's."""
    dist.init_process_group("gloo")
    contenders: dict[str, Any] = {"ours": Ours(task, comm), "torch": Theirs(task)}
    losses = {name: [each.step(task.tokens(index)) for index in range(3)] for name, each in contenders.items()}
    apart = max((abs(a / b - 1) for a, b in zip(*losses.values(), strict=True) if b), default=0.0)
    if apart > AGREEMENT:
        raise AssertionError(f"losses are {apart:.1e} apart: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(task.rounds):
        for name in list(contenders)[:: 1 if round_ % 2 else -1]:
            tokens = task.tokens(3 + round_)
            comm.barrier()
            seconds[name].append(timed(lambda: contenders[name].step(tokens)))  # noqa: B023
    return {"seconds": seconds, "losses": losses}


# --- emulated compute times ---
class _Slept(torch.autograd.Function):
    """Its argument, after a while; backward takes a while as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        time.sleep(ctx.backward_s)
        return gradient.clone(), None, None


class EmulatedStage:
    """A stage that sleeps `seconds` in each of forward, the gradient of its input and that of its weight."""

    def __init__(self, seconds: float, last: bool) -> None:
        self.seconds, self.last = seconds, last
        self.weight = torch.zeros(8, requires_grad=True)

    def __call__(self, x: Tensor | None = None) -> tuple[Tensor]:
        kept = torch.zeros(8) if x is None else x
        # A stage without an input to give a gradient to does everything in its W, or in its whole B.
        ahead = _Slept.apply(self.weight, 0.0, self.seconds * (2 if x is None else 1))
        y = _Slept.apply(kept, self.seconds, self.seconds) + ahead
        return (y.sum() if self.last else y,)


def emulated(task: Task, comm: Any) -> dict[str, Any]:
    """The share of a step in which this rank does not compute, over all rounds."""
    schedule = task.schedule(comm.world_size)
    here = {stage: EmulatedStage(task.seconds, stage + 1 == schedule.stages) for stage in schedule.stages_of(comm.rank)}
    names: dict[int, set[str]] = {stage: set() for stage in here}
    batches: list[dict[str, Any]] = [{} for _ in range(task.microbatches)]
    steps = []
    for _ in range(task.rounds):
        step = Step(schedule, comm, here, names, batches, [None] * task.microbatches)
        comm.barrier()
        steps.append(timed_together(comm, lambda: step.run(schedule.ranks[comm.rank])))  # noqa: B023
    return {"seconds": {"step": steps}, "stages": len(here)}


def main(path: str, described: str) -> None:
    task = Task(**json.loads(described))
    serve(path, lambda comm: (emulated if task.seconds else against_torch)(task, comm))


if __name__ == "__main__":
    main(*sys.argv[1:])
