"""Cases of attention: by pointers, by descriptors (sm_90), and of decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paracomm.kernels import attention_backward_kernels, attention_forward_kernels, attention_tma, decode_kernels
from paracomm.kernels.config import table
from paracomm.kernels.static.case import POINTERS, Case

ATTENTION = {
    "attention_forward": attention_forward_kernels.attention_forward_kernel,
    "attention_dkdv": attention_backward_kernels.attention_dkdv_kernel,
    "attention_dq": attention_backward_kernels.attention_dq_kernel,
    "attention_forward_heavy": attention_forward_kernels.attention_forward_kernel,
    "attention_dkdv_heavy": attention_backward_kernels.attention_dkdv_kernel,
    "attention_dq_heavy": attention_backward_kernels.attention_dq_kernel,
}
"""Rows of the tables. The heavy ones serve whatever needs more registers: a window, a cap, dropout, a mask of keys."""
HEAD_SIZES = (64, 128, 256)
"""Of rows; smaller heads take the row of 64."""
SMALL = (16, 32)
ODD = "odd"
"""The variant whose head size is padded, and whose results' rows begin anywhere (those of inputs are aligned)."""
PLAIN: dict[str, dict[str, Any]] = {
    "causal": {"CAUSAL": True},
    ODD: {"CAUSAL": True},
    "varlen": {"CAUSAL": True, "VARLEN": True},
}
HEAVY: dict[str, dict[str, Any]] = {
    "all": {"CAUSAL": True, "WINDOW": True, "CAPPED": True, "DROPOUT": True, "RUNS": True, "HAS_KEY_MASK": True},
    "window": {"CAUSAL": True, "WINDOW": True},
    "softcap": {"CAUSAL": True, "CAPPED": True},
    "dropout": {"CAUSAL": True, "DROPOUT": True, "RUNS": True},
    "places": {"DROPOUT": True},
    "masked": {"HAS_KEY_MASK": True},
}
"""At head size 128 in bfloat16 every variant is compiled, elsewhere the first, which has the most code, and the odd."""


def attention_cases(kernel: str, dtype: str, size: int, row: dict[str, int]) -> list[Case]:
    """What a row of attention serves; where dk and dv have a program each, both."""
    variants = HEAVY if kernel.endswith("_heavy") else PLAIN
    every = dtype == "bfloat16" and size == 128
    halves: list[tuple[str, dict[str, Any]]] = [("", {})]
    if "dkdv" in kernel:
        halves = [(" dv", {"WHICH": 1}), (" dk", {"WHICH": 2})] if row.get("SPLIT") else [("", {"WHICH": 0})]
    return [
        attention_case(kernel, ATTENTION[kernel], variant + half, flags | which, dtype, each, row)
        for each in ((*SMALL, size) if dtype == "bfloat16" and size == min(HEAD_SIZES) else (size,))
        for number, (variant, flags) in enumerate(variants.items())
        for half, which in halves
        if every or number == 0 or (variant == ODD and each == size)
    ]


def pointer_cases(arch: int) -> Iterator[Case]:
    for kernel in ATTENTION:
        for dtype, rows in table(arch)[kernel].items():
            for size, row in rows.items():
                yield from attention_cases(kernel, dtype, int(size), row)


def attention_case(
    kernel: str, fn: Any, variant: str, flags: dict[str, Any], dtype: str, size: int, row: dict[str, int]
) -> Case:
    """For a head size of `size` and two query heads to a key-value head."""
    odd = variant.startswith(ODD)
    constants: dict[str, Any] = {
        "R": 2, "K": size - 24 if odd else size, "D": size, "BM": row["BM"], "BN": row["BN"], "CAUSAL": False,
        "WINDOW": False, "CAPPED": False, "HAS_KEY_MASK": False, "DROPOUT": False, "RUNS": False, "VARLEN": False,
        "PRECISION": "bf16x6" if dtype == "float32" else "ieee",
    }  # fmt: skip
    constants |= flags
    present = {
        "KEY_MASK": constants["HAS_KEY_MASK"], "CU_Q": constants["VARLEN"], "CU_K": constants["VARLEN"],
        "ROWS": constants["DROPOUT"], "QPOS": constants["DROPOUT"] and not constants["RUNS"],
        "KPOS": constants["DROPOUT"] and not constants["RUNS"],
    }  # fmt: skip
    kinds = {"KEY_MASK": "*i1", "CU_Q": "*i32", "CU_K": "*i32", "ROWS": "*i64", "QPOS": "*i64", "KPOS": "*i64"}
    types: dict[str, str] = {}
    for name in fn.arg_names:
        if name in constants:
            continue
        if name in present:
            if present[name]:
                types[name] = kinds[name]
            else:
                constants[name] = None
        elif name in ("LSE", "LSE2", "DELTA"):
            types[name] = "*fp32"
        elif (name.isupper() and name not in ("H", "G", "T", "S")) or name == "K_":
            types[name] = POINTERS[dtype]
        elif name.endswith(("scale", "scale_log2", "cap_log2", "to_cap")):
            types[name] = "fp32"
        else:
            types[name] = "i64" if name in ("seed", "threshold") else "i32"
    # What no stride or size need be a multiple of.
    outputs = ("o_", "dk_", "dv_", "dq_") if odd else ()
    integers = {name for name, kind in types.items() if kind in ("i32", "i64")}
    loose = {name for name in integers if name[-2:] not in ("_b", "_h", "_t") or name.startswith(outputs)}
    return Case(
        f"{kernel} {variant} {dtype} {size}", fn, types, constants, row["warps"], row["stages"], matmul=True,
        unaligned=frozenset(loose),
    )  # fmt: skip


