"""Memory of arrays on the CPU and on GPUs, and new arrays of the same kind, for torch, NumPy, CuPy and DLPack alike.

Every array of a caller passes here once, on its way in: `native` says which object has its memory, `known` in which
dtype the core moves it, `view` where its elements are. What refuses an array does so before anything is sent.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paracomm import _C
from paracomm.errors import InvalidArgument

HOST = -1
"""In place of a GPU's number: memory of the CPU."""
MOST_ELEMENTS = 1 << 47
"""Of an array: what a process can address."""
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
    lazy: bool = False
    """torch shows the negative of what lies in memory. Then it is not contiguous either."""
    distinct: bool = True
    """No two elements share memory."""

    @property
    def nbytes(self) -> int:
        return self.count * int(_C.item_size(self.dtype))


def view(array: Any) -> View:
    """Raises InvalidArgument for what is no dense array on the CPU or a GPU, of a dtype that collectives take."""
    return View(*_C.view(array))


def writable_view(what: str, array: Any) -> View:
    """The view of an array, as the core knows it, that an operation can write. Raises InvalidArgument for others."""
    found = view(known(array))
    if not found.writable:
        raise InvalidArgument(f"{what}: the output array is read-only")
    if not found.distinct:
        raise InvalidArgument(
            f"{what}: elements of the array share memory (a stride is 0, or smaller than what it steps over), so that "
            "no result can be put into it; pass a contiguous copy"
        )
    return found


def host_view(array: Any) -> View:
    """The same, and raises InvalidArgument for what is on a GPU."""
    found = view(array)
    if found.device != HOST:
        raise InvalidArgument(f"the array is on cuda:{found.device}, expected the CPU")
    return found


def name_of(index: int) -> str:
    """ "cuda:1", or "the CPU"."""
    return "the CPU" if index == HOST else f"cuda:{index}"


