"""Tensors as the core takes them: dense, of a dtype that it knows, lists of them back to back in one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paracomm.errors import InvalidArgument

# What the core reduces; other dtypes can be moved as bytes.
REDUCIBLE = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.uint8, torch.bool,
    }
)  # fmt: skip


def reducible(tensor: torch.Tensor, op: str) -> torch.Tensor:
    """The tensor, or a view of it that has the same reduction. Raises InvalidArgument if there is none."""
    if tensor.dtype in REDUCIBLE:
        return tensor
    if tensor.is_complex():
        if op not in ("sum", "avg"):
            raise InvalidArgument(f"{op} is not defined for {tensor.dtype}")
        return torch.view_as_real(tensor)
    raise InvalidArgument(f"{op} is not defined here for {tensor.dtype}")


def movable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a view of it as a dtype that the core knows."""
    if tensor.dtype in REDUCIBLE:
        return tensor
    if tensor.is_complex():
        return torch.view_as_real(tensor)
    return tensor.reshape(1).view(torch.uint8) if tensor.dim() == 0 else tensor.view(torch.uint8)


def restored(whole: torch.Tensor, like: Sequence[torch.Tensor]) -> torch.Tensor:
    """A flat tensor of what `movable` made of tensors of one shape, as [len(like), *shape] and of their dtype."""
    first = like[0]
    if first.is_complex():
        whole = torch.view_as_complex(whole.view(-1, 2))
    elif whole.dtype != first.dtype:
        whole = whole.view(first.dtype)
    return whole.view(len(like), *first.shape)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """All elements in one dimension; a copy where they do not lie back to back."""
    return tensor.detach().reshape(-1)


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One flat tensor over the memory of all, if they lie back to back in one storage, as the chunks of a tensor do."""
    first = tensors[0]
    if len(tensors) == 1 and first.is_contiguous():
        return flat(first)
    storage = first.untyped_storage().data_ptr()
    offset = first.storage_offset()
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.dtype != first.dtype or tensor.storage_offset() != offset:
            return None
        if tensor.untyped_storage().data_ptr() != storage:
            return None
        offset += tensor.numel()
    return first.detach().as_strided((offset - first.storage_offset(),), (1,))


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All elements of all tensors, in one dimension: a view if they lie so, otherwise a copy."""
    whole = joined(tensors)
    return torch.cat([flat(tensor) for tensor in tensors]) if whole is None else whole


def room(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """A flat tensor to receive what belongs into the tensors, and whether it is other memory than theirs."""
    whole = joined(tensors)
    if whole is not None:
        return whole, False
    return tensors[0].new_empty(sum(tensor.numel() for tensor in tensors)), True


def unpack(whole: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Copies the parts of a flat tensor into the tensors, whatever their strides are."""
    with torch.no_grad():
        for part, tensor in zip(whole.split([tensor.numel() for tensor in tensors]), tensors, strict=True):
            tensor.copy_(part.view(tensor.shape))
