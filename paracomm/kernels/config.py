"""Block sizes, warps and stages of every kernel, from tables that the static tuner wrote (`paracomm tune kernels`).

    tables/sm_80.json   {kernel: {dtype: {size: {"BM": 128, "BN": 64, "warps": 4, "stages": 3}}}}

`size` is what the kernel's resources depend on: the padded head size of attention, nothing ("0") of a product. Nothing
is tuned while a program runs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import resources
from typing import Any

from paracomm.errors import Error

ARCHES = (80, 90)

_override: ContextVar[dict[str, dict[str, int]] | None] = ContextVar("override", default=None)


@functools.cache
def table(arch: int) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """The whole table of sm_`arch`."""
    text = resources.files("paracomm.kernels").joinpath(f"tables/sm_{arch}.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found


def config(kernel: str, arch: int, dtype: str, size: int = 0) -> dict[str, int]:
    """Of the smallest `size` in the table that is not below this one, else of the largest; a copy.

    Raises Error for a kernel or dtype that the table lacks.
    """
    chosen = (_override.get() or {}).get(kernel)
    if chosen is not None:
        return dict(chosen)
    rows = table(arch).get(kernel, {}).get(dtype)
    if not rows:
        raise Error(f"kernels: tables/sm_{arch}.json has no row for {kernel} in {dtype}")
    sizes = sorted(map(int, rows))
    fitting = next((each for each in sizes if each >= size), sizes[-1])
    return dict(rows[str(fitting)])


@contextmanager
def override(**kernels: dict[str, int]) -> Iterator[None]:
    """Inside, kernel names give these configurations: for tests, whose shapes are small, and for trials."""
    token = _override.set((_override.get() or {}) | kernels)
    try:
        yield
    finally:
        _override.reset(token)
