"""Cases of attention's kernels for sm_90 and of decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paracomm.kernels import attention_tma, decode_kernels
from paracomm.kernels.config import table
from paracomm.kernels.static.case import POINTERS, Case

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
}


def decode_case(variant: str, dtype: str, size: int, row: dict[str, int]) -> Case:
    """For a head size of `size` and four query heads to a key-value head. Not called a product: reading bounds it, and
    its 16 rows are too few for a warp group's."""
    fn = decode_kernels.decode_kernel
    constants = {
        "R": 4, "K": size, "D": size, "BM": row["BM"], "BN": row["BN"], "WINDOW": False, "CAPPED": False,
        "PRECISION": "bf16x6" if dtype == "float32" else "ieee", **DECODE_VARIANTS[variant],
    }  # fmt: skip
    types = {
        **dict.fromkeys(("Q", "K_", "V"), POINTERS[dtype]), **dict.fromkeys(("OUT", "LSE"), "*fp32"), "LENGTHS": "*i32",
        **dict.fromkeys(("scale_log2", "cap_log2", "to_cap"), "fp32"),
    }  # fmt: skip
    types |= {name: "i32" for name in fn.arg_names if name not in constants and name not in types}
    name = f"decode {variant} {dtype} {size}"
    return Case(name, fn, types, constants, row["warps"], row["stages"], unaligned=frozenset(SIZES))


def decode_cases(arch: int) -> Iterator[Case]:
    for dtype, rows in table(arch).get("decode", {}).items():
        for size, row in rows.items():
            yield from (decode_case(variant, dtype, int(size), row) for variant in DECODE_VARIANTS)
    for K in (64, 256):
        yield Case(
            f"decode_merge {K}", decode_kernels.merge_kernel,
            {"PARTS": "*fp32", "SUMS": "*fp32", "OUT": "*bf16", "LSE": "*fp32", "parts": "i32"},
            {"K": K, "D": K, "P": 128, "BP": 16}, 4, 1, unaligned=frozenset({"parts"}),
        )  # fmt: skip
