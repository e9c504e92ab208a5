"""Cases of norms, rotary embedding and the cross-entropy of a linear head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paracomm.kernels import cross_entropy_kernels, norm_kernels, rotary_kernels
from paracomm.kernels.config import table
from paracomm.kernels.static.case import POINTERS, Case

KERNELS: dict[str, Any] = {
    "add_norm_forward": norm_kernels.add_norm_forward_kernel,
    "add_norm_backward": norm_kernels.add_norm_backward_kernel,
    "add_norm_backward_wide": norm_kernels.add_norm_backward_wide_kernel,
    "rotary": rotary_kernels.rotary_kernel,
    "cross_entropy_forward": cross_entropy_kernels.cross_entropy_forward_kernel,
    "cross_entropy_backward": cross_entropy_kernels.cross_entropy_backward_kernel,
}
FLOAT32 = {
    "MEAN", "RSTD", "DWEIGHT", "DBIAS", "TOP", "TOTAL", "LOGIT", "LSE", "REST", "DLSE", "DLOGIT"
}  # fmt: skip
"""Pointers to float32 whatever the dtype is."""


def _variants(kernel: str, widest: bool) -> dict[str, dict[str, Any]]:
    """Constants by name of the variant; "odd": its sizes are no multiples of 16. The table's widest row for a norm's
    forward serves wider ones too."""
    rms = {"MEAN": None, "BIAS": None, "DBIAS": None}
    if kernel == "add_norm_forward":
        wide: dict[str, Any] = {"layer wide": {"WIDE": True}} if widest else {}
        return wide | {"layer": {"WIDE": False}, "layer odd": {"WIDE": False}, "rms": {"WIDE": False} | rms}
    if kernel.startswith("add_norm"):
        return {"layer": {}, "layer odd": {}, "rms": rms}
    if kernel == "rotary":
        return {"forward": {"TRANSPOSED": False}, "backward": {"TRANSPOSED": True}}
    return {"softcap odd": {"CAPPED": True, "EVEN": False}, "plain": {"CAPPED": False, "EVEN": True, "BIAS": None}}


def row_case(kernel: str, variant: str, flags: dict[str, Any], dtype: str, size: int, row: dict[str, int]) -> Case:
    """Of cross-entropy, neither rows nor tokens come in sixteens; its launcher sees to it that the strides do."""
    fn = KERNELS[kernel]
    given = {key: row[key] for key in ("BM", "BN", "BK") if key in row} | flags
    given |= {"PRECISION": "bf16x6" if dtype == "float32" else "ieee", "GROUP": cross_entropy_kernels.GROUP}
    given |= {"HALF": size, "BN": size} if kernel == "rotary" else {}
    constants = {name: value for name, value in given.items() if name in fn.arg_names}
    types = {name: _type(name, dtype) for name in fn.arg_names if name not in constants}
    matmul = kernel.startswith("cross_entropy")
    loose = {"N", "V"} if matmul else {"N"}
    if variant.endswith("odd"):
        loose |= {"D"} if matmul else {name for name in types if types[name] == "i32"}
    where = f" {size}" if size else ""
    return Case(
        f"{kernel} {variant} {dtype}{where}", fn, types, constants, row["warps"], row["stages"], matmul=matmul,
        unaligned=frozenset(loose & set(types)),
    )  # fmt: skip


def _type(name: str, dtype: str) -> str:
    if name == "TARGETS":
        return "*i64"
    if name in FLOAT32:
        return "*fp32"
    if name in ("eps", "cap", "to_cap"):
        return "fp32"
    return "i32" if name.islower() or name in ("N", "D", "V", "H", "T") else POINTERS[dtype]


def cases(arch: int) -> Iterator[Case]:
    """All of them for sm_`arch`."""
    for kernel in KERNELS:
        for dtype, rows in table(arch)[kernel].items():
            for size, row in rows.items():
                for variant, flags in _variants(kernel, size == max(rows, key=int)).items():
                    yield row_case(kernel, variant, flags, dtype, int(size), row)
