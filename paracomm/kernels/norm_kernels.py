"""x + residual, then RMSNorm or LayerNorm, in one pass over memory; with their launchers. Needs Triton.

Shapes: N rows of width D; a program holds tiles of BM rows and BN columns; WIDE, where D > BN, it walks over columns.

    s = x + residual (rounded to the dtype, as it is handed on)
    h = (s - mean) rstd            mean = 0 for "rms"; rstd = 1 / sqrt(mean of (s - mean)^2 + eps), both float32
    y = h weight + bias
    ds = rstd (dy weight - mean(dy weight) - h mean(dy weight h)) + the gradient of s itself; mean(dy weight): "layer"
    dweight = sum over rows of dy h; dbias = sum over rows of dy

RMSNorm: Zhang and Sennrich, 2019; LayerNorm: Ba et al., 2016. Backward has no atomics: a program sums its rows into one
row [D] of a float32 table, whose rows are summed after: the same bits each time.

Bytes moved, of elements of e bytes: forward 4 N D e, backward 4 N D e (without a residual 2 and 3), and the table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paracomm.kernels.config import config
from paracomm.kernels.launch import dtype_name
from paracomm.kernels.select import arch

PROGRAMS = 264
"""Of a backward, at most: two for each of an H100's processors. A constant, so that other chips give the same bits."""


@triton.jit
def added(X, RESIDUAL, row, inside, x_n, r_n, col, D):
    """float32 [BM, BN]: x + residual, rounded as it is stored; 0 outside."""
    mask = inside[:, None] & (col < D)[None, :]
    s = tl.load(X + row[:, None] * x_n + col[None, :], mask=mask, other=0.0)
    if RESIDUAL is not None:
        other = tl.load(RESIDUAL + row[:, None] * r_n + col[None, :], mask=mask, other=0.0)
        s = (s.to(tl.float32) + other.to(tl.float32)).to(s.dtype)
    return s.to(tl.float32)


