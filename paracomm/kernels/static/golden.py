"""Static figures of every shipped case, and the golden table that a change of them shows up in.

python -m paracomm.kernels.static.golden FILE    writes the table anew (minutes)
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paracomm.kernels.config import ARCHES
from paracomm.kernels.static.case import Case
from paracomm.kernels.static.compile import compile_case
from paracomm.kernels.static.model import estimate, fits, occupancy
from paracomm.kernels.static.sass import parse
from paracomm.kernels.static.shipped import cases

GOLDEN = ("registers", "stack", "shared", "occupancy", "hgmma", "hmma", "utmaldg", "setmaxreg")
"""What the golden table keeps; the estimates follow from the code."""


@dataclass(frozen=True)
class Figures:
    """Of one case on one architecture. Bytes: stack of a thread, shared memory of a block; instructions are counted."""

    registers: int
    stack: int
    shared: int
    occupancy: int
    hgmma: int
    hmma: int
    utmaldg: int
    setmaxreg: int
    serial: float | None
    overlap: float | None
    refusal: str | None

    def golden(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if name in GOLDEN}


@functools.cache
def _cases(arch: int) -> dict[str, Case]:
    return {case.name: case for case in cases(arch)}


def figures_of(name: str, arch: int) -> Figures:
    """Compiles the case of that name."""
    binary = compile_case(_cases(arch)[name], arch)
    mix, found = parse(binary.code).mix, estimate(binary)
    serial, overlap = (None, None) if found is None else (found.serial, found.overlap)
    return Figures(
        binary.registers, binary.stack, binary.shared, occupancy(binary), mix["HGMMA"], mix["HMMA"], mix["UTMALDG"],
        mix["USETMAXREG"], serial, overlap, fits(binary),
    )  # fmt: skip


def complaints(name: str, arch: int, found: Figures) -> list[str]:
    """Why a case must not be shipped: empty if it may."""
    case, wrong = _cases(arch)[name], []
    if found.refusal:
        wrong.append(found.refusal)
    if case.matmul and arch >= 90 and not found.hgmma:
        wrong.append("multiplies without HGMMA")
    if case.matmul and arch < 90 and not found.hmma:
        wrong.append("multiplies without HMMA")
    if case.tma and not found.utmaldg:
        wrong.append("loads by descriptors without UTMALDG")
    if case.specialised and not found.setmaxreg:
        wrong.append("its warps are not specialised: no USETMAXREG")
    return wrong


def all_figures(names: Iterable[tuple[str, int]], jobs: int) -> Iterator[tuple[str, int, Figures]]:
    """Of (name, arch) each, in order, compiled by `jobs` processes."""
    wanted = list(names)
    with ProcessPoolExecutor(jobs) as pool:
        for (name, arch), figures in zip(wanted, pool.map(figures_of, *zip(*wanted, strict=True)), strict=True):
            yield name, arch, figures


def every_name() -> list[tuple[str, int]]:
    return [(name, arch) for arch in ARCHES for name in _cases(arch)]


def main(path: str) -> None:
    table: dict[str, dict[str, Any]] = {}
    for name, arch, figures in all_figures(every_name(), os.cpu_count() or 1):
        table.setdefault(f"sm_{arch}", {})[name] = figures.golden()
        for wrong in complaints(name, arch, figures):
            print(f"sm_{arch} {name}: {wrong}", file=sys.stderr)
    lines = [
        f'"{arch}": {{\n' + ",\n".join(f"  {json.dumps(n)}: {json.dumps(f)}" for n, f in sorted(rows.items())) + "\n}"
        for arch, rows in sorted(table.items())
    ]
    Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1])
