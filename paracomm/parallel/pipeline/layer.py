"""A model as a list of layers, each of which takes what the one before it gives. Stages are runs of this list."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from paracomm.errors import InvalidArgument


@dataclass(frozen=True)
class Layer:
    """One step of a model's forward pass: call(*carried, *taken) -> carried, a tensor or several.

    call: a module, or a method of the model that uses some of its modules.
    modules: those that it uses; None: `call` itself, which is one.
    takes: names of entries of the batch, [B, ...] each or one value for all samples, that it is given after what the
        layer before it gives.
    optional: more of them, None where the batch has no such entry.

    The first layer is given nothing carried. The last one gives the loss: a scalar, or (sum, count).
    """

    call: Callable[..., Any]
    modules: Sequence[nn.Module | None] | None = None
    takes: Sequence[str] = ()
    optional: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.modules is None and not isinstance(self.call, nn.Module):
            raise InvalidArgument(f"Layer: {self.call!r} is no module, so `modules` must say which ones it uses")

    @property
    def uses(self) -> list[nn.Module]:
        own = [self.call] if self.modules is None else self.modules
        return [module for module in own if isinstance(module, nn.Module)]

    @property
    def names(self) -> tuple[str, ...]:
        """Of all entries of the batch that it is given."""
        return (*self.takes, *self.optional)

    def __call__(self, carried: tuple[Any, ...], batch: Mapping[str, Any]) -> tuple[Any, ...]:
        missing = [name for name in self.takes if name not in batch]
        if missing:
            raise InvalidArgument(f"pipeline: the batch has no '{missing[0]}', it has {', '.join(sorted(batch))}")
        result = self.call(*carried, *(batch.get(name) for name in self.names))
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)


class Layered(Protocol):
    """A model that says what its layers are."""

    def layers(self) -> Sequence[Layer]: ...


def layers_of(model: nn.Module, loss: Callable[[Any, Tensor], Tensor] | None = None) -> list[Layer]:
    """The layers of `model`: what its layers() says, or the items of an nn.Sequential or nn.ModuleList.

    Of a list the first item is given the batch's "input", and `loss(output, target)` follows the last one with its
    "target". Raises InvalidArgument for any other model, and for a list without a loss.
    """
    if hasattr(model, "layers"):
        return list(cast("Layered", model).layers())
    if not isinstance(model, (nn.Sequential, nn.ModuleList)):
        raise InvalidArgument(
            f"pipeline: a {type(model).__name__} does not say what its layers are; give it a method layers() -> "
            "[Layer, ...], or take an nn.Sequential or nn.ModuleList"
        )
    if loss is None or not len(model):
        raise InvalidArgument("pipeline: a list of modules needs some modules, and a loss(output, target)")
    items = list(model)
    layers = [Layer(item, takes=("input",) if index == 0 else ()) for index, item in enumerate(items)]
    last, final = items[-1], loss

    def with_loss(*given: Any) -> Tensor:
        *inputs, target = given
        return final(last(*inputs), target)

    layers[-1] = Layer(with_loss, (last,), (*layers[-1].takes, "target"))
    return layers


def expect_cut(first: Sequence[int], layers: int, stages: int) -> None:
    """Raises InvalidArgument unless `first` starts `stages` stages of at least one of `layers` layers."""
    edges = [*first, layers]
    if len(first) != stages or edges[0] != 0 or any(a >= b for a, b in itertools.pairwise(edges)):
        raise InvalidArgument(
            f"pipeline: the stages begin with layers {list(first)} of {layers}, expected {stages} rising numbers from "
            "0 on, at least one layer in each"
        )


@torch.no_grad()
def hollow(parameter: Tensor) -> None:
    """Gives back the memory of a parameter that another rank has; it keeps its shape, and holds NaN."""
    nothing = torch.full((1,), torch.nan if parameter.is_floating_point() else 0, dtype=parameter.dtype)
    parameter.data = nothing.to(parameter.device).expand(parameter.shape)
