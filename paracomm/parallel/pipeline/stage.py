"""A stage: some layers of a model, in a thinned-out copy of the model that holds no more than what they use.

Modules keep the names that they have in the model, and methods of the model run on the copy. What two stages use is a
module, or a parameter, of its own in each of them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import nn

from paracomm.errors import InvalidArgument
from paracomm.parallel.pipeline.layer import Layer, hollow
from paracomm.parallel.shard import mark, partial_of, shard_of


class Stage(nn.Module):
    """forward(*carried, **entries of the batch) -> carried, by the layers of this stage."""

    def __init__(self, index: int, layers: Sequence[Layer], thinned: nn.Module) -> None:
        super().__init__()
        self.index = index
        self.layers = list(layers)
        self._modules.update(thinned._modules)

    @property
    def names(self) -> set[str]:
        """Entries of the batch that its layers are given."""
        return {name for layer in self.layers for name in layer.names}

    def forward(self, *carried: Any, **batch: Any) -> tuple[Any, ...]:
        for layer in self.layers:
            carried = layer(carried, batch)
        return carried


def make_stages(model: nn.Module, layers: Sequence[Layer], first: Sequence[int], here: Sequence[int]) -> list[Stage]:
    """The stages `here` of those that begin with layers `first`; the other parameters give back their memory.

    A weight that several stages use (tied) is a parameter in each of them; the later ones have `copy_of`, its name, and
    all of them `tied`, the same. Raises InvalidArgument for a stage without parameters, for parameters that no layer
    uses, and for a module that two stages use through a function that is no method of the model.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    used = set(_parameters(layers))
    forgotten = [name for parameter, name in names.items() if parameter not in used]
    if forgotten:
        raise InvalidArgument(f"pipeline: no layer uses '{forgotten[0]}'; Layer(modules=...) must name its module")
    edges = [*first, len(layers)]
    owner: dict[int, int] = {}
    everyone = []
    for index, (a, b) in enumerate(itertools.pairwise(edges)):
        everyone.append(_thinned_stage(model, layers[a:b], index, owner))
        if not any(parameter.requires_grad for parameter in everyone[-1].parameters()):
            raise InvalidArgument(f"pipeline: stage {index} has no parameters to train; cut the model elsewhere")
    _untie(everyone, names)
    kept = {parameter for index in here for parameter in everyone[index].parameters()}
    for stage in everyone:
        for parameter in stage.parameters():
            if parameter not in kept:
                hollow(parameter)
    return [everyone[index] for index in here]


def _parameters(layers: Sequence[Layer]) -> list[nn.Parameter]:
    return [parameter for layer in layers for module in layer.uses for parameter in module.parameters()]


def _thinned_stage(model: nn.Module, layers: Sequence[Layer], index: int, owner: dict[int, int]) -> Stage:
    """Stage `index` of these layers. owner: the stage that has a module first."""
    standing: dict[int, nn.Module] = {}
    """What stands for a module of the model."""
    for use in (use for layer in layers for use in layer.uses):
        shared = any(owner.setdefault(id(each), index) != index for each in use.modules())
        if id(use) not in standing:
            memo: dict[int, Any] = {id(parameter): parameter for parameter in use.parameters()}
            standing[id(use)] = copy.deepcopy(use, memo) if shared else use
    thinned = _thinned(model, standing)
    return Stage(index, [_on_copies(layer, standing, index) for layer in layers], thinned)


def _thinned(module: nn.Module, standing: dict[int, nn.Module]) -> nn.Module:
    """A copy of the module that leads to what stands for its descendants, and has nothing else."""
    twin = copy.copy(module)
    for name in ("_modules", "_parameters", "_buffers"):
        object.__setattr__(twin, name, {})
    for name, child in module._modules.items():
        if child is None:
            twin._modules[name] = None
        elif id(child) in standing:
            twin._modules[name] = standing[id(child)]
        elif any(id(each) in standing for each in child.modules()):
            twin._modules[name] = _thinned(child, standing)
    standing[id(module)] = twin
    return twin


def _on_copies(layer: Layer, standing: dict[int, nn.Module], stage: int) -> Layer:
    """The layer with everything that it uses replaced by what stands for it."""
    uses = tuple(standing[id(use)] for use in layer.uses)
    call: Callable[..., Any] = layer.call
    bound_to = getattr(call, "__self__", None)
    if isinstance(call, nn.Module):
        call = standing[id(call)]
    elif isinstance(bound_to, nn.Module) and id(bound_to) in standing:
        call = call.__func__.__get__(standing[id(bound_to)])  # type: ignore[attr-defined]
    elif any(a is not b for a, b in zip(uses, layer.uses, strict=True)):
        raise InvalidArgument(
            f"pipeline: stage {stage} uses a {type(uses[0]).__name__} that an earlier stage uses too, through a "
            "function that is no method of the model; make it one, or let them be one stage, or share a parameter only"
        )
    return replace(layer, call=call, modules=uses)


def _untie(stages: Sequence[Stage], names: dict[nn.Parameter, str]) -> None:
    """Gives every stage but the first a copy of what they share."""
    first: dict[nn.Parameter, int] = {}
    for index, stage in enumerate(stages):
        copies: dict[nn.Parameter, nn.Parameter] = {}
        for module in stage.modules():
            for key, parameter in module._parameters.items():
                if parameter is None or first.setdefault(parameter, index) == index:
                    continue
                if parameter not in copies:
                    copies[parameter] = _copy(parameter, names[parameter])
                module._parameters[key] = copies[parameter]


def _copy(parameter: nn.Parameter, name: str) -> nn.Parameter:
    twin: Any = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    mark(twin, shard_of(parameter), partial_of(parameter))
    twin.copy_of = name
    for each in (parameter, twin):
        setattr(each, "tied", name)  # noqa: B010
    return cast("nn.Parameter", twin)
