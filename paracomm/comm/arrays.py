"""Memory of arrays on the CPU and on GPUs, and new arrays of the same kind, for torch, NumPy, CuPy and DLPack alike."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paracomm import _C
from paracomm.errors import InvalidArgument

HOST = -1
"""In place of a GPU's number: memory of the CPU."""
DTYPE_NAMES = {code: name for name, code in _C.DTYPES.items()}


@dataclass(frozen=True)
class View:
    """Where an array's elements are, as the core sees them."""

    address: int
    count: int
    dtype: int
    contiguous: bool
    writable: bool
    device: int = HOST
    """The GPU's number, as CUDA counts in this process."""
    stream: int | None = None
    """Of a GPU: the elements are there for what comes next on this stream; None: on its library's current one."""

    @property
    def nbytes(self) -> int:
        return self.count * int(_C.item_size(self.dtype))


def view(array: Any) -> View:
    """Raises InvalidArgument for what is no dense array on the CPU or a GPU, of a dtype that collectives take."""
    return View(*_C.view(array))


def host_view(array: Any) -> View:
    """The same, and raises InvalidArgument for what is on a GPU."""
    found = view(array)
    if found.device != HOST:
        raise InvalidArgument(f"the array is on cuda:{found.device}, expected the CPU")
    return found


def is_torch(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def is_cupy(array: Any) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


def native(array: Any) -> Any:
    """The array itself if it is torch's, NumPy's or CuPy's, otherwise one of theirs over the same memory."""
    if is_torch(array) or isinstance(array, np.ndarray) or is_cupy(array):
        return array
    found = view(array)  # refuses what is no array
    if found.device != HOST:
        return _native_on_gpu(array, found.device)
    if not hasattr(array, "__dlpack__"):
        return np.asarray(array)
    torch = sys.modules.get("torch")
    return np.from_dlpack(array) if torch is None else torch.from_dlpack(array)


def _native_on_gpu(array: Any, device: int) -> Any:
    if (torch := sys.modules.get("torch")) is not None:
        if hasattr(array, "__dlpack__"):
            return torch.from_dlpack(array)
        return torch.as_tensor(array, device=f"cuda:{device}")
    if (cupy := sys.modules.get("cupy")) is not None:
        return cupy.asarray(array)
    raise InvalidArgument(f"a {type(array).__name__} on cuda:{device}: import torch or cupy first, which wraps it")


def empty_like(array: Any, shape: Sequence[int]) -> Any:
    """An uninitialised contiguous array of the same library (torch, NumPy or CuPy), dtype and device."""
    if is_torch(array):
        return array.new_empty(tuple(shape))
    if is_cupy(array):
        with array.device:
            return sys.modules["cupy"].empty(tuple(shape), array.dtype)
    return np.empty(shape, array.dtype)


def contiguous(array: Any) -> Any:
    """The array itself if its elements lie back to back in row-major order, otherwise a copy that does so."""
    if view(array).contiguous:
        return array
    if is_torch(array):
        return array.contiguous()
    return (sys.modules["cupy"] if is_cupy(array) else np).ascontiguousarray(array)


def host_copy(array: Any) -> Any:
    """A contiguous copy of a GPU's array in host memory, complete when this returns: torch's (pinned) or NumPy's."""
    host = host_room(array)
    if is_torch(array):
        assign(host, array)
    else:
        array.get(out=host)
    return host


def host_room(array: Any) -> Any:
    """Uninitialised host memory of the shape and dtype of a GPU's array: torch's (pinned) or NumPy's."""
    if is_torch(array):
        return sys.modules["torch"].empty(array.shape, dtype=array.dtype, pin_memory=True)
    return np.empty(array.shape, array.dtype)


def assign(target: Any, source: Any) -> None:
    """target[...] = source, whatever target's strides are; source may be in host memory where target is on a GPU."""
    if is_torch(target):
        import torch

        with torch.no_grad():
            target.copy_(source)
    elif is_cupy(target) and isinstance(source, np.ndarray):
        target[...] = sys.modules["cupy"].asarray(source)
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
