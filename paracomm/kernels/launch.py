"""What launchers of all kernels ask of tensors, and do to them, before a launch."""

from __future__ import annotations

import torch
from torch import Tensor

from paracomm.errors import InvalidArgument

WIDE = 16
"""Elements: rows that begin at multiples of it are read in wide, asynchronous loads, and by tensor descriptors."""
MOST = 65535
"""Programs in the second dimension of a grid (CUDA C++ Programming Guide, "Technical Specifications")."""


def dtype_name(x: Tensor) -> str:
    """As the tables of configurations have it."""
    return str(x.dtype).removeprefix("torch.")


def precision(x: Tensor) -> str:
    """Of products: float32 as six of bfloat16, on tensor cores and exact to float32's own rounding.

    Three of TF32 cost the same and lose two bits; 16-bit inputs are exact anyhow.
    """
    return "bf16x6" if x.dtype == torch.float32 else "ieee"


def expect_launchable(name: str, B: int, heads: int) -> None:
    """Raises InvalidArgument where a program for each head of each sequence is more than a grid takes."""
    if B * heads > MOST:
        raise InvalidArgument(f"{name}: {B} sequences of {heads} heads, a launch takes {MOST} in all; divide the batch")


def aligned(x: Tensor) -> Tensor:
    """x, or a copy whose last dimension is contiguous and whose rows begin at multiples of WIDE elements.

    Triton compiles another kernel for strides that are not such multiples; it reads element by element, and its
    registers spill (statically, sm_90: 1240 bytes a thread for a gated unit). A product's operands are cheap to copy
    beside that. An expanded x is copied as well: tensor descriptors are not known to take strides of 0.
    """
    if x.stride(-1) == 1 and all(s > 0 and s % WIDE == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0:
        return x
    width = -(-x.shape[-1] // WIDE) * WIDE
    return x.new_empty(*x.shape[:-1], width)[..., : x.shape[-1]].copy_(x)


def last_contiguous(x: Tensor) -> Tensor:
    """x, or a copy: what kernels that reading bounds take."""
    return x if x.stride(-1) == 1 else x.contiguous()