TMA_VARIANTS: dict[str, dict[str, Any]] = {
    "softcap window": {"CAUSAL": True, "WINDOW": True, "CAPPED": True, "EDGE": True},
    "causal": {"CAUSAL": True, "EDGE": True},
    "window": {"CAUSAL": True, "WINDOW": True, "EDGE": True},
    "softcap": {"CAUSAL": True, "CAPPED": True, "EDGE": True},
    "ragged": {"EDGE": True},
    "full": {},
}
"""At head size 128 in bfloat16 all are compiled, elsewhere the first, which has the most code, and the second."""
SIZES = {"T", "S", "H", "window"}


def tma_case(variant: str, dtype: str, size: int, row: dict[str, int]) -> Case:
    """For a head size of `size` and two query heads to a key-value head."""
    fn = attention_tma.attention_forward_tma_kernel
    constants = {
        "R": 2, "K": size, "D": size, "BM": row["BM"], "BN": row["BN"], "CAUSAL": False, "WINDOW": False,
        "CAPPED": False, "EDGE": False, "SPECIALISED": bool(row["SPECIALISED"]), **TMA_VARIANTS[variant],
    }  # fmt: skip
    tiles = f"tensordesc<{POINTERS[dtype].removeprefix('*')}[1, 1, {row['BN']}, {size}]>"
    types = {
        "Q": POINTERS[dtype], "OUT": POINTERS[dtype], "LSE": "*fp32", "KEYS": tiles, "VALUES": tiles,
        **dict.fromkeys(("scale_log2", "cap_log2", "to_exponent"), "fp32"),
    }  # fmt: skip
    types |= {name: "i32" for name in fn.arg_names if name not in constants and name not in types}
    return Case(
        f"{attention_tma.KERNEL} {variant} {dtype} {size}", fn, types, constants, row["warps"], row["stages"],
        matmul=True, tma=True, specialised=constants["SPECIALISED"], unaligned=frozenset(SIZES),
    )  # fmt: skip


def tma_cases(arch: int) -> Iterator[Case]:
    for dtype, rows in table(arch).get(attention_tma.KERNEL, {}).items():
        for size, row in rows.items():
            count = None if dtype == "bfloat16" and size == "128" else 2
            yield from (tma_case(variant, dtype, int(size), row) for variant in list(TMA_VARIANTS)[:count])


DECODE_VARIANTS: dict[str, dict[str, Any]] = {
    "softcap window": {"WINDOW": True, "CAPPED": True},
    "plain": {},
    ODD: {"WINDOW": True, "CAPPED": True},
}


def decode_case(kernel: str, variant: str, dtype: str, size: int, row: dict[str, int]) -> Case:
    """For a head size of `size` and four query heads to a key-value head. Not called a product: reading bounds it, and
    its 16 rows are too few for a warp group's."""
    fn = decode_kernels.decode_kernel
    constants: dict[str, Any] = {
        "R": 4, "K": size - 24 if variant == ODD else size, "D": size, "BM": row["BM"], "BN": row["BN"],
        "WINDOW": False, "CAPPED": False, "UNIT": 8 if kernel == "decode" else 1, **DECODE_VARIANTS[variant],
    }  # fmt: skip
    types = {
        **dict.fromkeys(("Q", "K_", "V"), POINTERS[dtype]), **dict.fromkeys(("OUT", "LSE"), "*fp32"), "LENGTHS": "*i32",
        **dict.fromkeys(("scale_log2", "cap_log2", "to_cap"), "fp32"),
    }  # fmt: skip
    types |= {name: "i32" for name in fn.arg_names if name not in constants and name not in types}
    numbers = {name for name in types if types[name] == "i32"}
    anywhere = set(types) if kernel == "decode_odd" else numbers if variant == ODD else SIZES
    name = f"{kernel} {variant} {dtype} {size}"
    return Case(name, fn, types, constants, row["warps"], row["stages"], unaligned=frozenset(anywhere))


def decode_cases(arch: int) -> Iterator[Case]:
    for kernel, variants in (("decode", list(DECODE_VARIANTS)), ("decode_odd", [ODD])):
        for dtype, rows in table(arch)[kernel].items():
            for size, row in rows.items():
                yield from (decode_case(kernel, variant, dtype, int(size), row) for variant in variants)
    for K in (64, 256):
        yield Case(
            f"decode_merge {K}", decode_kernels.merge_kernel,
            {"PARTS": "*fp32", "SUMS": "*fp32", "OUT": "*bf16", "LSE": "*fp32", "parts": "i32"},
            {"K": K, "D": K, "P": 128, "BP": 16}, 4, 1, unaligned=frozenset({"parts"}),
        )  # fmt: skip


def cases(arch: int) -> Iterator[Case]:
    """All of them for sm_`arch`."""
    yield from pointer_cases(arch)
    yield from tma_cases(arch)
    yield from decode_cases(arch)
