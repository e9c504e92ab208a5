"""Lists of tensors, as torch's calls bring them, for one operation of the communicator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from paracomm.comm import arrays
from paracomm.errors import InvalidArgument

Tensors = Sequence[torch.Tensor]


class Several(arrays.Several):
    """Tensors that stand for one."""

    def one(self) -> Any:
        """The tensor itself, if it is one alone."""
        return self.arrays[0] if len(self.arrays) == 1 else self

    def by_rank(self, what: str, world_size: int, written: bool = False) -> Several:
        """Each tensor cut into world_size blocks along dimension 0, in the order in which ranks' blocks lie in an
        operation: block 0 of every tensor, then block 1. `written`: by that operation.

        Raises:
            InvalidArgument: a tensor does not divide so, or cannot be written.
        """
        cut = []
        for tensor in self.arrays:
            if written:
                arrays.writable_view(what, tensor)  # blocks are distinct where the tensor is not
            whole = tensor if tensor.dim() and len(tensor) % world_size == 0 else _flat(what, tensor)
            if len(whole) % world_size:
                raise InvalidArgument(f"{what}: a tensor of shape {tuple(tensor.shape)} is not {world_size} blocks")
            cut.append(whole.chunk(world_size) if len(whole) else [whole] * world_size)
        return Several([blocks[rank] for rank in range(world_size) for blocks in cut])


def _flat(what: str, tensor: torch.Tensor) -> torch.Tensor:
    try:
        return tensor.view(-1)
    except RuntimeError:
        raise InvalidArgument(
            f"{what}: a strided tensor of shape {tuple(tensor.shape)} is cut along dimension 0"
        ) from None


def alike(what: str, *lists: Tensors) -> Iterator[tuple[Several, ...]]:
    """The tensors of each list whose dtype and device are alike, for one operation each: what is packed together keeps
    its numbers. Groups come in the order of the first list, which is that of every rank.

    Raises:
        InvalidArgument: the lists differ in length, dtypes or devices; they are empty.
    """
    if not lists[0]:
        raise InvalidArgument(f"{what}: no tensors")
    groups: dict[Any, list[int]] = {}
    for number, tensor in enumerate(lists[0]):
        groups.setdefault((tensor.dtype, tensor.device), []).append(number)
        for other in lists[1:]:
            if (other[number].dtype, other[number].device) != (tensor.dtype, tensor.device):
                raise InvalidArgument(
                    f"{what}: tensor {number} is {tensor.dtype} on {tensor.device} in one list, "
                    f"{other[number].dtype} on {other[number].device} in another"
                )
    for numbers in groups.values():
        yield tuple(Several([each[number] for number in numbers]) for each in lists)