def is_torch(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def is_cupy(array: Any) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


class Several:
    """Arrays of one dtype and device that stand for one array of all their elements, one after the other."""

    def __init__(self, arrays: Sequence[Any]) -> None:
        self.arrays = [native(array) for array in arrays]
        first = known(self.arrays[0])
        for array in self.arrays:
            if array.dtype != self.arrays[0].dtype or view(known(array)).device != view(first).device:
                found = f"{array.dtype} and {self.arrays[0].dtype}"
                raise InvalidArgument(f"arrays of {found} in one operation, expected one dtype and device")
        self.shape = (sum(math.prod(array.shape) for array in self.arrays),)

    def joined(self) -> Any:
        """One flat array over the memory of all, if they lie back to back in one storage, as the chunks of a torch
        tensor do. None: they do not."""
        first = self.arrays[0]
        if not is_torch(first) or any(map(is_lazy, self.arrays)):
            return None
        storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
        for array in self.arrays:
            if not view(known(array)).contiguous or array.untyped_storage().data_ptr() != storage:
                return None
            if array.numel() and array.storage_offset() != offset:
                return None
            offset += array.numel()
        count = offset - first.storage_offset()
        return first.detach().as_strided((count,), (1,))

    def packed(self) -> Any:
        """All elements in one dimension: over the same memory if they lie so, otherwise a copy."""
        whole = self.joined()
        if whole is not None:
            return whole
        flat = [contiguous(array).reshape(-1) for array in self.arrays]
        return sys.modules["torch"].cat(flat) if is_torch(flat[0]) else np.concatenate(flat)


def native(array: Any) -> Any:
    """The array itself if it is torch's, NumPy's or CuPy's, otherwise one of theirs over the same memory.

    torch's AsyncCollectiveTensor is waited for and unwrapped.
    """
    if is_torch(array):
        kind = type(array)
        if kind.__name__ == "AsyncCollectiveTensor":
            return array.trigger_wait()
        if kind.__torch_dispatch__ is not sys.modules["torch"].Tensor.__torch_dispatch__:
            view(array)  # refuses it
        return array.detach() if array.requires_grad else array
    if isinstance(array, np.ndarray) or is_cupy(array):
        return array
    found = view(array)  # refuses what is no array
    if found.device != HOST:
        return _native_on_gpu(array, found.device)
    if not hasattr(array, "__dlpack__"):
        return np.asarray(memoryview(array))  # NumPy copies a scalar, and reads bytes as text
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


def known(array: Any) -> Any:
    """A view of the array in a dtype that the core knows: complex numbers as pairs, floats of 8 bits as uint8.

    Raises:
        InvalidArgument: there is none.
    """
    if _name(array.dtype) in _C.DTYPES:
        return array
    if is_torch(array):
        torch = sys.modules["torch"]
        if array.layout is not torch.strided or array.is_quantized:
            return array
        if array.is_complex():
            return torch.view_as_real(array.conj() if array.is_conj() else array)
        return array.view(torch.uint8) if _name(array.dtype).startswith("float8") else array
    if array.dtype.kind != "c":
        return array
    pairs = np if isinstance(array, np.ndarray) else sys.modules["cupy"]
    half = array.itemsize // 2
    return pairs.lib.stride_tricks.as_strided(array.real, (*array.shape, 2), (*array.strides, half))


def need_reducible(what: str, array: Any, op: str) -> None:
    """Raises InvalidArgument where the core moves an array as something else than the numbers that it holds."""
    first = array.arrays[0] if isinstance(array, Several) else array
    dtype = _name(first.dtype)
    if dtype in _C.DTYPES or (dtype.startswith("complex") and op in ("sum", "avg")):
        return
    raise InvalidArgument(f"{what}: {op} is not defined for {dtype}")


_names: dict[Any, str] = {}


def _name(dtype: Any) -> str:
    """ "float32", of torch's or NumPy's."""
    name = _names.get(dtype)
    if name is None:
        name = _names[dtype] = str(dtype).removeprefix("torch.")
    return name


def is_lazy(array: Any) -> bool:
    """Whether torch shows the conjugate or the negative of what lies in memory."""
    return is_torch(array) and (array.is_conj() or array.is_neg())


def held(arrays: Iterable[Any]) -> list[Any]:
    """What keeps the arrays' memory, whatever is done to the arrays meanwhile."""
    return [array.untyped_storage() for array in arrays if is_torch(array)]


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
    if is_lazy(array):
        array = array.resolve_conj().resolve_neg()
    if view(known(array)).contiguous:
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


def host_room(array: Any, shape: Sequence[int] | None = None) -> Any:
    """Uninitialised host memory of the dtype and, unless it is given, the shape of a GPU's array: torch's (pinned) or
    NumPy's."""
    shape = array.shape if shape is None else shape
    if is_torch(array):
        return sys.modules["torch"].empty(shape, dtype=array.dtype, pin_memory=True)
    return np.empty(shape, array.dtype)


def assign(target: Any, source: Any) -> None:
    """target[...] = source, whatever target's strides are; source may be in host memory where target is on a GPU."""
    if is_torch(target):
        import torch

        # The mode of the caller's thread is not that of the thread that completes an operation.
        with torch.inference_mode() if target.is_inference() else torch.no_grad():
            target.copy_(source)
    elif is_cupy(target) and isinstance(source, np.ndarray):
        target[...] = sys.modules["cupy"].asarray(source)
    else:
        target[...] = source


def unpack(packed: Any, arrays: Sequence[Any]) -> None:
    """Copies the parts of a flat array into the arrays, whatever their strides are."""
    if len(arrays) == 1:
        return assign(arrays[0], packed)
    begin = 0
    for array in arrays:
        count = math.prod(array.shape)
        assign(array, packed[begin : begin + count].reshape(array.shape))
        begin += count


def integer(value: Any) -> int | None:
    """Of whatever Python takes as an index (an array's element too), but a truth value. None: it is no such thing."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or _name(getattr(value, "dtype", "")) == "bool":
        return None
    try:
        return operator.index(value)
    except Exception:  # a float, or several; a tensor without values
        return None


def arena_array(shape: int | Sequence[int], dtype: Any, like: str | None) -> Any:
    """A zeroed array whose pages local peers have mapped."""
    lengths = [integer(n) for n in (shape if isinstance(shape, Sequence) else (shape,))]
    if isinstance(shape, (str, bytes)) or not all(n is not None and n >= 0 for n in lengths):
        raise InvalidArgument(f"shape must be whole numbers, none negative, got {shape!r}")
    shape = tuple(n for n in lengths if n is not None)
    if math.prod(shape) >= MOST_ELEMENTS:
        raise InvalidArgument(f"an array of shape {shape!r} is larger than memory can be")
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
        asked = dtype
        dtype = torch.float32 if dtype is None else dtype
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise InvalidArgument(f"dtype must be one of torch's, got {asked!r}")
        pages = _C.Arena.process().allocate(max(1, count * dtype.itemsize))
        return torch.from_numpy(pages)[: count * dtype.itemsize].view(dtype).reshape(shape)
    try:
        kind = np.dtype(np.float32 if dtype is None else dtype)
    except TypeError as error:
        raise InvalidArgument(f"dtype must be one of NumPy's or torch's, got {dtype!r}: {error}") from None
    if kind.hasobject or kind.itemsize == 0:
        raise InvalidArgument(f"dtype must be of numbers, got {dtype!r}")
    pages = _C.Arena.process().allocate(max(1, count * kind.itemsize))
    return pages[: count * kind.itemsize].view(kind).reshape(shape)
