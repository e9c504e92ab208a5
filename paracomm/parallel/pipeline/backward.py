"""A stage's backward in two parts: the gradients of its inputs first, those of its weights whenever there is time.

Of the graph that forward leaves, the nodes from which an input can be reached are its *trunk*. Weights hang on it by
*twigs*, edges that lead from a trunk node to no input:

    output <- MmBackward <- NativeLayerNormBackward <- input        trunk
                  |                   |
            TBackward <- W       gamma, beta                        twigs

inputs()    runs the engine down the trunk. A node computes nothing that nobody asks for, and asked for are the inputs
            only. What each node was given is kept.
weights()   asks each node again, with what it was given, for its twigs alone, node by node, so that a gradient is added
            up while it is in the cache. Twigs that lead to one weight are run at once in the end, so that its hooks
            see one gradient.

A node in Python (torch.autograd.Function) computes all of its gradients at the first call; those are kept and used.
Twigs that meet, as those of a weight that is used twice, are computed in the first part, too.
"""

from __future__ import annotations

from collections import Counter
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
    edges: Sequence[Any]
    """The node's next_functions, which it makes anew each time."""
    twigs: list[int]
    """Numbers of the node's edges."""
    given: tuple[Tensor | None, ...] = ()
    found: list[Tensor | None] = field(default_factory=list)
    """Of each twig, what the node has computed in the first part already."""

    def edge(self, twig: int) -> GradientEdge:
        return GradientEdge(*self.edges[twig])

    def again(self) -> tuple[list[GradientEdge], list[Tensor]]:
        """What the engine is to begin with, to get at the twigs once more."""
        kept = [(GradientEdge(self.node, i), gradient) for i, gradient in enumerate(self.given) if gradient is not None]
        return [edge for edge, _ in kept], [gradient for _, gradient in kept]

    def keep(self, computed: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> None:
        """A hook of the node."""
        self.given = given
        self.found = [computed[twig] for twig in self.twigs]


class SplitBackward:
    """The backward of `outputs`, of which `inputs` are leaves, in two parts. It keeps the graph until the second is
    done.

    What the two parts accumulate are the bits of one backward(): each node's kernels run on the same operands.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self._outputs = [x for x in outputs if x.requires_grad]
        self._inputs = [get_gradient_edge(x) for x in inputs]
        self._gradients: list[Tensor | None] = []
        graph = _Graph([get_gradient_edge(x).node for x in self._outputs], [edge.node for edge in self._inputs])
        self._junctions, self._degrees = graph.junctions, graph.degrees
        self._apart = [i for i, x in enumerate(self._outputs) if not graph.trunk[get_gradient_edge(x).node]]
        """Outputs from which no input can be reached: the second part begins with them."""
        self._at_once = [
            edge for each in self._junctions for edge in map(each.edge, each.twigs) if graph.degrees[edge.node] > 1
        ]
        """Twigs that meet: asked of its node again, one would get what comes over the trunk to the others, too."""
        self._handles = [each.node.register_hook(each.keep) for each in self._junctions]

    def inputs(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of the inputs, given those of the outputs that require one (None: of a scalar, 1)."""
        self._gradients = list(gradients)
        if not self._inputs:
            return []
        asked = [*self._inputs, *dict.fromkeys(self._at_once)]
        found = torch.autograd.grad(self._outputs, asked, self._gradients, retain_graph=True, allow_unused=True)
        for handle in self._handles:
            handle.remove()
        return list(found[: len(self._inputs)])

    def weights(self) -> None:
        """Accumulates the gradients of everything else that requires one."""
        if not self._inputs:
            torch.autograd.backward(self._outputs, self._gradients)
            return
        roots: list[Any] = [self._outputs[i] for i in self._apart]
        gradients = [self._gradients[i] for i in self._apart]
        for junction in self._junctions:
            weights, left = self._own_weights(junction)
            edges, given = junction.again()
            if weights and edges:
                torch.autograd.backward(edges, given, retain_graph=True, inputs=weights)
            for edge, gradient in _twigs(junction, left):
                roots.append(edge)
                gradients.append(gradient)
        self._junctions, self._degrees = [], {}
        if roots:
            torch.autograd.backward(roots, gradients)

    def _own_weights(self, junction: _Junction) -> tuple[list[Tensor], list[int]]:
        """The weights that nothing but twigs of this node leads to, one twig to each, and the other twigs' places."""
        weights: list[Tensor] = []
        left = []
        for place, twig in enumerate(junction.twigs):
            found = None if junction.found[place] is not None else self._weights_below(junction.edge(twig).node)
            if found is None:
                left.append(place)
            else:
                weights += found
        return weights, left

    def _weights_below(self, node: Any) -> list[Tensor] | None:
        """None: something else leads there, too."""
        weights: list[Tensor] = []
        stack = [node]
        while stack:
            node = stack.pop()
            if self._degrees[node] > 1:
                return None
            if (weight := getattr(node, "variable", None)) is not None:
                weights.append(weight)
            stack.extend(child for child, _ in node.next_functions if child is not None)
        return weights


class _Graph:
    """The nodes that lead from `outputs` to `inputs` (trunk), those among them with twigs, and every node's number of
    edges that lead to it."""

    def __init__(self, outputs: Sequence[Any], inputs: Sequence[Any]) -> None:
        self.trunk: dict[Any, bool] = dict.fromkeys(inputs, True)
        self.degrees: dict[Any, int] = dict(Counter(outputs))
        self.junctions: list[_Junction] = []
        stack: list[tuple[Any, Sequence[Any] | None]] = [(node, None) for node in outputs]
        while stack:
            node, edges = stack.pop()
            if edges is not None:
                self._leave(node, edges)
            elif node not in self.trunk:
                self.trunk[node] = False
                edges = node.next_functions
                stack.append((node, edges))
                for child, _ in edges:
                    if child is not None:
                        self.degrees[child] = self.degrees.get(child, 0) + 1
                        stack.append((child, None))

    def _leave(self, node: Any, edges: Sequence[Any]) -> None:
        twigs = [i for i, (child, _) in enumerate(edges) if child is not None and not self.trunk[child]]
        self.trunk[node] = any(child is not None and self.trunk[child] for child, _ in edges)
        if self.trunk[node] and twigs:
            self.junctions.append(_Junction(node, edges, twigs))


def _twigs(junction: _Junction, places: Sequence[int]) -> list[tuple[GradientEdge, Tensor]]:
    """(edge, gradient) of each twig at those places that has one."""
    found = {place: junction.found[place] for place in places}
    missing = [place for place, gradient in found.items() if gradient is None]
    edges, given = junction.again()
    if missing and edges:
        asked = [junction.edge(junction.twigs[place]) for place in missing]
        gradients = torch.autograd.grad(edges, asked, given, retain_graph=True, allow_unused=True)
        found.update(zip(missing, gradients, strict=True))
    return [(junction.edge(junction.twigs[place]), g) for place, g in found.items() if g is not None]
