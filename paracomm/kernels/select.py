"""Who computes: Triton's kernels or their eager twins.

auto     kernels for float32, float16 and bfloat16 on a GPU of compute capability 8.0 or later, if Triton is there
triton   kernels, or an Error that says why not; with TRITON_INTERPRET=1 in the environment, on CPU tensors too
eager    the twins: torch's own operations
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from paracomm.errors import Error, InvalidArgument

Backend = Literal["auto", "triton", "eager"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_backend: Backend = "auto"  # of the process: torch.compile cannot look into a ContextVar


def set_backend(name: Backend) -> None:
    """From here on, in this process. Raises InvalidArgument for a name that is none of Backend's."""
    global _backend
    _backend = _known(name)


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Inside, kernels and twins are chosen by `name`, in this process."""
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def current() -> Backend:
    """What was set last. An operation's backward runs under what its forward ran under."""
    return _backend


def _known(name: Backend) -> Backend:
    if name not in get_args(Backend):
        raise InvalidArgument(f"kernels: backend is {name!r}, expected one of {', '.join(get_args(Backend))}")
    return name


def interpreted() -> bool:
    """Whether Triton interprets kernels in this process, on NumPy."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be used; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        import triton  # noqa: F401
    except Exception as error:  # whatever a broken installation raises
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    return None


@functools.cache
def _too_old(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"cuda:{index} has compute capability {major}.{minor}, expected at least 8.0"


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"{dtype} has no kernel, expected float32, float16 or bfloat16"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"tensors are on {device}, expected a GPU (or TRITON_INTERPRET=1 before the start, to interpret)"
    return triton_missing() or (_too_old(device.index or 0) if device.type == "cuda" else None)


def runs(x: Tensor) -> bool:
    """Whether kernels compute on x. Raises Error for backend "triton" where they cannot.

    Under any backend the twins compute within torch.func's transforms (grad, vmap, jvp, ...), which see through torch's
    own operations only, and for tensors on "meta", of which nothing but shapes is computed. What torch.compile compiles
    keeps the answer that it got then.
    """
    return x.device.type != "meta" and not transformed() and _kernels_on(x.device, x.dtype)


def transformed() -> bool:
    """Whether this runs within a transform of torch.func."""
    return torch._C._are_functorch_transforms_active()


def plain() -> bool:
    """Whether twins should be torch's own operations alone, which torch.func's transforms and torch.compile see
    through, rather than an autograd.Function with a backward of its own."""
    return transformed() or torch.compiler.is_compiling()


def _kernels_on(device: torch.device, dtype: torch.dtype) -> bool:
    chosen = _backend
    if chosen == "eager" or (chosen == "auto" and device.type != "cuda"):
        return False
    obstacle = _obstacle(device, dtype)
    if obstacle is not None and chosen == "triton":
        raise Error(f"kernels: backend 'triton' was asked for, but {obstacle}")
    return obstacle is None


# As torch.compiler.assume_constant_result(), which would import the compiler (3 s) for those who do not use it.
_kernels_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def arch(x: Tensor) -> int:
    """The architecture whose configuration serves x: 80 or 90. Interpreted kernels take sm_80's."""
    if x.device.type != "cuda":
        return 80
    return 90 if torch.cuda.get_device_capability(x.device)[0] >= 9 else 80
