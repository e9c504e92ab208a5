"""Where a shard lies in its whole: the one rule by which sizes are cut, and the marks that parameters carry.

    parameter.shard = Shard(...)     this parameter is a part of a larger one, cut along one dimension over one axis
    parameter.partial = ("tp",)      its gradient on each rank of these axes is only a part of the sum

A parameter with neither is whole and has the same gradient on every rank of a tp group.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from paracomm.errors import InvalidArgument

if TYPE_CHECKING:
    from paracomm.parallel.mesh import Mesh


@dataclass(frozen=True)
class Shard:
    """What lies on this rank: `size` indices of dimension `dim` of a tensor that has `total` there.

    They are the indices from `offset` on or, where a fused projection was cut within each of its parts, all those of
    `pieces`, pairs of (offset, size) in rising order; `offset` is then the first piece's.
    """

    dim: int
    offset: int
    size: int
    total: int = 0
    axis: str = "tp"
    pieces: tuple[tuple[int, int], ...] = ()

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The pairs (offset, size) that lie on this rank, in the order in which they lie here."""
        return self.pieces or ((self.offset, self.size),)

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of `whole`, a copy."""
        parts = [whole.narrow(self.dim, offset, size) for offset, size in self.ranges]
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)


def extent(total: int, parts: int, index: int) -> tuple[int, int]:
    """(offset, size) of part `index` of `total` things; the first total % parts parts have one more."""
    size, more = divmod(total, parts)
    return index * size + min(index, more), size + (index < more)


def extents(total: int, parts: int) -> list[int]:
    """The sizes of all parts of extent()."""
    return [extent(total, parts, index)[1] for index in range(parts)]


def shard_of(parameter: Tensor) -> Shard | None:
    """Its Shard; None if it is whole."""
    return cast("Shard | None", getattr(parameter, "shard", None))


def partial_of(parameter: Tensor) -> tuple[str, ...]:
    """The axes on which its gradient is only a part of the sum."""
    return cast("tuple[str, ...]", getattr(parameter, "partial", ()))


def mark(parameter: Any, shard: Shard | None = None, partial: Sequence[str] = ()) -> None:
    """Writes the marks on a parameter."""
    if shard is not None:
        parameter.shard = shard
    if partial:
        parameter.partial = tuple(partial)


class Marks:
    """Takes the marks of a module's parameters along where it is copied: torch copies a parameter without them."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)

    def __deepcopy__(self, memo: dict[int, Any]) -> Marks:
        copies = [copy.deepcopy(parameter, memo) for parameter in self.parameters]
        for parameter, copied in zip(self.parameters, copies, strict=True):
            mark(copied, shard_of(parameter), partial_of(parameter))
        return Marks(copies)


def keep_marks(model: nn.Module) -> None:
    """Lets copy.deepcopy(model) mark its parameters as those of `model` are."""
    for owner in model.modules():
        marked = [p for p in owner._parameters.values() if p is not None and (shard_of(p) or partial_of(p))]
        if marked:
            vars(owner)["marks"] = Marks(marked)


@torch.no_grad()
def gather_parameter(parameter: Tensor, mesh: Mesh, tensor: Tensor | None = None) -> Tensor:
    """The whole of a parameter on every rank: itself, detached, where it is not a shard. Collective on its axis.

    Args:
        tensor: what to gather instead of its values, of its shape: its gradient, a state of its optimizer.

    Raises InvalidArgument if `tensor` has another shape.
    """
    value = parameter.detach() if tensor is None else tensor.detach()
    if value.shape != parameter.shape:
        raise InvalidArgument(
            f"gather_parameter: the tensor is {list(value.shape)}, its parameter {list(parameter.shape)}"
        )
    shard = shard_of(parameter)
    if shard is None:
        return value
    group = mesh.group(shard.axis)
    first = value.movedim(shard.dim, 0).contiguous()
    everyone = group.all_gather_v(first)
    ranges = list(itertools.chain.from_iterable(_ranges(shard, group)))
    total = sum(size for _, size in ranges)
    whole = first.new_empty((total, *first.shape[1:]))
    for (offset, size), part in zip(ranges, everyone.split([size for _, size in ranges]), strict=True):
        whole[offset : offset + size] = part
    return whole.movedim(0, shard.dim).contiguous()


def _ranges(shard: Shard, group: Any) -> list[list[tuple[int, int]]]:
    """Every rank's ranges, in rank order. Ranks have equally many."""
    flat = torch.tensor(shard.ranges, dtype=torch.int64).flatten()
    everyone = group.all_gather(flat).view(group.world_size, math.prod(flat.shape) // 2, 2).tolist()
    return [[(int(offset), int(size)) for offset, size in ranges] for ranges in everyone]
