"""Warps of the sm_90 kernel: which of them work on which queries, read from Triton's intermediate code.

The pass that divides queries over two groups of warps moves the coordinate of their load by 64 for the second, and with
it all else that is made of the same value (Triton 3.7.1). Interpreted kernels do not go through it, so the integers of
each group are worked out here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from paracomm.kernels.select import interpreted

pytest.importorskip("triton", reason="Triton is not installed")

PROGRAM, PROGRAMS = (1, 0), (4, 1)
LINE = re.compile(r"^\s*(%[\w#]+) = (?:tt|arith)\.(\w+) ?([^:{]*)")
TWO: dict[str, Any] = {
    "addi": np.add, "subi": np.subtract, "muli": np.multiply, "minsi": np.minimum, "maxsi": np.maximum,
    "divsi": lambda a, b: np.trunc(a / b).astype(np.int64),
}  # fmt: skip


def values_of(code: list[str], known: dict[str, Any]) -> dict[str, Any]:
    """What is known of the integers of a region."""
    found = dict(known)
    for line in code:
        match = LINE.match(line)
        if match is None:
            continue
        name, operation, rest = match.groups()
        names = re.findall(r"%[\w#]+", rest)
        given = [found.get(each) for each in names]
        if operation == "constant":
            number = re.search(r"constant (?:\{.*?\} )?(?:dense<)?(-?\d+)>? ?(?:\{.*?\} )?: ", line)
            if number is not None:
                found[name] = np.int64(number[1])
        elif operation in ("get_program_id", "get_num_programs"):
            axis = 0 if re.search(r"\w+ x ", line) else 1
            found[name] = np.int64((PROGRAM if operation == "get_program_id" else PROGRAMS)[axis])
        elif operation == "make_range":
            bounds = {key: int(value) for key, value in re.findall(r"(start|end) = (\d+)", line)}
            found[name] = np.arange(bounds["start"], bounds["end"])
        elif operation in ("splat", "extsi") and given[0] is not None:
            found[name] = given[0]
        elif operation in TWO and all(each is not None for each in given):
            found[name] = TWO[operation](*given)
    return found


def groups(code: str) -> Iterator[list[str]]:
    """The code of each group of warps that multiplies."""
    lines = [line.split(" loc(")[0] for line in code.splitlines()]
    begins = [place for place, line in enumerate(lines) if re.match(r"\s+partition\d+\(", line)]
    for begin, end in zip(begins, [*begins[1:], len(lines)], strict=True):
        yield lines[begin:end]


def queries(module: ModuleType, causal: bool) -> list[np.ndarray]:
    """Rows that each group compares with T, the number of queries, before it stores, in program (1, 0) of (4, 1)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from paracomm.kernels.config import config
    from paracomm.kernels.static.attention_cases import tma_case

    row = config("attention_forward_tma", 90, "bfloat16", 64)
    case = tma_case("causal" if causal else "ragged", "bfloat16", 64, row)
    fn = module.attention_forward_tma_kernel
    source = ASTSource(
        fn=fn, signature={name: case.types.get(name, "constexpr") for name in fn.arg_names}, constexprs=case.constants
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": case.warps, "num_stages": case.stages}
    )
    assert "setmaxnreg" in compiled.asm["ptx"]
    found = []
    for lines in groups(compiled.asm["ttgir"]):
        known = values_of(lines, {})
        counts = {name for line in lines for name in re.findall(r"(%[\w#]+) = tt\.splat %T", line)}
        compared: list[Any] = [
            known.get(match[1])
            for line in lines
            if (match := re.search(r"arith\.cmpi slt, (%[\w#]+), (%[\w#]+)", line)) and match[2] in counts
        ]
        assert compared and all(each is not None for each in compared), "the code looks different: read it again"
        assert all(np.array_equal(each, compared[0]) for each in compared)
        found.append(compared[0])
    return found


@pytest.mark.skipif(interpreted(), reason="Triton compiles in processes without TRITON_INTERPRET only")
class TestGroups:
    @pytest.mark.parametrize("causal", [False, True])
    def test_two_groups_have_a_tile_between_them(self, causal: bool) -> None:
        from paracomm.kernels import attention_tma

        first, second = queries(attention_tma, causal)
        assert first.tolist() == [*range(256, 320)] and second.tolist() == [*range(320, 384)]

    def test_this_sees_the_fault_of_the_pass(self) -> None:
        from paracomm.kernels import attention_tma
        from tests.kernels.law import mutate

        mutant = mutate(attention_tma, "tl.arange(0, BM) - before", "tl.arange(0, BM) + first_query")
        _, second = queries(mutant, True)
        assert second.tolist() == [*range(384, 448)]
