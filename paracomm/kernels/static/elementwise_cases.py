"""Cases of kernels that multiply nothing: activations, attention's row sums, masks of dropout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from paracomm.kernels import attention_backward_kernels, mlp_kernels, philox
from paracomm.kernels.config import table
from paracomm.kernels.reference import ACTIVATIONS
from paracomm.kernels.static.case import POINTERS, Case

ACTIVATED = {
    "gated": mlp_kernels.gated_kernel,
    "gated_backward": mlp_kernels.gated_backward_kernel,
    "active": mlp_kernels.active_kernel,
    "active_backward": mlp_kernels.active_backward_kernel,
}


def _activation(kernel: str, fn: Any, name: str, dtype: str) -> Case:
    constants = {"ACTIVATION": name, "BLOCK": 1024}
    types = {each: POINTERS[dtype] for each in fn.arg_names if each not in constants} | {"count": "i32"}
    return Case(f"{kernel} {name} {dtype}", fn, types, constants)


def _delta(dtype: str, size: int, row: dict[str, int]) -> Case:
    fn = attention_backward_kernels.attention_delta_kernel
    constants = {"K": size, "D": size, "BM": row["BM"]}
    types = dict.fromkeys((each for each in fn.arg_names if each not in constants), "i32")
    types |= {"OUT": POINTERS[dtype], "DO": POINTERS[dtype], **dict.fromkeys(("LSE", "DELTA", "LSE2"), "*fp32")}
    loose = frozenset({"H", "T", "l_b", "l_h"})
    return Case(f"attention_delta {dtype} {size}", fn, types, constants, row["warps"], row["stages"], unaligned=loose)


def _keep_mask() -> Case:
    types = {"BASE": "*i64", "OFFSETS": "*i64", "OUT": "*i1", "seed": "i64", "threshold": "i64"}
    types |= dict.fromkeys(("count", "width", "stream", "step"), "i32")
    loose = frozenset(name for name in types if name.islower())
    return Case("keep_mask", philox.keep_mask_kernel, types, {"BLOCK": 1024}, unaligned=loose)


def cases(arch: int) -> Iterator[Case]:
    """All of them for sm_`arch`."""
    for (kernel, fn), name, dtype in itertools.product(ACTIVATED.items(), ACTIVATIONS, ("bfloat16", "float32")):
        yield _activation(kernel, fn, name, dtype)
    for dtype, rows in table(arch)["attention_delta"].items():
        yield from (_delta(dtype, int(size), row) for size, row in rows.items())
    yield _keep_mask()
