"""Products of matrices with what surrounds them in an MLP: bias, activation, gate and residual, forward and backward.

Shapes: M rows, K input features, N output features; weights are [N, K], as torch.nn.Linear has them.

    linear     Y = act(X W^T + b) + R                        one product; Z = X W^T + b is kept for backward if wanted
    glu        Y = act(G) * U, G = X Wg^T + bg, U likewise   two products share each tile of X (Shazeer, 2020)
    sum        DX = DG Wg + DU Wu                            glu's gradient of X, without a second pass over DX
    gated      Y = act(G) * U and its gradients, elementwise
    active     Y = act(X) and its gradient, elementwise

Rows and columns beyond the end read the last one again (no mask in the loop) and are not stored; K's last tile is apart.
Tiles go through in groups of GROUP rows of tiles, so that the weights' tiles stay in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paracomm.kernels.activation import activated, slope


@triton.jit
def tile_of(program, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(first row, first column) of a program's tile."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    row, column = tl.swizzle2d(program // columns, program % columns, rows, columns, GROUP)
    return row * BM, column * BN


@triton.jit
def rows_at(X, first, count, step, depth, B: tl.constexpr, BK: tl.constexpr):
    """Pointers [B, BK] to rows first.. of X [count, depth]; beyond the end the last row."""
    index = tl.minimum(first + tl.arange(0, B), count - 1).to(tl.int64)
    return X + index[:, None] * step + (depth + tl.arange(0, BK))[None, :]


@triton.jit
def linear_kernel(
    X, W, BIAS, R, Y, Z, M, N, K, x_m, w_n, r_m, HAS_BIAS: tl.constexpr, HAS_R: tl.constexpr, KEEP: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    first_m, first_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    x_at = rows_at(X, first_m, M, x_m, 0, BM, BK)
    w_at = rows_at(W, first_n, N, w_n, 0, BN, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    for _ in tl.range(0, K // BK):
        acc = tl.dot(tl.load(x_at), tl.trans(tl.load(w_at)), acc, input_precision=PRECISION)
        x_at += BK
        w_at += BK
    if K % BK:
        left = (tl.arange(0, BK) < K % BK)[None, :]
        x, w = tl.load(x_at, mask=left, other=0.0), tl.load(w_at, mask=left, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    m = first_m + tl.arange(0, BM)
    n = first_n + tl.arange(0, BN)
    if HAS_BIAS:
        acc += tl.load(BIAS + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    if KEEP:
        tl.store(Z + at, acc.to(Z.dtype.element_ty), mask=inside)
    acc = activated(acc, ACTIVATION)
    if HAS_R:
        acc += tl.load(R + m.to(tl.int64)[:, None] * r_m + n[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + at, acc.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def glu_kernel(
    X, WG, WU, BG, BU, Y, G, U, M, N, K, x_m, g_n, u_n, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    first_m, first_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    x_at = rows_at(X, first_m, M, x_m, 0, BM, BK)
    g_at = rows_at(WG, first_n, N, g_n, 0, BN, BK)
    u_at = rows_at(WU, first_n, N, u_n, 0, BN, BK)
    gate = tl.zeros([BM, BN], tl.float32)
    up = tl.zeros([BM, BN], tl.float32)
    for _ in tl.range(0, K // BK):
        x = tl.load(x_at)
        gate = tl.dot(x, tl.trans(tl.load(g_at)), gate, input_precision=PRECISION)
        up = tl.dot(x, tl.trans(tl.load(u_at)), up, input_precision=PRECISION)
        x_at += BK
        g_at += BK
        u_at += BK
    if K % BK:
        left = (tl.arange(0, BK) < K % BK)[None, :]
        x = tl.load(x_at, mask=left, other=0.0)
        gate = tl.dot(x, tl.trans(tl.load(g_at, mask=left, other=0.0)), gate, input_precision=PRECISION)
        up = tl.dot(x, tl.trans(tl.load(u_at, mask=left, other=0.0)), up, input_precision=PRECISION)
    m = first_m + tl.arange(0, BM)
    n = first_n + tl.arange(0, BN)
    if HAS_BIAS:
        gate += tl.load(BG + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        up += tl.load(BU + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    if KEEP:
        tl.store(G + at, gate.to(G.dtype.element_ty), mask=inside)
        tl.store(U + at, up.to(U.dtype.element_ty), mask=inside)
    tl.store(Y + at, (activated(gate, ACTIVATION) * up).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def sum_kernel(
    A, V, B, W, Y, M, N, K, a_m, b_m, v_k, w_k, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Y [M, N] = A [M, K] V [K, N] + B [M, K] W [K, N]."""
    first_m, first_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    a_at = rows_at(A, first_m, M, a_m, 0, BM, BK)
    b_at = rows_at(B, first_m, M, b_m, 0, BM, BK)
    k = tl.arange(0, BK)
    n = first_n + tl.arange(0, BN)
    column = tl.minimum(n, N - 1)[None, :]
    v_at = V + k.to(tl.int64)[:, None] * v_k + column
    w_at = W + k.to(tl.int64)[:, None] * w_k + column
    acc = tl.zeros([BM, BN], tl.float32)
    for _ in tl.range(0, K // BK):
        acc = tl.dot(tl.load(a_at), tl.load(v_at), acc, input_precision=PRECISION)
        acc = tl.dot(tl.load(b_at), tl.load(w_at), acc, input_precision=PRECISION)
        a_at += BK
        b_at += BK
        v_at += BK * v_k
        w_at += BK * w_k
    if K % BK:
        left = k < K % BK
        a, b = tl.load(a_at, mask=left[None, :], other=0.0), tl.load(b_at, mask=left[None, :], other=0.0)
        v, w = tl.load(v_at, mask=left[:, None], other=0.0), tl.load(w_at, mask=left[:, None], other=0.0)
        acc = tl.dot(a, v, acc, input_precision=PRECISION)
        acc = tl.dot(b, w, acc, input_precision=PRECISION)
    m = first_m + tl.arange(0, BM)
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(Y + at, acc.to(Y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def gated_kernel(G, U, Y, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gate = tl.load(G + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(U + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + at, (activated(gate, ACTIVATION) * up).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward_kernel(DY, G, U, DG, DU, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    grad = tl.load(DY + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(G + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(U + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(DU + at, (grad * activated(gate, ACTIVATION)).to(DU.dtype.element_ty), mask=inside)
    tl.store(DG + at, (grad * up * slope(gate, ACTIVATION)).to(DG.dtype.element_ty), mask=inside)


@triton.jit
def active_kernel(X, Y, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(Y + at, activated(x, ACTIVATION).to(Y.dtype.element_ty), mask=at < count)


@triton.jit
def active_backward_kernel(DY, X, DX, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(DY + at, mask=at < count, other=0.0).to(tl.float32)
    x = tl.load(X + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(DX + at, (grad * slope(x, ACTIVATION)).to(DX.dtype.element_ty), mask=at < count)
