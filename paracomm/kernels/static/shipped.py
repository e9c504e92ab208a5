"""Every kernel at every configuration of the tables, as Cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paracomm.kernels import attention_backward, attention_forward, mlp_kernels
from paracomm.kernels.config import table
from paracomm.kernels.static.case import POINTERS, Case

ATTENTION = {
    "attention_forward": attention_forward.attention_forward_kernel,
    "attention_dkdv": attention_backward.attention_dkdv_kernel,
    "attention_dq": attention_backward.attention_dq_kernel,
    "attention_forward_heavy": attention_forward.attention_forward_kernel,
    "attention_dkdv_heavy": attention_backward.attention_dkdv_kernel,
    "attention_dq_heavy": attention_backward.attention_dq_kernel,
}
"""Rows of the tables. The heavy ones serve whatever needs more registers: a window, a cap, dropout, a mask of keys."""
HEAD_SIZES = (16, 32, 64, 128, 256)
PLAIN: dict[str, dict[str, Any]] = {"causal": {"CAUSAL": True}, "varlen": {"CAUSAL": True, "VARLEN": True}}
HEAVY: dict[str, dict[str, Any]] = {
    "all": {"CAUSAL": True, "WINDOW": True, "CAPPED": True, "DROPOUT": True, "RUNS": True, "HAS_KEY_MASK": True},
    "window": {"CAUSAL": True, "WINDOW": True},
    "softcap": {"CAUSAL": True, "CAPPED": True},
    "dropout": {"CAUSAL": True, "DROPOUT": True, "RUNS": True},
    "places": {"DROPOUT": True},
    "masked": {"HAS_KEY_MASK": True},
}
"""At head size 128 in bfloat16 every variant is compiled, elsewhere the first: it has the most code."""


def attention_cases(kernel: str, dtype: str, size: int, row: dict[str, int]) -> list[Case]:
    """What a row of attention serves."""
    variants = HEAVY if kernel.endswith("_heavy") else PLAIN
    every = dtype == "bfloat16" and size == 128
    return [
        attention_case(kernel, ATTENTION[kernel], variant, flags, dtype, size, row)
        for number, (variant, flags) in enumerate(variants.items())
        if every or number == 0
    ]


def _attention(arch: int) -> Iterator[Case]:
    for kernel in ATTENTION:
        for dtype, rows in table(arch)[kernel].items():
            for size, row in rows.items():
                yield from attention_cases(kernel, dtype, int(size), row)


def attention_case(
    kernel: str, fn: Any, variant: str, flags: dict[str, Any], dtype: str, size: int, row: dict[str, int]
) -> Case:
    """For a head size of `size` and two query heads to a key-value head."""
    constants: dict[str, Any] = {
        "R": 2, "K": size, "D": size, "BM": row["BM"], "BN": row["BN"], "CAUSAL": False, "WINDOW": False, "CAPPED": False,
        "HAS_KEY_MASK": False, "DROPOUT": False, "RUNS": False, "VARLEN": False,
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
        elif name in ("LSE", "DELTA"):
            types[name] = "*fp32"
        elif name.isupper() and name not in ("H", "G", "T", "S") or name == "K_":
            types[name] = POINTERS[dtype]
        elif name.endswith(("scale", "scale_log2", "cap_log2", "to_cap")):
            types[name] = "fp32"
        else:
            types[name] = "i64" if name in ("seed", "threshold") else "i32"
    # What no stride or size need be a multiple of.
    loose = {name for name in types if types[name] in ("i32", "i64") and name[-2:] not in ("_b", "_h", "_t")}
    return Case(
        f"{kernel} {variant} {dtype} {size}", fn, types, constants, row["warps"], row["stages"], matmul=True,
        unaligned=frozenset(loose),
    )  # fmt: skip


PRODUCTS = {"linear": mlp_kernels.linear_kernel, "glu": mlp_kernels.glu_kernel, "sum": mlp_kernels.sum_kernel}
PRODUCT_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "linear": {"gelu_tanh kept residual": {"KEEP": True, "HAS_R": True, "ACTIVATION": "gelu_tanh"}, "plain": {}},
    "glu": {"silu kept": {"KEEP": True, "ACTIVATION": "silu"}, "gelu_tanh kept": {"KEEP": True, "ACTIVATION": "gelu_tanh"}},
    "sum": {"": {}},
}


def product_cases(kernel: str, dtype: str, row: dict[str, int]) -> list[Case]:
    """What a row of a product serves."""
    variants = PRODUCT_VARIANTS[kernel].items()
    return [product_case(kernel, PRODUCTS[kernel], variant, flags, dtype, row) for variant, flags in variants]


def _products(arch: int) -> Iterator[Case]:
    for kernel in PRODUCTS:
        for dtype, rows in table(arch)[kernel].items():
            yield from product_cases(kernel, dtype, rows["0"])


def product_case(
    kernel: str, fn: Any, variant: str, flags: dict[str, Any], dtype: str, row: dict[str, int]
) -> Case:
    """For sizes that are multiples of 16; K's tail is compiled as well."""
    given = {
        "HAS_BIAS": True, "HAS_R": False, "KEEP": False, "ACTIVATION": "none",
        "PRECISION": "bf16x6" if dtype == "float32" else "ieee", **{k: row[k] for k in ("BM", "BN", "BK", "GROUP")}, **flags,
    }  # fmt: skip
    constants = {name: value for name, value in given.items() if name in fn.arg_names}
    if not given["HAS_R"] and "R" in fn.arg_names:
        constants["R"] = None
    kept = {"linear": ("Z",), "glu": ("G", "U"), "sum": ()}[kernel]
    constants |= {} if given["KEEP"] else dict.fromkeys(kept)
    constants["TMA"] = bool(row.get("TMA"))
    types = {
        name: "i32" if name in ("M", "N", "K") or "_" in name else POINTERS[dtype]
        for name in fn.arg_names
        if name not in constants
    }
    if constants["TMA"]:
        element = POINTERS[dtype].removeprefix("*")
        BM, BN, BK = (row[key] for key in ("BM", "BN", "BK"))
        tiles = {"X": (BM, BK), "A": (BM, BK), "B": (BM, BK), "WG": (BN, BK), "WU": (BN, BK), "V": (BK, BN)}
        tiles["W"] = (BK, BN) if kernel == "sum" else (BN, BK)
        types |= {name: f"tensordesc<{element}[{rows}, {columns}]>" for name, (rows, columns) in tiles.items() if name in types}
    return Case(
        f"{kernel} {variant} {dtype}".replace("  ", " "), fn, types, constants, row["warps"], row["stages"], matmul=True,
        tma=constants["TMA"],
    )  # fmt: skip


def cases(arch: int) -> Iterator[Case]:
    """All of them for sm_`arch`."""
    yield from _attention(arch)
    yield from _products(arch)
