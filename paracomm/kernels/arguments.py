"""What every operation asks of its arguments, before any backend sees them."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from paracomm.errors import InvalidArgument

FLOATING = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))
"""float64 has no kernels, see select.py."""


def expect_tensors(name: str, given: dict[str, Any], optional: dict[str, Any] | None = None) -> None:
    """Raises InvalidArgument unless all are dense floating-point tensors on one device; those of `optional` or None."""
    first, device = None, None
    for each in (given, optional):
        for key, x in each.items() if each else ():
            if x is None and each is optional:
                continue
            if not isinstance(x, Tensor):
                raise InvalidArgument(f"{name}: {key} is {type(x).__name__}, expected a tensor")
            if x.dtype not in FLOATING:
                raise InvalidArgument(f"{name}: {key} is {x.dtype}, expected float32, float16, bfloat16 or float64")
            if x.layout is not torch.strided or x.is_nested:
                raise InvalidArgument(f"{name}: {key} is {x.layout}, expected a dense tensor")
            if first is None:
                first, device = x, x.device
            elif x.device != device:
                raise InvalidArgument(
                    f"{name}: {key} is {x.dtype} on {x.device}, expected {first.dtype} on {device} as "
                    f"{next(iter(given))}"
                )


def expect_indices(name: str, key: str, x: Any, dtype: torch.dtype, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises InvalidArgument unless x is a tensor of that dtype and shape on like's device."""
    kind = str(dtype).removeprefix("torch.")
    if not isinstance(x, Tensor):
        raise InvalidArgument(f"{name}: {key} is {type(x).__name__}, expected {kind} {list(shape)}")
    if x.layout != torch.strided:
        raise InvalidArgument(f"{name}: {key} is {x.layout}, expected a dense tensor")
    if x.dtype != dtype or x.shape != shape:
        raise InvalidArgument(f"{name}: {key} {x.dtype} {list(x.shape)}, expected {kind} {list(shape)}")
    if x.device != like.device:
        raise InvalidArgument(f"{name}: {key} on {x.device}, expected on {like.device}")


def is_integer(x: Any) -> bool:
    """bool is none."""
    return type(x) is int or (isinstance(x, (Integral, torch.SymInt)) and not isinstance(x, bool))


def expect_positive(name: str, **values: Any) -> None:
    """Raises InvalidArgument for one that is given and not a finite number above 0."""
    for option, value in values.items():
        if value is None or (type(value) is float and 0.0 < value < math.inf):
            continue
        number = isinstance(value, (Real, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)
        if not number or not value > 0 or value == math.inf:
            raise InvalidArgument(f"{name}: {option} is {value}, expected more than 0 and finite")


def expect_window(name: str, window: int | None) -> None:
    if window is not None and not is_integer(window):
        raise InvalidArgument(f"{name}: window is {window!r}, expected an integer")
    expect_positive(name, window=window)


def readable(x: Tensor) -> bool:
    """Whether values may be looked at at once: those of a CPU, and not while they are traced, faked or transformed."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not without_values(x)
    )


def without_values(x: Tensor) -> bool:
    """Whether x has a shape and nothing else."""
    return x.device.type == "meta" or isinstance(x, FakeTensor)
