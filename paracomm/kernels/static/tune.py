"""Chooses configurations with no GPU: compiles candidates, drops what spills or does not fit, ranks the rest.

For each (kernel, dtype, size) a candidate must compile, keep everything in registers and fit shared memory for EVERY
variant that its row will serve. Of those the one with the largest serial share of peak (model.py) is taken, and of
equals the one whose block holds more work. Statements about time this are not: a GPU may prefer another.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from paracomm.errors import Error
from paracomm.kernels.attention import WIDEST_FLOAT32
from paracomm.kernels.static.attention_cases import ATTENTION, HEAD_SIZES, attention_cases
from paracomm.kernels.static.case import Case
from paracomm.kernels.static.compile import compile_case
from paracomm.kernels.static.model import estimate, fits, occupancy
from paracomm.kernels.static.product_cases import PRODUCTS, product_cases
from paracomm.kernels.static.sass import parse

Row = dict[str, int]
TABLES = Path(__file__).resolve().parent.parent / "tables"


@dataclass(frozen=True)
class Candidate:
    """A row that may be shipped, and its serial share of peak (0 where no loop multiplies) at its slowest variant."""

    row: Row
    serial: float
    blocks: int

    def rank(self) -> tuple[bool, bool, float, int, int]:
        """What has dk and dv at once comes first, then loads ahead: the model sees no latency of memory."""
        work = self.row.get("BM", 1) * self.row.get("BN", 1)
        return "SPLIT" not in self.row, self.row["stages"] > 1, round(self.serial, 2), work, self.blocks


def accumulators(kernel: str, BM: int, BN: int, size: int, apart: bool = False) -> int:
    """float32 that a program of attention holds between products; `apart`: one of dk and dv."""
    if "dkdv" in kernel:
        return (1 if apart else 2) * BN * size + 2 * BN * BM
    return BM * size + (2 if "dq" in kernel else 1) * BM * BN


def attention_rows(kernel: str, size: int, nbytes: int, arch: int) -> Iterator[Row]:
    """For head size `size` of elements of `nbytes`, large tiles first; those are left out that cannot fit registers.

    dk and dv are computed apart (SPLIT: more products, fewer registers) only where no row has both.
    """
    sides, most = (128, 64, 32, 16), 144 if kernel.endswith("_heavy") else 176
    order = sorted(itertools.product(sides, sides), key=lambda sides: (-sides[0] * sides[1], abs(sides[0] - sides[1])))
    for apart, depths in itertools.product((False, True) if "dkdv" in kernel else (False,), ((2, 3), (1,))):
        for (BM, BN), warps, stages in itertools.product(order, (8, 4), depths):
            of_thread = accumulators(kernel, BM, BN, size, apart) / (32 * warps)
            # A warp group's products have 64 rows.
            if arch >= 90 and (BN if "dkdv" in kernel else BM) < 64:
                continue
            if 8 <= of_thread <= most and stages * 2 * min(BM, BN) * size * nbytes <= 160 * 1024:
                yield {"BM": BM, "BN": BN, "warps": warps, "stages": stages} | ({"SPLIT": 1} if apart else {})


def product_rows(arch: int, dtype: str) -> Iterator[Row]:
    blocks = [(128, 128), (128, 64), (64, 128), (64, 64), (64, 32)]
    for (BM, BN), BK, warps, stages in itertools.product(blocks, (64, 32), (8, 4), (4, 3, 2)):
        row = {"BM": BM, "BN": BN, "BK": BK, "GROUP": 8, "warps": warps, "stages": stages}
        yield row | {"TMA": 1} if arch >= 90 and dtype != "float32" else row


def judge(cases: list[Case], arch: int, row: Row) -> Candidate | None:
    """None where a variant does not compile or must not be shipped."""
    serial, blocks = 1.0, 32
    for case in cases:
        try:
            binary = compile_case(case, arch)
        except Error:
            return None
        if fits(binary) is not None or (case.matmul and arch >= 90 and "HGMMA" not in parse(binary.code).mix):
            return None
        found = estimate(binary)
        serial = min(serial, found.serial if found is not None else 0.0)
        blocks = min(blocks, occupancy(binary))
    return Candidate(row, serial, blocks)


def best(rows: Iterable[Row], cases_of: Callable[[Row], list[Case]], arch: int, enough: int) -> Candidate:
    """The best of the first `enough` of `rows` that may be shipped. Raises Error if none may."""
    found: list[Candidate] = []
    tried = 0
    for row in rows:
        tried += 1
        candidate = judge(cases_of(row), arch, row)
        if candidate is not None:
            found.append(candidate)
            if len(found) >= enough:
                break
    if not found:
        raise Error(f"none of {tried} configurations may be shipped on sm_{arch}")
    return max(found, key=Candidate.rank)


def tune(arch: int, only: str = "", enough: int = 6) -> Iterator[tuple[str, str, int, Candidate]]:
    """(kernel, dtype, size, what was chosen) for the kernels whose name contains `only`.

    float16 takes what bfloat16 takes: the instructions are the same.
    """
    for kernel, dtype, size, rows, cases_of in jobs(arch):
        if only in kernel:
            yield kernel, dtype, size, best(rows, cases_of, arch, enough)


def jobs(arch: int) -> Iterator[tuple[str, str, int, Iterable[Row], Callable[[Row], list[Case]]]]:
    for kernel in ATTENTION:
        for dtype, nbytes in (("bfloat16", 2), ("float32", 4)):
            for size in HEAD_SIZES:
                if dtype == "float32" and size > WIDEST_FLOAT32:
                    continue
                yield (
                    kernel,
                    dtype,
                    size,
                    attention_rows(kernel, size, nbytes, arch),
                    partial(attention_cases, kernel, dtype, size),
                )
    for kernel in PRODUCTS:
        for dtype in ("bfloat16", "float32"):
            yield kernel, dtype, 0, product_rows(arch, dtype), partial(product_cases, kernel, dtype)


def merge(table: dict[str, Any], kernel: str, dtype: str, size: int, row: Row) -> None:
    """Puts a row into a table as config() reads it."""
    for name in ("bfloat16", "float16") if dtype == "bfloat16" else (dtype,):
        table.setdefault(kernel, {}).setdefault(name, {})[str(size)] = dict(row)


def dump(table: dict[str, Any], arch: int) -> None:
    """Writes the table that config() reads."""
    (TABLES / f"sm_{arch}.json").write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
