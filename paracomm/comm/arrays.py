"""Memory of arrays, and new arrays of the same kind, for torch, NumPy and DLPack alike."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paracomm import _C
from paracomm.errors import InvalidArgument

DTYPE_NAMES = {code: name for name, code in _C.DTYPES.items()}


@dataclass(frozen=True)
class View:
    """Where an array's elements are, as the core sees them."""

    address: int
    count: int
    dtype: int
    contiguous: bool
    writable: bool

    @property
    def nbytes(self) -> int:
        return self.count * int(_C.item_size(self.dtype))


def view(array: Any) -> View:
    """Raises InvalidArgument for what is no dense CPU array of a dtype that collectives take."""
    return View(*_C.view(array))


def is_torch(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def native(array: Any) -> Any:
    """The array itself if it is torch's or NumPy's, otherwise one of theirs over the same memory."""
    if is_torch(array) or isinstance(array, np.ndarray):
        return array
    view(array)  # refuses what is no array
    if not hasattr(array, "__dlpack__"):
        return np.asarray(array)
    torch = sys.modules.get("torch")
    return np.from_dlpack(array) if torch is None else torch.from_dlpack(array)


def empty_like(array: Any, shape: Sequence[int]) -> Any:
    """An uninitialised contiguous array of the same library (torch or NumPy) and dtype."""
    return array.new_empty(tuple(shape)) if is_torch(array) else np.empty(shape, array.dtype)


def contiguous(array: Any) -> Any:
    """The array itself if its elements lie back to back in row-major order, otherwise a copy that does so."""
    if view(array).contiguous:
        return array
    return array.contiguous() if is_torch(array) else np.ascontiguousarray(array)


def assign(target: Any, source: Any) -> None:
    """target[...] = source, whatever target's strides are."""
    if is_torch(target):
        import torch

        with torch.no_grad():
            target.copy_(source)
    else:
        target[...] = source


def arena_array(shape: int | Sequence[int], dtype: Any, like: str | None) -> Any:
    """A zeroed array whose pages local peers have mapped."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if like not in (None, "torch", "numpy"):
        raise InvalidArgument(f"like must be 'torch' or 'numpy', got {like!r}")
    torch = sys.modules.get("torch")
    if like == "torch" and torch is None:
        import torch
    for_torch = torch is not None and (dtype is None or isinstance(dtype, torch.dtype))
    as_torch = like == "torch" or (like is None and for_torch)
    count = math.prod(shape)
    if as_torch:
        assert torch is not None
        dtype = torch.float32 if dtype is None else dtype
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        pages = _C.Arena.process().allocate(max(1, count * dtype.itemsize))
        return torch.from_numpy(pages)[: count * dtype.itemsize].view(dtype).reshape(shape)
    kind = np.dtype(np.float32 if dtype is None else dtype)
    pages = _C.Arena.process().allocate(max(1, count * kind.itemsize))
    return pages[: count * kind.itemsize].view(kind).reshape(shape)
