"""Kernels compiled ahead of time: what their machine code needs, beside the golden table. Static: nothing is run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from paracomm.kernels.select import interpreted

if interpreted():
    pytest.skip("kernels are compiled in a process without TRITON_INTERPRET=1", allow_module_level=True)

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

import paracomm.kernels
from paracomm.errors import Error
from paracomm.kernels.config import ARCHES, table
from paracomm.kernels.static import sass
from paracomm.kernels.static.case import Case
from paracomm.kernels.static.compile import compile_case
from paracomm.kernels.static.golden import Figures, all_figures, complaints, every_name, figures_of
from paracomm.kernels.static.model import Estimate, estimate, fits, flop, occupancy
from paracomm.kernels.static.shipped import cases

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "golden" / "kernels.json").read_text())
QUICK = [name for name in every_name() if name[0] in {
    "attention_forward causal bfloat16 128", "attention_dkdv causal bfloat16 128", "attention_dq causal bfloat16 128",
    "attention_forward causal float32 64", "glu silu kept bfloat16", "linear plain float32",
}]  # fmt: skip


def check(name: str, arch: int, figures: Figures) -> list[str]:
    found = [f"sm_{arch} {name}: {wrong}" for wrong in complaints(name, arch, figures)]
    golden = GOLDEN.get(f"sm_{arch}", {}).get(name)
    if golden != figures.golden():
        found.append(f"sm_{arch} {name}: {figures.golden()}, the golden table has {golden}")
    return found


@pytest.mark.parametrize(("name", "arch"), QUICK)
def test_a_sample_of_what_is_shipped(name: str, arch: int) -> None:
    assert check(name, arch, figures_of(name, arch)) == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
def test_everything_that_is_shipped(arch: int) -> None:
    """Compiles, keeps its values in registers, fits, multiplies on tensor cores; costs what the golden table says.

    Where that is meant to change: python -m paracomm.kernels.static.golden tests/golden/kernels.json
    """
    names = [name for name in every_name() if name[1] == arch]
    wrong = [line for each in all_figures(names, os.cpu_count() or 1) for line in check(*each)]
    assert wrong == []


def test_the_golden_table_has_what_is_shipped() -> None:
    known = {(name, int(arch.removeprefix("sm_"))) for arch, rows in GOLDEN.items() for name in rows}
    assert known == set(every_name())


def test_every_kernel_is_shipped() -> None:
    """Functions whose name ends in _kernel are launched; each is compiled ahead of time for both architectures."""
    launched = {
        match
        for path in Path(paracomm.kernels.__path__[0]).glob("*.py")
        for match in re.findall(r"^@triton\.jit\ndef (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert len(launched) >= 20
    for arch in ARCHES:
        missing = launched - {case.fn.__name__ for case in cases(arch)}
        assert missing <= ({"attention_forward_tma_kernel"} if arch < 90 else set()), f"sm_{arch}"


@pytest.mark.parametrize("arch", ARCHES)
def test_every_row_is_shipped(arch: int) -> None:
    names = [case.name for case in cases(arch)]
    assert len(set(names)) == len(names)
    for kernel, dtypes in table(arch).items():
        for dtype, size in ((dtype, size) for dtype, rows in dtypes.items() for size in rows):
            end = f" {dtype}" + (f" {size}" if size != "0" else "")
            assert any(name.startswith(f"{kernel} ") and name.endswith(end) for name in names), (kernel, dtype, size)


BARS = {
    "attention_forward causal bfloat16 128": 0.58,
    "attention_dkdv causal bfloat16 128": 0.63,
    "attention_dq causal bfloat16 128": 0.63,
    "glu silu kept bfloat16": 0.65,
}


@pytest.mark.parametrize("name", BARS)
def test_static_share_of_peak(name: str) -> None:
    """By the serial loop model on sm_90; no measurement."""
    serial = figures_of(name, 90).serial
    assert serial is not None and serial >= BARS[name], serial


@triton.jit
def spilling(X, Y, N: tl.constexpr, TIMES: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(X + at)
    y = tl.load(Y + at)
    for _ in range(TIMES):
        x = tl.dot(x, y).to(tl.bfloat16) + x * tl.sum(y.to(tl.float32)).to(tl.bfloat16)
    tl.store(X + at, x)


def test_what_spills_is_refused() -> None:
    types, constants = {"X": "*bf16", "Y": "*bf16"}, {"N": 128, "TIMES": 3}
    binary = compile_case(Case("spilling", spilling, types, constants, warps=2, stages=1, matmul=True), 80)
    assert binary.stack > 0 and "spill" in str(fits(binary))


def test_what_does_not_compile_says_so() -> None:
    with pytest.raises(Error, match="case 'odd' does not compile for sm_80"):
        compile_case(Case("odd", spilling, {"X": "*bf16", "Y": "*bf16"}, {"N": 24, "TIMES": 1}), 80)
    with pytest.raises(Error, match=r"\['Z'\] are not what spilling takes"):
        compile_case(Case("odd", spilling, {"X": "*bf16", "Y": "*bf16"}, {"N": 32, "TIMES": 1, "Z": 1}), 80)


SASS = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/                   MUFU.EX2 R3, R4 ;
        /*0030*/                   FFMA R5, R6, R7, R8 ;
        /*0040*/              @P1  BRA `(.L_x_1) ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0060*/                   BRA `(.L_x_0) ;
"""


def test_machine_code_is_read() -> None:
    code = sass.parse(SASS)
    assert code.mix == {"MOV": 1, "HGMMA": 1, "MUFU": 1, "FFMA": 1, "BRA": 2, "HMMA": 1}
    assert [len(body) for body in code.loops()] == [4], "the inner loop only"
    assert flop("HGMMA.64x128x16.F32.BF16 R24") == 2 * 64 * 128 * 16 / 4
    assert flop("HMMA.16816.F32.BF16 R4") == 2 * 16 * 8 * 16
    assert flop("FFMA R1") == 0


def test_the_loop_model() -> None:
    found = Estimate(tensor=100, mufu=30, issue=50)
    assert found.serial == 100 / 150 and found.overlap == 1.0
    assert Estimate(tensor=100, mufu=300, issue=50).overlap == 1 / 3


def test_occupancy() -> None:
    case = Case("small", spilling, {"X": "*bf16", "Y": "*bf16"}, {"N": 32, "TIMES": 2}, warps=4, stages=1, matmul=True)
    binary = compile_case(case, 90)
    assert binary.stack == 0 and fits(binary) is None and 1 <= occupancy(binary) <= 16
    assert estimate(binary) is not None or binary.code.count("HMMA") + binary.code.count("HGMMA") > 0
