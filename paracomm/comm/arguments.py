"""What the collectives ask of their arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from paracomm import _C
from paracomm.comm.arrays import DTYPE_NAMES, View, assign, empty_like
from paracomm.comm.device import name_of
from paracomm.errors import InvalidArgument

LONGEST_S = 1e9
"""The core takes so long a time (31 years) and more as one without end."""


def seconds(what: str, value: Any, default: float = -1.0) -> float:
    """A finite number of seconds above 0, of which LONGEST_S count at most; `default` (-1.0, by which the core knows
    the communicator's own) for None.

    Raises:
        InvalidArgument: `value` is anything else.
    """
    if value is None:
        return default
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise InvalidArgument(f"{what} must be a finite number of seconds above 0, got {value!r}")
    return float(min(value, LONGEST_S))


def whole(what: str, value: Any, least: int, most: int) -> int:
    """A whole number from `least` to `most`.

    Raises:
        InvalidArgument: `value` is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise InvalidArgument(f"{what} must be in {least}..{most}, a whole number, got {value!r}")
    return int(value)


def text(what: str, value: Any) -> str:
    """Raises InvalidArgument for what is no str."""
    if not isinstance(value, str):
        raise InvalidArgument(f"{what} must be a str, got {value!r}")
    return value


def op_code(op: str) -> int:
    """The core's number of a reduction."""
    code = _C.REDUCE_OPS.get(op)
    if code is None:
        raise InvalidArgument(f"unknown reduction {op!r}: expected one of {', '.join(_C.REDUCE_OPS)}")
    return int(code)


def copy_of(x: Any) -> Any:
    """A contiguous copy, of the same library and device."""
    twin = empty_like(x, x.shape)
    assign(twin, x)
    return twin


def overlap(v: View, w: View) -> bool:
    """Whether two arrays share memory."""
    return v.address < w.address + w.nbytes and w.address < v.address + v.nbytes


def need_rows(what: str, x: Any) -> None:
    """Raises InvalidArgument for an array without dimensions."""
    if not len(x.shape):
        raise InvalidArgument(f"{what}: x needs at least one dimension")


def need_same(what: str, v: View, w: View, expected: int, found: int | None = None) -> None:
    """Raises InvalidArgument unless input and output have one dtype and device, and the output (or `found`) `expected`
    elements."""
    if v.dtype != w.dtype:
        raise InvalidArgument(f"{what}: input is {DTYPE_NAMES[v.dtype]}, output is {DTYPE_NAMES[w.dtype]}")
    if v.device != w.device:
        raise InvalidArgument(f"{what}: input is on {name_of(v.device)}, output is on {name_of(w.device)}")
    found = w.count if found is None else found
    if found != expected:
        raise InvalidArgument(f"{what}: output has {found} elements, expected {expected}")


def block_shape(what: str, shape: Sequence[int], world_size: int) -> tuple[int, ...]:
    """The shape of one of world_size equal blocks along dimension 0."""
    if not shape or shape[0] % world_size:
        raise InvalidArgument(f"{what}: dimension 0 of {tuple(shape)} is not a multiple of world_size {world_size}")
    return (shape[0] // world_size, *shape[1:])
