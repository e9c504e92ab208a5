"""Second derivatives of operations whose backward is a kernel, or is written by hand over values that forward kept.

Such a backward does not say how its result depends on the inputs. torch.autograd.function.once_differentiable does not
help: its error is never reached where the incoming gradient is a constant, or where inputs are given to autograd.grad.
Under create_graph=True these operations therefore take their gradients from pull_back().
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from paracomm.errors import Error

Backward = Callable[..., Any]


def wanted() -> bool:
    """Whether the backward that calls this is to be differentiated itself (create_graph=True)."""
    return torch.is_grad_enabled()


def pull_back(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None], needed: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the `needed` inputs by autograd of `function`; where wanted(), differentiable in inputs and grads as
    often as asked.

    function: of as many tensors as `inputs` has. grads: of its outputs, None for one that has none; tensors without a
    gradient may follow those that have one.
    """
    again = wanted()
    with torch.enable_grad():
        own = [
            x if x is None or not need else x.view_as(x) if again else x.detach().requires_grad_()
            for x, need in zip(inputs, needed, strict=True)
        ]
        outputs = function(*own)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(y, grad) for y, grad in zip(outputs, grads, strict=False) if grad is not None and y.requires_grad]
    places = [i for i, (x, need) in enumerate(zip(own, needed, strict=True)) if need and x is not None]
    found: list[Tensor | None] = [None] * len(inputs)
    if not pairs or not places:
        return found
    results = torch.autograd.grad(
        [y for y, _ in pairs],
        [x for x, need in zip(own, needed, strict=True) if need and x is not None],
        [grad for _, grad in pairs],
        create_graph=again,
        allow_unused=True,
    )
    for place, result in zip(places, results, strict=True):
        found[place] = result
    return found


def refused(name: str) -> Backward:
    """The backward of an operation that has none."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise Error(f"{name}: asked to go back through it, expected never: it cannot be differentiated")

    return backward


def once(name: str) -> Callable[[Backward], Backward]:
    """Of a backward that cannot be differentiated: values without a graph, and an Error under create_graph=True."""

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Any) -> Any:
            if wanted():
                raise Error(
                    f"{name}: its gradient was asked for with create_graph=True, expected False: its backward cannot "
                    "be differentiated"
                )
            return backward(ctx, *grads)

        return run

    return decorate
