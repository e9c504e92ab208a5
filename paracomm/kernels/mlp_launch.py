"""Launches the kernels of mlp_kernels.py. Known to mlp.py only; it needs Triton."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from paracomm.kernels import mlp_kernels as kernels
from paracomm.kernels.config import config
from paracomm.kernels.launch import WIDE, aligned, dtype_name, precision
from paracomm.kernels.select import arch

BLOCK = 1024
"""Elements of a program of an elementwise kernel."""


class _Product:
    """How one product is launched: tiles, and whether its inputs go by tensor descriptors.

    rows: [M, K] first, then weights [N, K]; with `columns`, which are [K, N], all are [M, K].
    """

    def __init__(
        self, kernel: str, x: Tensor, M: int, N: int, rows: tuple[Tensor, ...], columns: tuple[Tensor, ...] = ()
    ) -> None:
        found = config(kernel, arch(x), dtype_name(x))
        self.blocks = {key: found[key] for key in ("BM", "BN", "BK", "GROUP")}
        tma = bool(found.get("TMA")) and x.shape[1] > 0
        self.options: dict[str, Any] = {
            "PRECISION": precision(x), "TMA": tma, "num_warps": found["warps"], "num_stages": found["stages"],
            **self.blocks,
        }  # fmt: skip
        self.grid = (triton.cdiv(M, found["BM"]) * triton.cdiv(N, found["BN"]),)
        BM, BN, BK = (found[key] for key in ("BM", "BN", "BK"))
        shapes = [[BM if columns or i == 0 else BN, BK] for i in range(len(rows))]
        self.inputs: list[Any] = [*rows, *columns]
        if tma:
            shapes += [[BK, BN]] * len(columns)
            self.inputs = [TensorDescriptor.from_tensor(x, block) for x, block in zip(self.inputs, shapes, strict=True)]


def _filled(weights: tuple[Tensor, ...], rest: tuple[Tensor | None, ...]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Aligned weights [N, K], and tensors [..., N] or None, with 0 added until N is a multiple of WIDE.

    For other N the mask of a row's end differs from element to element: results are stored one by one, at addresses for
    which there are no registers (statically, sm_90: 432 bytes of stack a thread for a gated unit, 520 for a linear).
    """
    extra = -weights[0].shape[0] % WIDE
    if extra:
        weights = tuple(F.pad(w, (0, 0, 0, extra)) for w in weights)
        rest = tuple(None if r is None else F.pad(r, (0, extra)) for r in rest)
    return [aligned(w) for w in weights], [None if r is None else aligned(r) for r in rest]


def _first(N: int, y: Tensor) -> Tensor:
    """Its first N columns; y itself if it has no others."""
    return y[:, :N].contiguous() if y.dim() == 2 else y


def launch_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    wanted, x = weight.shape[0], aligned(x)
    (weight,), (bias, residual) = _filled((weight,), (bias, residual))
    (M, K), N = x.shape, weight.shape[0]
    y = x.new_empty(M, N)
    z = torch.empty_like(y) if keep else x.new_empty(0)
    if y.numel():
        p = _Product("linear", x, M, N, (x, weight))
        kernels.linear_kernel[p.grid](
            *p.inputs, bias, residual, y, z if keep else None, M, N, K, x.stride(0), weight.stride(0),
            0 if residual is None else residual.stride(0), HAS_BIAS=bias is not None, HAS_R=residual is not None,
            KEEP=keep, ACTIVATION=activation, **p.options,
        )  # fmt: skip
    return _first(wanted, y), _first(wanted, z)


def launch_glu(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted, x = w_gate.shape[0], aligned(x)
    (w_gate, w_up), (bias_gate, bias_up) = _filled((w_gate, w_up), (bias_gate, bias_up))
    (M, K), N = x.shape, w_gate.shape[0]
    y = x.new_empty(M, N)
    gate, up = (torch.empty_like(y) if keep else x.new_empty(0) for _ in range(2))
    if y.numel():
        p = _Product("glu", x, M, N, (x, w_gate, w_up))
        kernels.glu_kernel[p.grid](
            *p.inputs, bias_gate, bias_up, y, gate if keep else None, up if keep else None, M, N, K, x.stride(0),
            w_gate.stride(0), w_up.stride(0), HAS_BIAS=bias_gate is not None, KEEP=keep, ACTIVATION=activation,
            **p.options,
        )  # fmt: skip
    return _first(wanted, y), _first(wanted, gate), _first(wanted, up)


def launch_sum(a: Tensor, v: Tensor, b: Tensor, w: Tensor) -> Tensor:
    a, v, b, w = map(aligned, (a, v, b, w))
    (M, K), N = a.shape, v.shape[1]
    y = a.new_empty(M, N)
    if y.numel():
        p = _Product("sum", a, M, N, (a, b), (v, w))
        a_in, b_in, v_in, w_in = p.inputs
        kernels.sum_kernel[p.grid](
            a_in, v_in, b_in, w_in, y, M, N, K, a.stride(0), b.stride(0), v.stride(0), w.stride(0), **p.options
        )
    return y


def _elementwise(kernel: Any, like: Tensor, inputs: tuple[Tensor, ...], outputs: int, activation: str) -> list[Tensor]:
    found = [torch.empty_like(like) for _ in range(outputs)]
    if like.numel():
        grid = (triton.cdiv(like.numel(), BLOCK),)
        kernel[grid](*inputs, *found, like.numel(), ACTIVATION=activation, BLOCK=BLOCK, num_warps=4)
    return found


def launch_gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return _elementwise(kernels.gated_kernel, gate, (gate, up), 1, activation)[0]


def launch_gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dgate, dup = _elementwise(kernels.gated_backward_kernel, gate, (grad, gate, up), 2, activation)
    return dgate, dup


def launch_active(x: Tensor, activation: str) -> Tensor:
    return _elementwise(kernels.active_kernel, x, (x,), 1, activation)[0]


def launch_active_backward(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    return _elementwise(kernels.active_backward_kernel, x, (grad, x), 1, activation)[0]
