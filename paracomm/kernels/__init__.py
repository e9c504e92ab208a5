"""Fused Triton kernels for Transformers, and their eager twins.

Every operation runs its kernel where `select.runs()` says so, and torch's own operations elsewhere; Triton is imported
when the first kernel is to run, so that everything but kernels works without it.
"""

from paracomm.kernels.attention import (
    Dropout,
    attention,
    attention_backward,
    attention_forward,
    keep_mask,
)
from paracomm.kernels.cross_entropy import linear_cross_entropy, partial_cross_entropy
from paracomm.kernels.decode import decode
from paracomm.kernels.mlp import activate, gated, glu, linear
from paracomm.kernels.norm import add_norm
from paracomm.kernels.rotary import rotary
from paracomm.kernels.select import Backend, backend, current, runs, set_backend

__all__ = [
    "Backend",
    "Dropout",
    "activate",
    "add_norm",
    "attention",
    "attention_backward",
    "attention_forward",
    "backend",
    "current",
    "decode",
    "gated",
    "glu",
    "keep_mask",
    "linear",
    "linear_cross_entropy",
    "partial_cross_entropy",
    "rotary",
    "runs",
    "set_backend",
]
