"""One rank of the bar "cutting" of bench/pipeline.py: `pipeline_cutting_rank.py SOCKET TASK`.

The same model twice, in stages of equally many layers and in stages of equal measured cost; steps in turns.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from layouts_rank import serve, timed
from torch import Tensor

from paracomm.models import Decoder, DecoderConfig
from paracomm.parallel import Mesh, Pipeline
from paracomm.parallel.cost import agree, measure
from paracomm.pipeline import PipelineSchedule, build
from paracomm.pipeline.cut import cut, cut_evenly, rank_seconds

AGREEMENT = 1e-4


@dataclass(frozen=True)
class Task:
    """kind: a schedule. `batch` sequences of `context` in `microbatches`."""

    kind: str
    vocabulary: int
    width: int = 128
    depth: int = 14
    context: int = 64
    batch: int = 48
    microbatches: int = 12
    rounds: int = 5

    def model(self) -> Decoder:
        torch.manual_seed(0)
        return Decoder(DecoderConfig(self.width, self.depth, 4, self.context, vocabulary=self.vocabulary, tied=False))

    def tokens(self, index: int) -> Tensor:
        """[batch, context + 1]."""
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, self.vocabulary, (self.batch, self.context + 1), generator=generator)

    def schedule(self, ranks: int) -> PipelineSchedule:
        return build(self.kind, ranks=ranks, microbatches=self.microbatches)


def batch_of(tokens: Tensor) -> dict[str, Tensor]:
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


class Trained:
    def __init__(self, task: Task, comm: Any, first: list[int]) -> None:
        mesh = Mesh(comm, pp=comm.world_size)
        self.pipeline = Pipeline(task.model(), mesh, task.schedule(comm.world_size), first=first)
        self.optimizer = self.pipeline.optimizer(torch.optim.AdamW, lr=1e-3, fused=True)

    def step(self, tokens: Tensor) -> float:
        """The mean loss, on the rank of the last stage."""
        self.optimizer.zero_grad()
        batch = batch_of(tokens)
        loss = self.pipeline.forward_backward(batch, divisor=batch["targets"].numel())
        self.pipeline.finish()
        self.optimizer.step()
        return float(loss)


def cutting(task: Task, comm: Any) -> dict[str, Any]:
    """Seconds of a step in turns, and what layers cost."""
    schedule = task.schedule(comm.world_size)
    microbatch = batch_of(task.tokens(0)[: task.batch // task.microbatches])
    costs = [cost.seconds for cost in agree(measure(task.model().layers(), microbatch), comm)]
    cuts = {
        "even": cut_evenly(len(costs), schedule.stages),
        "measured": cut(costs, schedule.stages, placement=schedule.placement),
    }
    expected = {name: rank_seconds(costs, first, placement=schedule.placement) for name, first in cuts.items()}
    contenders = {name: Trained(task, comm, first) for name, first in cuts.items()}
    losses = {name: [each.step(task.tokens(index)) for index in range(2)] for name, each in contenders.items()}
    if any(abs(a - b) > AGREEMENT * abs(b) for a, b in zip(*losses.values(), strict=True)):
        raise AssertionError(f"losses are apart: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(task.rounds):
        for name in list(contenders)[:: 1 if round_ % 2 else -1]:
            tokens = task.tokens(2 + round_)
            comm.barrier()
            seconds[name].append(timed(lambda: contenders[name].step(tokens)))  # noqa: B023
    return {"seconds": seconds, "losses": losses, "costs": costs, "cuts": cuts, "expected": expected}


def main(path: str, described: str) -> None:
    task = Task(**json.loads(described))
    serve(path, lambda comm: cutting(task, comm))


if __name__ == "__main__":
    main(*sys.argv[1:])
