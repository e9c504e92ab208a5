"""Warps of the sm_90 kernel: which of them work on which queries, read from Triton's intermediate code.

The pass that divides queries over two groups of warps moves the coordinate of their load by 64 for the second, and with
it all else that is made of the same value (Triton 3.7.1). Interpreted kernels do not go through it, so the integers of
each group are worked out here.
"""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from paracomm.kernels.select import interpreted

pytest.importorskip("triton", reason="Triton is not installed")

PROGRAM, PROGRAMS = (1, 0), (4, 1)
SIZES = {"T": 500, "S": 700, "window": 150}
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


def regions(code: str) -> list[list[str]]:
    """The code of each group of warps: what loads, then those that multiply."""
    lines = [line.split(" loc(")[0] for line in code.splitlines()]
    begins = [place for place, line in enumerate(lines) if re.match(r"\s+(default \{|partition\d+\()", line)]
    return [lines[begin:end] for begin, end in zip(begins, [*begins[1:], len(lines)], strict=True)]


def known_values(module: ModuleType, variant: str) -> list[tuple[list[str], dict[str, Any]]]:
    """Code and known values of each group, in program (1, 0) of (4, 1)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from paracomm.kernels.config import config
    from paracomm.kernels.static.attention_cases import tma_case

    case = tma_case(variant, "bfloat16", 64, config("attention_forward_tma", 90, "bfloat16", 64))
    fn = module.attention_forward_tma_kernel
    signature = {name: case.types.get(name, "constexpr") for name in fn.arg_names}
    options = {"num_warps": case.warps, "num_stages": case.stages}
    source = ASTSource(fn=fn, signature=signature, constexprs=case.constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "setmaxnreg" in compiled.asm["ptx"]
    code = compiled.asm["ttgir"]
    given = {
        name: np.int64(SIZES[match[1]])
        for name in set(re.findall(r"%\w+", code))
        if (match := re.fullmatch(r"%(T|S|window)(?:_\d+)?", name))
    }
    outside = values_of(code.split("ttg.warp_specialize(")[0].splitlines(), given)
    return [(lines, values_of(lines, outside)) for lines in regions(code)]


def queries(module: ModuleType, variant: str) -> list[np.ndarray]:
    """Rows that each group compares with T, the number of queries, before it stores."""
    found = []
    for lines, known in known_values(module, variant)[1:]:
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
    @pytest.mark.parametrize("variant", ["ragged", "causal"])
    def test_two_groups_have_a_tile_between_them(self, variant: str) -> None:
        first, second = queries(attention_tma(), variant)
        assert first.tolist() == [*range(256, 320)] and second.tolist() == [*range(320, 384)]

    def test_all_groups_walk_over_the_same_keys(self) -> None:
        """Else one of them waits for ever. From the first that query 256 sees, 256 + 200 - 150 + 1, to that of 383."""
        bounds = [
            [known.get(name) for name in match.groups()]
            for lines, known in known_values(attention_tma(), "window")
            for line in lines
            if (match := re.search(r"scf\.for %\w+ = (%[\w#]+) to (%[\w#]+) step", line))
        ]
        assert bounds == [[307 // 128 * 128, 384 + 200]] * 3

    def test_this_sees_the_fault_of_the_pass(self) -> None:
        from tests.kernels.law import mutate

        mutant = mutate(attention_tma(), "tl.arange(0, BM) - before", "tl.arange(0, BM) + first_query")
        _, second = queries(mutant, "causal")
        assert second.tolist() == [*range(384, 448)]


def attention_tma() -> ModuleType:
    from paracomm.kernels import attention_tma

    return attention_tma
