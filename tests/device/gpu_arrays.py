"""A stand-in for CuPy: arrays that say they are on GPU 0, in host memory, for a machine without any GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

GPU = 0
DLPACK_CUDA = 2
LEGACY_STREAM = 1


settled: list[Callable[[], None]] = []


def settle() -> None:
    """Waits for the default stream, where there are streams: whoever makes them puts what waits into `settled`."""
    for wait in settled:
        wait()


class ndarray:
    """What paracomm uses of cupy.ndarray. `stream` is what the array interface names."""

    def __init__(self, x: np.ndarray, stream: int | None = LEGACY_STREAM) -> None:
        self.x, self.stream = x, stream

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        found = self.x.__array_interface__
        return {
            "shape": self.x.shape, "typestr": found["typestr"], "data": found["data"], "strides": found["strides"],
            "version": 3, "stream": self.stream,
        }  # fmt: skip

    def __dlpack_device__(self) -> tuple[int, int]:
        return DLPACK_CUDA, GPU

    shape = property(lambda self: self.x.shape)
    dtype = property(lambda self: self.x.dtype)
    device = property(lambda self: Device(GPU))

    def __getitem__(self, index: Any) -> ndarray:
        return ndarray(self.x[index], self.stream)

    def __setitem__(self, index: Any, value: Any) -> None:
        assert isinstance(value, ndarray), "CuPy takes no array of the host here"
        settle()  # CuPy would queue the copy
        self.x[index] = value.x

    def get(self, out: np.ndarray) -> np.ndarray:
        out[...] = self.x
        return out


class Device:
    """cupy.cuda.Device."""

    def __init__(self, index: int = GPU) -> None:
        self.id = index

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def install() -> ModuleType:
    """`cupy`, for this process."""
    cupy: Any = ModuleType("cupy")
    cupy.ndarray = ndarray
    cupy.empty = lambda shape, dtype: ndarray(np.full(shape, 77, dtype), None)
    cupy.asarray = lambda x: ndarray(np.array(x), None)
    cupy.ascontiguousarray = lambda a: ndarray(np.ascontiguousarray(a.x), a.stream)
    cupy.cuda = SimpleNamespace(Device=Device, get_current_stream=lambda: SimpleNamespace(ptr=0))
    sys.modules["cupy"] = cupy
    return cupy
