"""Autocast, as torch's own operations do it: products in its dtype, norms on a GPU in float32, sums promote.

An operation casts its inputs and then computes with autocast off, so that what it documents as float32 is that.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast has products in on x's device; None where it is off."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast_off(x: Tensor) -> AbstractContextManager[Any]:
    """For what an operation is made of, forward and backward."""
    if autocast_dtype(x) is None:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    """As autocast casts: floating-point tensors but float64."""
    return [
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    ]


def widest(*tensors: Tensor | None) -> torch.dtype:
    """What torch promotes them to."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors if x is not None))


def as_autocast(*tensors: Tensor | None) -> list[Any]:
    """Cast as of a product, where autocast is on for the first one's device; or as they are."""
    assert tensors[0] is not None
    lower = autocast_dtype(tensors[0])
    return list(tensors) if lower is None else cast(lower, *tensors)
