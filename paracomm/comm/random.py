"""Random numbers as a function of where they are used, in the vector code of the core (src/random/random.h).

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11): an element's number
follows from (seed, stream, step, index) alone, so that every rank finds the numbers of its part by itself.
"""

from __future__ import annotations

from typing import Any

from paracomm import _C
from paracomm.comm.arrays import DTYPE_NAMES, View, host_view
from paracomm.errors import InvalidArgument

_INT64, _BOOL, _FLOAT64 = _C.DTYPES["int64"], _C.DTYPES["bool"], _C.DTYPES["float64"]


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """The four 32-bit words of one counter, as the paper and the Random123 library number them."""
    w, x, y, z = _C.philox(counter, key)
    return w, x, y, z


def keep_mask(seed: int, stream: int, step: int, bases: Any, offsets: Any, threshold: int, out: Any) -> None:
    """out[i, j] = word(bases[i] + offsets[j]) >= threshold; indices are taken modulo 2^64.

    Args:
        seed: 64 bits; stream, step, threshold: 32 bits each, none negative.
        bases: int64 [I]; offsets: int64 [J], fastest where they follow each other by one.
        out: bool [I, J] or any shape of as many elements.

    Raises InvalidArgument for numbers out of range and for other dtypes, strides or sizes.
    """
    _expect_bits("keep_mask", seed=(seed, 64), stream=(stream, 32), step=(step, 32), threshold=(threshold, 32))
    rows, columns = _dense("bases", bases, _INT64), _dense("offsets", offsets, _INT64)
    target = _dense("out", out, _BOOL)
    if target.count != rows.count * columns.count:
        raise InvalidArgument(
            f"keep_mask: out has {target.count} elements, expected {rows.count} bases x {columns.count} offsets"
        )
    _C.keep_mask(seed, stream, step, bases, offsets, threshold, out)


def fill_normal(seed: int, stream: int, step: int, first: int, out: Any) -> None:
    """out[i] = normal number `first` + i, mean 0 and deviation 1; `out` is dense float64. Raises as keep_mask."""
    _expect_bits("fill_normal", seed=(seed, 64), stream=(stream, 32), step=(step, 32), first=(first, 64))
    _dense("out", out, _FLOAT64)
    _C.fill_normal(seed, stream, step, first, out)


def _expect_bits(where: str, **numbers: tuple[int, int]) -> None:
    for name, (number, bits) in numbers.items():
        if not 0 <= number < 1 << bits:
            raise InvalidArgument(f"{where}: {name} is {number}, expected 0 <= {name} < 2^{bits}")


def _dense(name: str, array: Any, dtype: int) -> View:
    found = host_view(array)
    if found.dtype != dtype or not found.contiguous:
        raise InvalidArgument(
            f"{name} is {'' if found.contiguous else 'strided '}{DTYPE_NAMES[found.dtype]}, "
            f"expected contiguous {DTYPE_NAMES[dtype]}"
        )
    return found
