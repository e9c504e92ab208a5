"""What each layer of a model costs on this machine: what a pipeline's stages are cut by.

    layers = layers_of(model)                                   # of the bare model: hooks of gradients would run, too
    costs = agree(measure(layers, microbatch), comm)
    first = cut([cost.seconds for cost in costs], schedule.stages, placement=schedule.placement)

or in one call, measured_cut(). Layers are timed one by one, forward and backward, on a microbatch of the size that will
be trained with; gradients are added to ones that are there, as those of all microbatches but the first are.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paracomm.errors import InvalidArgument, Mismatch
from paracomm.pipeline import PipelineSchedule
from paracomm.pipeline.cut import cut


class Measurable(Protocol):
    """A paracomm.parallel.pipeline.Layer: called with what the layer before it gives and the batch, it gives what goes
    on to the next; `uses` are the modules whose parameters are its own."""

    @property
    def uses(self) -> Sequence[nn.Module]: ...

    def __call__(self, carried: tuple[Any, ...], batch: Mapping[str, Any]) -> tuple[Any, ...]: ...


@dataclass(frozen=True)
class LayerCost:
    """Of one layer and one microbatch.

    forward_s, backward_s: seconds. parameter_bytes: of the weights alone.
    activation_bytes: of its inputs and what it keeps for its backward; storages count once, weights do not.
    output_bytes: of what it gives to the next layer; 0 of the last one.
    """

    forward_s: float
    backward_s: float
    parameter_bytes: int
    activation_bytes: int
    output_bytes: int

    @property
    def seconds(self) -> float:
        return self.forward_s + self.backward_s


def measure(
    layers: Sequence[Measurable], batch: Mapping[str, Any], *, repeats: int = 5, warm_up: int = 1
) -> list[LayerCost]:
    """The cost of each layer: medians of `repeats` rounds through the model, after `warm_up` that do not count.

    Gradients of parameters, and torch's random numbers, are afterwards as they were. Layers that communicate (tensor
    and context parallelism) make it collective; dropout by paracomm's counters wants to be inside rng.at(Place).

    Args:
        layers: of a model that is not yet in DataParallel or Pipeline. The last one gives the loss, a
            scalar, or (sum, count).
        batch: of one microbatch.

    Raises InvalidArgument for no layers, fewer than 1 repeat, and a layer that gives nothing to go back from.
    """
    if not layers or repeats < 1 or warm_up < 0:
        raise InvalidArgument(
            f"measure: {len(layers)} layers, {repeats} repeats and {warm_up} to warm up, expected at least 1, 1 and 0"
        )
    devices = {x.device for x in batch.values() if isinstance(x, Tensor) and x.device.type == "cuda"}
    rounds = []
    with torch.random.fork_rng(sorted(devices, key=str)):
        for number in range(warm_up + repeats):
            found = list(_round(layers, batch, torch.cuda.synchronize if devices else _nothing))
            rounds += [found] if number >= warm_up else []
    return [_median(each) for each in zip(*rounds, strict=True)]


def agree(costs: Sequence[LayerCost], comm: Any) -> list[LayerCost]:
    """Rank 0's figures on every rank, because all have to cut alike. Collective.

    Raises Mismatch, on every rank, if ranks measured another number of layers.
    """
    return _everyones(costs, comm)[0]


def speeds(costs: Sequence[LayerCost], comm: Any) -> list[float]:
    """How fast each rank of `comm` is beside rank 0, by the same layers: what cut() takes as speeds. Collective.

    On hosts that are alike this is noise: leave it out. Raises Mismatch as agree() does.
    """
    totals = [sum(cost.seconds for cost in each) for each in _everyones(costs, comm)]
    return [totals[0] / total if total else 1.0 for total in totals]


def boundaries(costs: Sequence[LayerCost], *, bytes_per_s: float, latency_s: float = 0.0) -> list[float]:
    """What cut() takes as boundary: seconds to hand over each layer's outputs, and as many bytes of gradients."""
    if not (bytes_per_s > 0 and latency_s >= 0):
        raise InvalidArgument(
            f"boundaries: {bytes_per_s} bytes/s, latency {latency_s} s, expected more than 0, and 0 or more"
        )
    return [2 * (latency_s + cost.output_bytes / bytes_per_s) for cost in costs]


