"""Products of matrices with what surrounds them in an MLP: bias, activation, gate and residual, forward and backward.

Shapes: M rows, K input features, N output features; weights are [N, K], as torch.nn.Linear has them.

    linear     Y = act(X W^T + b) + R                        one product; Z = X W^T + b is kept for backward if wanted
    glu        Y = act(G) * U, G = X Wg^T + bg, U likewise   two products share each tile of X (Shazeer, 2020)
    sum        DX = DG Wg + DU Wu                            glu's gradient of X, without a second pass over DX
    gated      Y = act(G) * U and its gradients, elementwise
    active     Y = act(X) and its gradient, elementwise

Pointers: rows beyond the end read the last one again (no mask in the loop) and are not stored; K's last tile is apart.
TMA (sm_90): inputs are tensor descriptors, and what lies beyond an end is 0.
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
def from_row(X, first, step, TMA: tl.constexpr):
    """The pointer to row `first`, so that offsets within a tile fit 32 bits; a descriptor as it is."""
    if not TMA:
        X += first.to(tl.int64) * step
    return X


@triton.jit
def row_offsets(first, count, step, B: tl.constexpr, BK: tl.constexpr):
    """[B, BK], from row `first` of `count` on; beyond the end those of the last row."""
    return tl.minimum(tl.arange(0, B), count - 1 - first)[:, None] * step + tl.arange(0, BK)[None, :]


@triton.jit
def column_offsets(first, count, step, BK: tl.constexpr, B: tl.constexpr):
    """[BK, B], of columns first.. of `count`; beyond the end the last one."""
    return tl.arange(0, BK)[:, None] * step + tl.minimum(first + tl.arange(0, B), count - 1)[None, :]


@triton.jit
def row_tile(X, offsets, first, k, K, BK: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr):
    """[B, BK] at column k."""
    if TMA:
        x = X.load([first, k])
    elif TAIL:
        x = tl.load(X + k + offsets, mask=(k + tl.arange(0, BK) < K)[None, :], other=0.0)
    else:
        x = tl.load(X + k + offsets)
    return x


@triton.jit
def column_tile(X, offsets, first, k, K, step, BK: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr):
    """[BK, B] at row k."""
    if TMA:
        x = X.load([k, first])
    elif TAIL:
        x = tl.load(X + tl.cast(k, tl.int64) * step + offsets, mask=(k + tl.arange(0, BK) < K)[:, None], other=0.0)
    else:
        x = tl.load(X + tl.cast(k, tl.int64) * step + offsets)
    return x


@triton.jit
def whole_tiles(K, BK: tl.constexpr, TMA: tl.constexpr):
    """Where the loop over K ends; a tail is left without TMA."""
    return K if TMA else K // BK * BK


@triton.jit
def linear_kernel(
    X, W, BIAS, R, Y, Z, M, N, K, x_m, w_n, r_m, HAS_BIAS: tl.constexpr, HAS_R: tl.constexpr, KEEP: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    first_m, first_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    X, x_at = from_row(X, first_m, x_m, TMA), row_offsets(first_m, M, x_m, BM, BK)
    W, w_at = from_row(W, first_n, w_n, TMA), row_offsets(first_n, N, w_n, BN, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    end = whole_tiles(K, BK, TMA)
    for k in tl.range(0, end, BK):
        x = row_tile(X, x_at, first_m, k, K, BK, TMA, False)
        w = row_tile(W, w_at, first_n, k, K, BK, TMA, False)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    if not TMA:  # noqa: SIM102 - decided when it is compiled, unlike the other
        if end < K:
            x = row_tile(X, x_at, first_m, end, K, BK, TMA, True)
            w = row_tile(W, w_at, first_n, end, K, BK, TMA, True)
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
    GROUP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    first_m, first_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    X, x_at = from_row(X, first_m, x_m, TMA), row_offsets(first_m, M, x_m, BM, BK)
    WG, g_at = from_row(WG, first_n, g_n, TMA), row_offsets(first_n, N, g_n, BN, BK)
    WU, u_at = from_row(WU, first_n, u_n, TMA), row_offsets(first_n, N, u_n, BN, BK)
    gate = tl.zeros([BM, BN], tl.float32)
    up = tl.zeros([BM, BN], tl.float32)
    end = whole_tiles(K, BK, TMA)
    for k in tl.range(0, end, BK):
        x = row_tile(X, x_at, first_m, k, K, BK, TMA, False)
        g = row_tile(WG, g_at, first_n, k, K, BK, TMA, False)
        u = row_tile(WU, u_at, first_n, k, K, BK, TMA, False)
        gate = tl.dot(x, tl.trans(g), gate, input_precision=PRECISION)
        up = tl.dot(x, tl.trans(u), up, input_precision=PRECISION)
    if not TMA:  # noqa: SIM102 - decided when it is compiled, unlike the other
        if end < K:
            x = row_tile(X, x_at, first_m, end, K, BK, TMA, True)
            g = row_tile(WG, g_at, first_n, end, K, BK, TMA, True)
            u = row_tile(WU, u_at, first_n, end, K, BK, TMA, True)
            gate = tl.dot(x, tl.trans(g), gate, input_precision=PRECISION)
            up = tl.dot(x, tl.trans(u), up, input_precision=PRECISION)
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
    BK: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Y [M, N] = A [M, K] V [K, N] + B [M, K] W [K, N]."""
    first_m, first_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    A, a_at = from_row(A, first_m, a_m, TMA), row_offsets(first_m, M, a_m, BM, BK)
    B, b_at = from_row(B, first_m, b_m, TMA), row_offsets(first_m, M, b_m, BM, BK)
    v_at, w_at = column_offsets(first_n, N, v_k, BK, BN), column_offsets(first_n, N, w_k, BK, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    end = whole_tiles(K, BK, TMA)
    for k in tl.range(0, end, BK):
        a = row_tile(A, a_at, first_m, k, K, BK, TMA, False)
        v = column_tile(V, v_at, first_n, k, K, v_k, BK, TMA, False)
        acc = tl.dot(a, v, acc, input_precision=PRECISION)
        b = row_tile(B, b_at, first_m, k, K, BK, TMA, False)
        w = column_tile(W, w_at, first_n, k, K, w_k, BK, TMA, False)
        acc = tl.dot(b, w, acc, input_precision=PRECISION)
    if not TMA:  # noqa: SIM102 - decided when it is compiled, unlike the other
        if end < K:
            a = row_tile(A, a_at, first_m, end, K, BK, TMA, True)
            v = column_tile(V, v_at, first_n, end, K, v_k, BK, TMA, True)
            acc = tl.dot(a, v, acc, input_precision=PRECISION)
            b = row_tile(B, b_at, first_m, end, K, BK, TMA, True)
            w = column_tile(W, w_at, first_n, end, K, w_k, BK, TMA, True)
            acc = tl.dot(b, w, acc, input_precision=PRECISION)
    m = first_m + tl.arange(0, BM)
    n = first_n + tl.arange(0, BN)
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
