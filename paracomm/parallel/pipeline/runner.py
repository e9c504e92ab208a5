"""Runs a rank's list of actions. It knows no schedule by name: an action takes what it needs, or waits for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from paracomm import timeline
from paracomm.comm import Communicator
from paracomm.errors import InvalidArgument
from paracomm.parallel import rng
from paracomm.parallel.pipeline.backward import SplitBackward
from paracomm.parallel.pipeline.wire import Form, Way, form_of
from paracomm.parallel.recompute import plain
from paracomm.pipeline.action import BACKWARD, FORWARD, Action, PipelineSchedule

Compute = Callable[..., tuple[Any, ...]]
"""stage(*carried, **entries of the batch) -> carried."""
Accumulate = Callable[[int, bool, Callable[[], None]], None]
"""(stage, whether it is the stage's last, run): runs what gives gradients to the parameters of a stage."""


class Step:
    """One pass of this rank through a schedule.

    Args:
        stages: what computes each stage of this rank, and `names`, the entries of the batch that it is given.
        comm: of the ranks that have the stages, in the order of the schedule's ranks.
        batches, places: of each microbatch.
        divisor: of the loss.
        recomputes: B runs a stage's forward again rather than keep what it left (for a backward in two parts).
    """

    def __init__(
        self, schedule: PipelineSchedule, comm: Communicator, stages: Mapping[int, Compute],
        names: Mapping[int, set[str]], batches: Sequence[Mapping[str, Any]], places: Sequence[rng.Place | None], *,
        divisor: Any = 1, accumulate: Accumulate = lambda stage, last, run: run(), recomputes: bool = False,
    ) -> None:  # fmt: skip
        self.results: list[tuple[Any, ...]] = []
        """What the last stage gave for each microbatch, detached; on its rank only."""
        self.losses: list[Tensor] = []
        self._schedule, self._comm, self._stages, self._names = schedule, comm, stages, names
        self._batches, self._places = batches, places
        self._divisor, self._accumulate, self._recomputes = divisor, accumulate, recomputes
        self._sent: list[Any] = []
        self._onwards: dict[int, Way] = {}
        self._back: dict[int, Way] = {}
        self._kept: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}
        """(inputs, outputs) of what has no backward yet."""
        self._halves: dict[tuple[int, int], SplitBackward] = {}

    def run(self, actions: Sequence[Action]) -> None:
        """Returns when all actions are done, and what they sent has arrived."""
        do = {FORWARD: self._forward, BACKWARD: self._backward}
        for action in actions:
            do.get(action.kind, self._weight)(action)
        with timeline.span("bubble", "sends"):
            for work in self._sent:
                work.wait()

    # --- ways between stages ---
    def _peer(self, stage: int) -> int | None:
        rank = self._schedule.placement[stage]
        return None if rank == self._comm.rank else rank

    def _way_onwards(self, stage: int, other: int) -> Way:
        """From `stage` to the next; `other` is the one of the two that may be elsewhere."""
        if stage not in self._onwards:
            count = self._schedule.microbatches
            self._onwards[stage] = Way(f"outputs of stage {stage}", self._comm, self._peer(other), 2 * stage, count)
        return self._onwards[stage]

    def _way_back(self, stage: int, other: int, forms: Sequence[Form]) -> Way:
        """From `stage` + 1 to `stage`."""
        if stage not in self._back:
            name, count = f"gradients of the outputs of stage {stage}", self._schedule.microbatches
            self._back[stage] = Way(name, self._comm, self._peer(other), 2 * stage + 1, count, forms)
        return self._back[stage]

    # --- actions ---
    def _forward(self, action: Action) -> None:
        stage, _, microbatch = action
        inputs = self._way_onwards(stage - 1, stage - 1).take() if stage else []
        keeps = torch.is_grad_enabled()
        with timeline.span("compute", str(action)), torch.set_grad_enabled(keeps and not self._recomputes):
            outputs = self._compute(stage, microbatch, inputs)
        if self._recomputes and keeps:
            outputs = [x.requires_grad_() if x.is_floating_point() else x for x in outputs]
        if stage + 1 < self._schedule.stages:
            self._way_onwards(stage, stage + 1).give(outputs, self._sent)
            forms = [form_of(x)._replace(requires_grad=False) for x in outputs if x.requires_grad]
            if keeps and forms:
                self._way_back(stage, stage + 1, forms).ask()
        else:
            self.results.append(tuple(x.detach() for x in outputs))
            if keeps and outputs[0].numel() != 1:
                raise InvalidArgument(
                    f"pipeline: the last layer gives {form_of(outputs[0])}, expected its loss, a scalar, first"
                )
            outputs = [outputs[0] / self._divisor]
            self.losses.append(outputs[0].detach().double())
        if keeps:
            self._kept[stage, microbatch] = inputs, outputs

    def _compute(self, stage: int, microbatch: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        batch = {name: x for name, x in self._batches[microbatch].items() if name in self._names[stage]}
        with rng.at(self._places[microbatch]):
            outputs = self._stages[stage](*inputs, **batch)
        wrong = [x for x in outputs if not isinstance(x, Tensor)]
        if wrong:
            raise InvalidArgument(f"pipeline: stage {stage} gives a {type(wrong[0]).__name__}, expected tensors")
        return list(outputs)

    def _backward(self, action: Action) -> None:
        stage, _, microbatch = action
        inputs, outputs = self._kept.pop((stage, microbatch))
        gradients: list[Tensor | None] = [None]
        if stage + 1 < self._schedule.stages:
            gradients = list(self._back[stage].take()) if stage in self._back else []
        outputs = [x for x in outputs if x.requires_grad]
        with timeline.span("compute", str(action)):
            if self._recomputes:
                outputs, gradients = self._again(stage, microbatch, inputs, gradients)
            leaves = [x for x in inputs if x.requires_grad]
            if (stage, microbatch) in self._schedule.split:
                half = self._halves[stage, microbatch] = SplitBackward(outputs, leaves)
                found = half.inputs(gradients)
            else:
                self._give_gradients(action, lambda: torch.autograd.backward(outputs, gradients))
                found = [x.grad for x in leaves]
        if leaves:
            forms = [form_of(x)._replace(requires_grad=False) for x in leaves]
            way = self._way_back(stage - 1, stage - 1, forms)
            given = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
            way.give([x.detach() for x in given], self._sent)

    def _again(
        self, stage: int, microbatch: int, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The outputs that require a gradient, and theirs: forward took it that all floating-point ones do."""
        with plain():
            outputs = [x for x in self._compute(stage, microbatch, inputs) if x.is_floating_point()]
        if stage + 1 == self._schedule.stages:
            outputs = [outputs[0] / self._divisor]
        pairs = [(x, g) for x, g in zip(outputs, gradients, strict=True) if x.requires_grad]
        return [x for x, _ in pairs], [g for _, g in pairs]

    def _weight(self, action: Action) -> None:
        half = self._halves.pop((action.stage, action.microbatch))
        with timeline.span("compute", str(action)):
            self._give_gradients(action, half.weights)

    def _give_gradients(self, action: Action, run: Callable[[], None]) -> None:
        self._accumulate(action.stage, action.microbatch + 1 == self._schedule.microbatches, run)
