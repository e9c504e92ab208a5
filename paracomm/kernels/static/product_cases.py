"""Cases of an MLP's products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from paracomm.kernels import mlp_kernels
from paracomm.kernels.config import table
from paracomm.kernels.static.case import POINTERS, Case

PRODUCTS = {"linear": mlp_kernels.linear_kernel, "glu": mlp_kernels.glu_kernel, "sum": mlp_kernels.sum_kernel}
PRODUCT_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "linear": {"gelu_tanh kept residual": {"KEEP": True, "HAS_R": True, "ACTIVATION": "gelu_tanh"}, "plain": {}},
    "glu": {
        "silu kept": {"KEEP": True, "ACTIVATION": "silu"},
        "gelu_tanh kept": {"KEEP": True, "ACTIVATION": "gelu_tanh"},
    },
    "sum": {"": {}},
}
"""Each is compiled for sizes that are multiples of 16, the first for others as well; rows of inputs are aligned, and
launchers make N such a multiple, but of a sum."""


def product_cases(kernel: str, dtype: str, row: dict[str, int]) -> list[Case]:
    """What a row of a product serves."""
    found = [
        product_case(kernel, PRODUCTS[kernel], variant, flags, dtype, row)
        for variant, flags in PRODUCT_VARIANTS[kernel].items()
    ]
    name = f"{kernel} odd {dtype}"
    return [*found, replace(found[0], name=name, unaligned=frozenset("MNK" if kernel == "sum" else "MK"))]


def product_case(kernel: str, fn: Any, variant: str, flags: dict[str, Any], dtype: str, row: dict[str, int]) -> Case:
    """For sizes that are multiples of 16."""
    given = {
        "HAS_BIAS": True, "HAS_R": False, "KEEP": False, "ACTIVATION": "none",
        "PRECISION": "bf16x6" if dtype == "float32" else "ieee",
        **{key: row[key] for key in ("BM", "BN", "BK", "GROUP")}, **flags,
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
        types |= {name: f"tensordesc<{element}{list(tile)}>" for name, tile in tiles.items() if name in types}
    return Case(
        f"{kernel} {variant} {dtype}".replace("  ", " "), fn, types, constants, row["warps"], row["stages"],
        matmul=True, tma=constants["TMA"],
    )  # fmt: skip


def cases(arch: int) -> Iterator[Case]:
    """All of them for sm_`arch`."""
    for kernel in PRODUCTS:
        for dtype, rows in table(arch)[kernel].items():
            yield from product_cases(kernel, dtype, rows["0"])
