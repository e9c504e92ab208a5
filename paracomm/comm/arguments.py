"""What the collectives ask of their arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from paracomm import _C
from paracomm.comm.arrays import DTYPE_NAMES, MOST_ELEMENTS, View, assign, empty_like, integer, name_of, view
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
    number = integer(value)
    if number is None or not least <= number <= most:
        raise InvalidArgument(f"{what} must be in {least}..{most}, a whole number, got {value!r}")
    return number


def text(what: str, value: Any) -> str:
    """Raises InvalidArgument for what is no str."""
    if not isinstance(value, str):
        raise InvalidArgument(f"{what} must be a str, got {value!r}")
    return value


def flag(what: str, value: Any) -> bool:
    """Raises InvalidArgument for what is neither true nor false."""
    try:
        return bool(value)
    except Exception as error:
        raise InvalidArgument(f"{what} must be True or False, got a {type(value).__name__}: {error}") from None


def op_code(op: str) -> int:
    """The core's number of a reduction."""
    code = _C.REDUCE_OPS.get(op) if isinstance(op, str) else None
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
    return v.device == w.device and v.address < w.address + w.nbytes and w.address < v.address + v.nbytes


def apart(source: Any, v: View, w: View, at: int | None = None) -> tuple[Any, View]:
    """The input of an operation whose output is `w`, or a copy of it where the two share memory.

    Args:
        at: bytes from the start of the output to that of an input that may lie in it, or before it; None: there is no
            such place.
    """
    if not overlap(v, w) or (at is not None and v.address == w.address + at):
        return source, v
    source = copy_of(source)
    return source, view(source)


def rank_of(what: str, value: Any, world_size: int) -> int:
    """A rank. Raises InvalidArgument for anything but a whole number in range."""
    number = integer(value)
    if number is None or not 0 <= number < world_size:
        raise InvalidArgument(f"{what} must be in 0..{world_size - 1}, got {value!r}")
    return number


def block_rows(what: str, values: Any, world_size: int) -> list[int]:
    """The rows of every rank's block. Raises InvalidArgument for anything but a whole number, not negative, a rank."""
    try:
        rows = [row for value in values if (row := integer(value)) is not None and 0 <= row < MOST_ELEMENTS]
        fits = len(rows) == len(values) == world_size
    except (TypeError, RuntimeError):  # no sequence; torch, of a tensor without dimensions or values
        fits = False
    if not fits:
        raise InvalidArgument(f"{what} must be {world_size} whole numbers, none negative, one a rank; got {values!r}")
    return rows


def need_rows(what: str, shape: Sequence[int]) -> None:
    """Raises InvalidArgument for an array without dimensions."""
    if not len(shape):
        raise InvalidArgument(f"{what}: x needs at least one dimension")


def need_blocks(what: str, shape: Sequence[int], world_size: int) -> None:
    """Raises InvalidArgument unless the elements of an array of this shape make world_size equal blocks."""
    if (count := math.prod(shape)) % world_size:
        raise InvalidArgument(f"{what}: {count} elements do not divide into {world_size} equal blocks")


def need_same(what: str, v: View, w: View, expected: int) -> None:
    """Raises InvalidArgument unless input and output have one dtype and device, and the output `expected` elements."""
    if v.dtype != w.dtype:
        raise InvalidArgument(f"{what}: input is {DTYPE_NAMES[v.dtype]}, output is {DTYPE_NAMES[w.dtype]}")
    if v.device != w.device:
        raise InvalidArgument(f"{what}: input is on {name_of(v.device)}, output is on {name_of(w.device)}")
    if w.count != expected:
        raise InvalidArgument(f"{what}: output has {w.count} elements, expected {expected}")


def block_shape(what: str, shape: Sequence[int], world_size: int) -> tuple[int, ...]:
    """The shape of one of world_size equal blocks along dimension 0."""
    if not shape or shape[0] % world_size:
        raise InvalidArgument(f"{what}: dimension 0 of {tuple(shape)} is not a multiple of world_size {world_size}")
    return (shape[0] // world_size, *shape[1:])