@triton.jit
def normed_tile(s, mean, rstd, row, inside, col, WEIGHT, BIAS, NORMED, SUM, D):
    """Writes y, and s where it is wanted."""
    mask = inside[:, None] & (col < D)[None, :]
    at = row[:, None] * D + col[None, :]
    y = (s - mean[:, None]) * rstd[:, None] * tl.load(WEIGHT + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    if BIAS is not None:
        y += tl.load(BIAS + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    tl.store(NORMED + at, y.to(NORMED.dtype.element_ty), mask=mask)
    if SUM is not None:
        tl.store(SUM + at, s.to(SUM.dtype.element_ty), mask=mask)


@triton.jit
def add_norm_forward_kernel(
    X, RESIDUAL, WEIGHT, BIAS, NORMED, SUM, MEAN, RSTD, x_n, r_n, N, D, eps, WIDE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """BM rows. MEAN is None for RMSNorm, SUM without a residual."""
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    inside = row < N
    n = tl.arange(0, BN)
    mean = tl.zeros([BM], tl.float32)
    if WIDE:
        if MEAN is not None:
            total = tl.zeros([BM, BN], tl.float32)
            for start in range(0, D, BN):
                total += added(X, RESIDUAL, row, inside, x_n, r_n, start + n, D)
            mean = tl.sum(total, 1) / D
        squares = tl.zeros([BM, BN], tl.float32)
        for start in range(0, D, BN):
            off = added(X, RESIDUAL, row, inside, x_n, r_n, start + n, D) - mean[:, None]
            off = tl.where((start + n < D)[None, :], off, 0.0)
            squares += off * off
        rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / D + eps)
        for start in range(0, D, BN):
            s = added(X, RESIDUAL, row, inside, x_n, r_n, start + n, D)
            normed_tile(s, mean, rstd, row, inside, start + n, WEIGHT, BIAS, NORMED, SUM, D)
    else:
        s = added(X, RESIDUAL, row, inside, x_n, r_n, n, D)
        if MEAN is not None:
            mean = tl.sum(s, 1) / D
        off = tl.where((n < D)[None, :], s - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(off * off, 1) / D + eps)
        normed_tile(s, mean, rstd, row, inside, n, WEIGHT, BIAS, NORMED, SUM, D)
    tl.store(RSTD + row, rstd, mask=inside)
    if MEAN is not None:
        tl.store(MEAN + row, mean, mask=inside)


@triton.jit
def grad_tile(GRAD, SUM, row, inside, g_n, s_n, mean, rstd, col, D):
    """(dy, h), float32 [BM, BN], 0 outside."""
    mask = inside[:, None] & (col < D)[None, :]
    g = tl.load(GRAD + row[:, None] * g_n + col[None, :], mask=mask, other=0.0).to(tl.float32)
    s = tl.load(SUM + row[:, None] * s_n + col[None, :], mask=mask, other=0.0).to(tl.float32)
    return g, tl.where(mask, (s - mean[:, None]) * rstd[:, None], 0.0)


@triton.jit
def dx_tile(wg, h, across, along, rstd, row, inside, col, GRAD_SUM, gs_n, DX, D):
    """Writes ds. across = mean(dy weight h), along = mean(dy weight) or 0."""
    mask = inside[:, None] & (col < D)[None, :]
    dx = rstd[:, None] * (wg - along[:, None] - h * across[:, None])
    if GRAD_SUM is not None:
        dx += tl.load(GRAD_SUM + row[:, None] * gs_n + col[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(DX + row[:, None] * D + col[None, :], dx.to(DX.dtype.element_ty), mask=mask)


@triton.jit
def statistics(MEAN, RSTD, row, inside, BM: tl.constexpr):
    mean = tl.zeros([BM], tl.float32)
    if MEAN is not None:
        mean = tl.load(MEAN + row, mask=inside, other=0.0)
    return mean, tl.load(RSTD + row, mask=inside, other=0.0)


@triton.jit
def add_norm_backward_kernel(
    GRAD, GRAD_SUM, SUM, WEIGHT, MEAN, RSTD, DX, DWEIGHT, DBIAS, g_n, gs_n, s_n, N, D, rows_each, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """rows_each rows (a multiple of BM) of up to BN columns: DX; sums over them in a row of DWEIGHT, DBIAS [P, D]."""
    first = tl.program_id(0) * rows_each
    n = tl.arange(0, BN)
    w = tl.load(WEIGHT + n, mask=n < D, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BM, BN], tl.float32)
    dbias = tl.zeros([BM, BN], tl.float32)
    for start in range(first, tl.minimum(first + rows_each, N), BM):
        row = (start + tl.arange(0, BM)).to(tl.int64)
        inside = row < N
        mean, rstd = statistics(MEAN, RSTD, row, inside, BM)
        g, h = grad_tile(GRAD, SUM, row, inside, g_n, s_n, mean, rstd, n, D)
        wg = g * w
        across = tl.sum(wg * h, 1) / D
        along = tl.zeros([BM], tl.float32)
        if MEAN is not None:
            along = tl.sum(wg, 1) / D
        dx_tile(wg, h, across, along, rstd, row, inside, n, GRAD_SUM, gs_n, DX, D)
        dweight += g * h
        if DBIAS is not None:
            dbias += g
    at = tl.program_id(0).to(tl.int64) * D + n
    tl.store(DWEIGHT + at, tl.sum(dweight, 0), mask=n < D)
    if DBIAS is not None:
        tl.store(DBIAS + at, tl.sum(dbias, 0), mask=n < D)


@triton.jit
def add_norm_backward_wide_kernel(
    GRAD, GRAD_SUM, SUM, WEIGHT, MEAN, RSTD, DX, DWEIGHT, DBIAS, g_n, gs_n, s_n, N, D, rows_each, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """As above for D > BN: first the means of each row, then DX; the sums of columns in a walk of their own."""
    first = tl.program_id(0) * rows_each
    last = tl.minimum(first + rows_each, N)
    n = tl.arange(0, BN)
    for start in range(first, last, BM):
        row = (start + tl.arange(0, BM)).to(tl.int64)
        inside = row < N
        mean, rstd = statistics(MEAN, RSTD, row, inside, BM)
        across = tl.zeros([BM], tl.float32)
        along = tl.zeros([BM], tl.float32)
        for column in range(0, D, BN):
            g, h = grad_tile(GRAD, SUM, row, inside, g_n, s_n, mean, rstd, column + n, D)
            wg = g * tl.load(WEIGHT + column + n, mask=column + n < D, other=0.0).to(tl.float32)[None, :]
            across += tl.sum(wg * h, 1) / D
            if MEAN is not None:
                along += tl.sum(wg, 1) / D
        for column in range(0, D, BN):
            g, h = grad_tile(GRAD, SUM, row, inside, g_n, s_n, mean, rstd, column + n, D)
            wg = g * tl.load(WEIGHT + column + n, mask=column + n < D, other=0.0).to(tl.float32)[None, :]
            dx_tile(wg, h, across, along, rstd, row, inside, column + n, GRAD_SUM, gs_n, DX, D)
    for column in range(0, D, BN):
        dweight = tl.zeros([BM, BN], tl.float32)
        dbias = tl.zeros([BM, BN], tl.float32)
        for start in range(first, last, BM):
            row = (start + tl.arange(0, BM)).to(tl.int64)
            mean, rstd = statistics(MEAN, RSTD, row, row < N, BM)
            g, h = grad_tile(GRAD, SUM, row, row < N, g_n, s_n, mean, rstd, column + n, D)
            dweight += g * h
            dbias += g
        at = tl.program_id(0).to(tl.int64) * D + column + n
        tl.store(DWEIGHT + at, tl.sum(dweight, 0), mask=column + n < D)
        if DBIAS is not None:
            tl.store(DBIAS + at, tl.sum(dbias, 0), mask=column + n < D)


# --- launchers ---
def rows_of(x: Tensor) -> Tensor:
    """[N, D], whose last dimension is contiguous."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, layer: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(normed, sum, mean [N], rstd [N]); without a residual `sum`, for "rms" `mean` is empty."""
    shape, D, N = x.shape, x.shape[-1], x.numel() // x.shape[-1]
    normed = torch.empty(shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(normed) if residual is not None else x.new_empty(0)
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if layer else rstd.new_empty(0)
    if not N:
        return normed, total, mean, rstd
    row = config("add_norm_forward", arch(x), dtype_name(x), triton.next_power_of_2(D))
    x = rows_of(x)
    other = None if residual is None else rows_of(residual)
    add_norm_forward_kernel[(triton.cdiv(N, row["BM"]),)](
        x, other, weight.contiguous(), None if bias is None else bias.contiguous(), normed,
        None if other is None else total, mean if layer else None, rstd, x.stride(0),
        0 if other is None else other.stride(0), N, D, eps, WIDE=row["BN"] < D, BM=row["BM"], BN=row["BN"],
        num_warps=row["warps"], num_stages=row["stages"],
    )  # fmt: skip
    return normed, total, mean, rstd


def launch_backward(
    grad: Tensor, grad_sum: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, which is the residual's too, dweight, dbias or an empty tensor)."""
    D, N = total.shape[-1], len(rstd)
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    if not N:
        return dx, torch.zeros_like(weight), weight.new_zeros(D if has_bias else 0)
    kernel, key = add_norm_backward_kernel, (arch(total), dtype_name(total), triton.next_power_of_2(D))
    row = config("add_norm_backward", *key)
    if row["BN"] < D:
        kernel, row = add_norm_backward_wide_kernel, config("add_norm_backward_wide", *key)
    rows_each = triton.cdiv(triton.cdiv(N, row.get("programs", PROGRAMS)), row["BM"]) * row["BM"]
    programs = triton.cdiv(N, rows_each)
    dweight = torch.empty(programs, D, dtype=torch.float32, device=total.device)
    dbias = torch.empty_like(dweight) if has_bias else None
    grad, total = rows_of(grad), rows_of(total)
    grad_sum = None if grad_sum is None else rows_of(grad_sum)
    kernel[(programs,)](
        grad, grad_sum, total, weight.contiguous(), mean if len(mean) else None, rstd, dx, dweight, dbias,
        grad.stride(0), 0 if grad_sum is None else grad_sum.stride(0), total.stride(0), N, D, rows_each, BM=row["BM"],
        BN=row["BN"], num_warps=row["warps"], num_stages=row["stages"],
    )  # fmt: skip
    sums = (dweight.sum(0).to(weight.dtype), weight.new_empty(0) if dbias is None else dbias.sum(0).to(weight.dtype))
    return dx, *sums
