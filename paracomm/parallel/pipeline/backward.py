"""A stage's backward in two parts: the gradients of its inputs first, those of its weights whenever there is time.

Of the graph that forward leaves, the nodes from which an input can be reached are its *trunk*. Weights hang on the trunk by
*twigs*, edges that lead from a trunk node to no input:

    output <- MmBackward <- NativeLayerNormBackward <- input        trunk
                  |                   |
            TBackward <- W       gamma, beta                        twigs

inputs()    runs the engine down the trunk. A node computes nothing that nobody asks for, and asked for are the inputs only.
            What each node was given is kept.
weights()   asks each node again, with what it was given, for its twigs alone; then runs the engine up all twigs at once,
            so that hooks of parameters see one gradient each.

A node in Python (torch.autograd.Function) computes all of its gradients at the first call; those are kept and used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


@dataclass
class _Junction:
    """A node of the trunk with twigs, and what the engine gave it."""

    node: Any
    twigs: list[int]
    """Numbers of the node's edges."""
    given: tuple[Tensor | None, ...] = ()
    found: list[Tensor | None] = field(default_factory=list)
    """Of each twig, what the node had computed in the first part already."""


class SplitBackward:
    """The backward of `outputs`, of which `inputs` are leaves, in two parts. It keeps the graph until the second is done.

    What the two parts accumulate are the bits of one backward(): each node's kernels run on the same operands.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self._outputs = [x for x in outputs if x.requires_grad]
        self._inputs = list(inputs)
        self._gradients: list[Tensor | None] = []
        self._junctions = _junctions(self._outputs, self._inputs)
        self._handles = [junction.node.register_hook(_keep(junction)) for junction in self._junctions]

    def inputs(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of the inputs, given those of the outputs that require one (None: of a scalar, 1)."""
        self._gradients = list(gradients)
        if not self._inputs:
            return []
        found = torch.autograd.grad(self._outputs, self._inputs, self._gradients, retain_graph=True, allow_unused=True)
        for handle in self._handles:
            handle.remove()
        return list(found)

    def weights(self) -> None:
        """Accumulates the gradients of everything else that requires one."""
        if not self._inputs:
            torch.autograd.backward(self._outputs, self._gradients)
            return
        edges: list[GradientEdge] = []
        gradients: list[Tensor] = []
        for junction in self._junctions:
            for edge, gradient in _twigs(junction):
                edges.append(edge)
                gradients.append(gradient)
        self._junctions = []
        if edges:
            torch.autograd.backward(edges, gradients)  # type: ignore[arg-type]


def _junctions(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[_Junction]:
    """In the order in which a walk from the outputs finishes with them."""
    trunk: dict[Any, bool] = {get_gradient_edge(x).node: True for x in inputs}
    found: list[_Junction] = []
    stack = [(get_gradient_edge(x).node, False) for x in outputs]
    while stack:
        node, seen = stack.pop()
        children = [child for child, _ in node.next_functions]
        if not seen:
            if node in trunk:
                continue
            trunk[node] = False
            stack.append((node, True))
            stack.extend((child, False) for child in children if child is not None)
            continue
        if any(child is not None and trunk[child] for child in children):
            trunk[node] = True
            twigs = [i for i, child in enumerate(children) if child is not None and not trunk[child]]
            if twigs:
                found.append(_Junction(node, twigs))
    return found


def _keep(junction: _Junction) -> Any:
    def keep(computed: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> None:
        junction.given = given
        junction.found = [computed[twig] for twig in junction.twigs]

    return keep


def _twigs(junction: _Junction) -> list[tuple[GradientEdge, Tensor]]:
    """(edge, gradient) of each twig that has one."""
    node = junction.node
    edges = [GradientEdge(*node.next_functions[twig]) for twig in junction.twigs]
    missing = [edge for edge, gradient in zip(edges, junction.found, strict=True) if gradient is None]
    found = {edge: gradient for edge, gradient in zip(edges, junction.found, strict=True) if gradient is not None}
    roots = [(GradientEdge(node, i), g) for i, g in enumerate(junction.given) if g is not None]
    if missing and roots:
        asked = torch.autograd.grad(
            [edge for edge, _ in roots], missing, [gradient for _, gradient in roots],
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        found |= {edge: gradient for edge, gradient in zip(missing, asked, strict=True) if gradient is not None}
    return [(edge, found[edge]) for edge in edges if edge in found]