def measured_cut(
    layers: Sequence[Measurable], batch: Mapping[str, Any], schedule: PipelineSchedule, comm: Any, *, repeats: int = 5
) -> list[int]:
    """The first layer of each stage of `schedule`, by rank 0's measurement on one microbatch; equal on all ranks.

    Collective: every rank measures, at the same time, because they will share caches and memory in training, too.
    Raises what measure(), agree() and cut() raise.
    """
    costs = agree(measure(layers, batch, repeats=repeats), comm)
    first = cut([cost.seconds for cost in costs], schedule.stages, placement=schedule.placement)
    # Sums of the same numbers may round otherwise on another kind of CPU, and turn a tie.
    chosen: list[int] = json.loads(comm.exchange(json.dumps(first).encode())[0])
    return chosen


def _nothing() -> None:
    """The CPU is done when a call returns."""


def _round(
    layers: Sequence[Measurable], batch: Mapping[str, Any], synchronize: Callable[[], None]
) -> Iterator[LayerCost]:
    carried: tuple[Any, ...] = ()
    for index, layer in enumerate(layers):
        last = index + 1 == len(layers)
        parameters = list(dict.fromkeys(p for module in layer.uses for p in module.parameters()))
        weights = {p.untyped_storage().data_ptr() for p in parameters}
        inputs = tuple(_leaf(x) for x in carried)
        kept = _bytes_of(inputs)

        def keep(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept.update(_bytes_of([x]))
            return x

        with _gradients(parameters):
            with torch.autograd.graph.saved_tensors_hooks(keep, _same):
                outputs, forward_s = _timed(synchronize, partial(layer, inputs, batch))
            roots = [x for x in (outputs[:1] if last else outputs) if isinstance(x, Tensor) and x.requires_grad]
            if not roots and any(p.requires_grad for p in parameters):
                raise InvalidArgument(f"measure: layer {index} gives nothing that has a gradient, expected a tensor")
            carried = tuple(x.detach() if isinstance(x, Tensor) else x for x in outputs)
            activation_bytes = sum(size for place, size in kept.items() if place not in weights)
            backward_s = _backward_s(synchronize, roots)
        output_bytes = 0 if last else sum(x.nbytes for x in carried if isinstance(x, Tensor))
        yield LayerCost(forward_s, backward_s, sum(p.nbytes for p in parameters), activation_bytes, output_bytes)


def _timed(synchronize: Callable[[], None], call: Callable[[], Any]) -> tuple[Any, float]:
    synchronize()
    begin = time.perf_counter()
    result = call()
    synchronize()
    return result, time.perf_counter() - begin


def _backward_s(synchronize: Callable[[], None], roots: Sequence[Tensor]) -> float:
    if not roots:
        return 0.0
    gradients = [torch.ones_like(x) for x in roots]
    return _timed(synchronize, lambda: torch.autograd.backward(roots, gradients))[1]


@contextmanager
def _gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients of zero to accumulate into; those that were there come back."""
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    try:
        yield
    finally:
        for p, gradient in zip(parameters, before, strict=True):
            p.grad = gradient


def _leaf(x: Any) -> Any:
    return x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


def _bytes_of(tensors: Sequence[Any]) -> dict[int, int]:
    """Of each storage, by its address."""
    storages = [x.untyped_storage() for x in tensors if isinstance(x, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _same(x: Tensor) -> Tensor:
    return x


def _median(rounds: Sequence[LayerCost]) -> LayerCost:
    last = rounds[-1]
    return LayerCost(
        statistics.median(cost.forward_s for cost in rounds), statistics.median(cost.backward_s for cost in rounds),
        last.parameter_bytes, last.activation_bytes, last.output_bytes,
    )  # fmt: skip


def _everyones(costs: Sequence[LayerCost], comm: Any) -> list[list[LayerCost]]:
    blobs = comm.exchange(json.dumps([astuple(cost) for cost in costs]).encode())
    everyones = [[LayerCost(*row) for row in json.loads(blob)] for blob in blobs]
    counts = [len(each) for each in everyones]
    if len(set(counts)) > 1:
        raise Mismatch(f"costs: ranks measured {counts} layers, expected the same number on each")
    return everyones
