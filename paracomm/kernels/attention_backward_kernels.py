"""Attention on tiles, backward. Shapes, and how tiles at an edge are kept apart: attention_forward_kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from paracomm.kernels.attention_forward_kernels import LOG2E, bent, kept, key_range, tile_of, visible

BOTH = tl.constexpr(0)
DV = tl.constexpr(1)
DK = tl.constexpr(2)


@triton.jit
def attention_delta_kernel(
    OUT, DO, LSE, DELTA, LSE2, o_b, o_h, o_t, g_b, g_h, g_t, l_b, l_h, H, T, K: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """DELTA[b, h, t] = sum_K out do; LSE2 is lse in log2, inf for a query that sees nothing: its p are 0 then.

    Sequences of variable lengths are one of B = 1 here.
    """
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    whole = (t < T)[:, None] & (d < K)[None, :]
    out = tl.load(OUT + b * o_b + h * o_h + t.to(tl.int64)[:, None] * o_t + d[None, :], mask=whole, other=0.0)
    grad = tl.load(DO + b * g_b + h * g_h + t.to(tl.int64)[:, None] * g_t + d[None, :], mask=whole, other=0.0)
    at = b * l_b + h * l_h + t
    lse = tl.load(LSE + at, mask=t < T, other=0.0)
    tl.store(LSE2 + at, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), mask=t < T)
    tl.store(DELTA + at, tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1), mask=t < T)


@triton.jit
def query_range(
    first_key, T, shift, window, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):
    """(begin, full, rest, end) of the tiles of queries that see keys first_key..: full..rest see all of them."""
    begin = 0
    full = 0
    end = tl.cdiv(T, BM)
    rest = T // BM
    if WINDOW:
        end = tl.cdiv(tl.minimum(T, tl.maximum(first_key + BN - 1 + window - shift, 0)), BM)
        rest = tl.minimum(rest, tl.maximum(first_key + window - shift, 0) // BM)
    if CAUSAL:
        begin = tl.minimum(tl.maximum(first_key - shift, 0) // BM, end)
        full = tl.maximum(tl.minimum(tl.cdiv(tl.maximum(first_key + BN - 1 - shift, 0), BM), end), begin)
    return begin, full, tl.maximum(rest, full), end


@triton.jit
def slope(scores, cap_log2):
    """The derivative of `bent`, by its result."""
    bend = scores / cap_log2
    return 1.0 - bend * bend


@triton.jit
def dkdv_tiles(
    dk, dv, k, v, q_base, g_base, l_base, delta_base, q_h, q_t, g_h, g_t, l_h, first, last, full, rest, k_index,
    first_key, T, S, shift, window, scale_log2, cap_log2, to_cap, drop, keep_scale, row, head, QPOS, KPOS,
    R: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, RUNS: tl.constexpr,
    PRECISION: tl.constexpr, WHICH: tl.constexpr,
):  # fmt: skip
    """Rounds first..last over tiles of queries, for each of R heads, into dk and dv [BN, D].

    Heads and tiles are one loop: of two, the inner one's addresses would be held through the outer one. That, and
    disable_licm, leave 40 bytes of stack a thread of 360 (static; D 128, 64x128 tiles), and 64x64 tiles none. Keys
    beyond the end are rows that nobody stores, and queries beyond it have an lse of inf: neither needs a mask of p.
    """
    d = tl.arange(0, D)[None, :]
    m = tl.arange(0, BM)
    r, tile = 0, first + 0
    for _ in tl.range(0, R * (last - first), disable_licm=True):
        start = tile_of(tile, full, rest, MASKED) * BM
        q_index = start + m
        q_at = q_base + (tl.cast(r, tl.int64) * q_h + tl.cast(start, tl.int64) * q_t) + (m[:, None] * q_t + d)
        g_at = g_base + (tl.cast(r, tl.int64) * g_h + tl.cast(start, tl.int64) * g_t) + (m[:, None] * g_t + d)
        l_at, delta_at = l_base + tl.cast(r, tl.int64) * l_h + start, delta_base + tl.cast(r, tl.int64) * l_h + start
        if MASKED or D != K:
            inside = (q_index < T)[:, None] & (d < K)
            q = tl.load(q_at, mask=inside, other=0.0)
            grad = tl.load(g_at, mask=inside, other=0.0)
        else:
            q = tl.load(q_at)
            grad = tl.load(g_at)
        if MASKED:
            lse = tl.load(l_at + m, mask=q_index < T, other=float("inf"))
        else:
            lse = tl.load(l_at + m)
        scores = bent(tl.dot(k, tl.trans(q), input_precision=PRECISION), cap_log2, to_cap, CAPPED)
        p = tl.exp2(scores * scale_log2 - lse[None, :])
        if MASKED and CAUSAL:
            p = tl.where(k_index[:, None] <= q_index[None, :] + shift, p, 0.0)
        if MASKED and WINDOW:
            p = tl.where(k_index[:, None] > q_index[None, :] + shift - window, p, 0.0)
        if DROPOUT:
            keep = tl.trans(
                kept(drop, row, head + r, q_index, k_index, first_key, q_index < T, k_index < S, QPOS, KPOS, BN, RUNS)
            )
        if WHICH != DK:
            dropped = tl.where(keep, p, 0.0) if DROPOUT else p
            dv = tl.dot(dropped.to(grad.dtype), grad, dv, input_precision=PRECISION)
        if WHICH != DV:
            if CAPPED:
                p = p * slope(scores, cap_log2)
            dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            if DROPOUT:
                dp = tl.where(keep, dp * keep_scale, 0.0)
            if MASKED:
                delta = tl.load(delta_at + m, mask=q_index < T, other=0.0)
            else:
                delta = tl.load(delta_at + m)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        tile += 1
        if R > 1:
            r += (tile == last).to(tl.int32)
            tile = tl.where(tile == last, first, tile)
    return dk, dv


@triton.jit
def attention_dkdv_kernel(
    Q, K_, V, DO, LSE2, DELTA, DK_, DV_, KEY_MASK, CU_Q, CU_K, ROWS, QPOS, KPOS,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, l_b, l_h,
    G, T, S, window, scale, scale_log2, cap_log2, to_cap, seed, stream, step, threshold, keep_scale, head_offset,
    heads_total, R: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    RUNS: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, WHICH: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(1) // G).to(tl.int64)
    g = (tl.program_id(1) % G).to(tl.int64)
    q_at, g_at, k_at, v_at = Q, DO, K_ + g * k_h, V + g * v_h
    dk_at, dv_at = DK_ + g * dk_h, DV_ + g * dv_h
    l_at, delta_at = LSE2 + b * l_b, DELTA + b * l_b
    if VARLEN:
        q_first, k_first = tl.load(CU_Q + b).to(tl.int64), tl.load(CU_K + b).to(tl.int64)
        T, S = (tl.load(CU_Q + b + 1) - q_first).to(tl.int32), (tl.load(CU_K + b + 1) - k_first).to(tl.int32)
        q_at, g_at, k_at, v_at = q_at + q_first * q_t, g_at + q_first * g_t, k_at + k_first * k_t, v_at + k_first * v_t
        dk_at, dv_at = dk_at + k_first * dk_t, dv_at + k_first * dv_t
        l_at, delta_at = l_at + q_first, delta_at + q_first
    else:
        q_at, g_at, k_at, v_at = q_at + b * q_b, g_at + b * g_b, k_at + b * k_b, v_at + b * v_b
        dk_at, dv_at = dk_at + b * dk_b, dv_at + b * dv_b
    first_key = tl.program_id(0) * BN
    if first_key >= S:
        return
    shift = S - T
    k_index = first_key + tl.arange(0, BN)
    d = tl.arange(0, D)
    whole = (k_index < S)[:, None] & (d < K)[None, :]
    n = tl.arange(0, BN)[:, None]
    first = first_key.to(tl.int64)
    k = tl.load(k_at + first * k_t + (n * k_t + d[None, :]), mask=whole, other=0.0)
    v = tl.load(v_at + first * v_t + (n * v_t + d[None, :]), mask=whole, other=0.0)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    row = b
    if DROPOUT:
        row = tl.load(ROWS + b)
    drop = (seed, stream, step, threshold, heads_total)
    begin, full, rest, end = query_range(first_key, T, shift, window, BM, BN, CAUSAL, WINDOW)
    h = g * R
    q_at, g_at, l_at, delta_at = q_at + h * q_h, g_at + h * g_h, l_at + h * l_h, delta_at + h * l_h
    dk, dv = dkdv_tiles(
        dk, dv, k, v, q_at, g_at, l_at, delta_at, q_h, q_t, g_h, g_t, l_h, full, rest, full, rest, k_index, first_key,
        T, S, shift, window, scale_log2, cap_log2, to_cap, drop, keep_scale, row, head_offset + h, QPOS, KPOS, R, K, D,
        BM, BN, CAUSAL, WINDOW, CAPPED, False, DROPOUT, RUNS, PRECISION, WHICH,
    )  # fmt: skip
    dk, dv = dkdv_tiles(
        dk, dv, k, v, q_at, g_at, l_at, delta_at, q_h, q_t, g_h, g_t, l_h, begin, end - (rest - full), full, rest,
        k_index, first_key, T, S, shift, window, scale_log2, cap_log2, to_cap, drop, keep_scale, row, head_offset + h,
        QPOS, KPOS, R, K, D, BM, BN, CAUSAL, WINDOW, CAPPED, True, DROPOUT, RUNS, PRECISION, WHICH,
    )  # fmt: skip
    if HAS_KEY_MASK:  # nobody sees a masked key: its rows of p are 0
        seen = tl.load(KEY_MASK + b * S + k_index, mask=k_index < S, other=False)[:, None]
        dk = tl.where(seen, dk, 0.0)
        dv = tl.where(seen, dv, 0.0)
    if DROPOUT:
        dv = dv * keep_scale
    if WHICH != DV:
        dk = dk * scale
        tl.store(dk_at + first * dk_t + (n * dk_t + d[None, :]), dk.to(DK_.dtype.element_ty), mask=whole)
    if WHICH != DK:
        tl.store(dv_at + first * dv_t + (n * dv_t + d[None, :]), dv.to(DV_.dtype.element_ty), mask=whole)


@triton.jit
def dq_tiles(
    dq, q, grad, lse, delta, k_base, v_base, k_step, v_step, first, last, full, rest, q_index, q_inside, S, shift,
    window, scale_log2, cap_log2, to_cap, KEY_MASK, drop, keep_scale, row, head, QPOS, KPOS, K: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    MASKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, RUNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rounds first..last over tiles of keys into dq [BM, D]."""
    d = tl.arange(0, D)[None, :]
    n = tl.arange(0, BN)
    for number in tl.range(first, last, disable_licm=True):
        start = tile_of(number, full, rest, MASKED) * BN
        k_index = start + n
        k_at = k_base + tl.cast(start, tl.int64) * k_step + (n[:, None] * k_step + d)
        v_at = v_base + tl.cast(start, tl.int64) * v_step + (n[:, None] * v_step + d)
        if MASKED or D != K:
            inside = (k_index < S)[:, None] & (d < K)
            k = tl.load(k_at, mask=inside, other=0.0)
            v = tl.load(v_at, mask=inside, other=0.0)
        else:
            k = tl.load(k_at)
            v = tl.load(v_at)
        scores = bent(tl.dot(q, tl.trans(k), input_precision=PRECISION), cap_log2, to_cap, CAPPED)
        p = tl.exp2(scores * scale_log2 - lse[:, None])
        if MASKED:
            see = visible(q_index, k_index, shift, S, window, CAUSAL, WINDOW)
            if HAS_KEY_MASK:
                see = see & tl.load(KEY_MASK + k_index, mask=k_index < S, other=False)[None, :]
            p = tl.where(see, p, 0.0)
        if CAPPED:
            p = p * slope(scores, cap_log2)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keep = kept(drop, row, head, q_index, k_index, start, q_inside, k_index < S, QPOS, KPOS, BN, RUNS)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def attention_dq_kernel(
    Q, K_, V, DO, LSE2, DELTA, DQ, KEY_MASK, CU_Q, CU_K, ROWS, QPOS, KPOS,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, dq_b, dq_h, dq_t, l_b, l_h,
    H, T, S, window, scale, scale_log2, cap_log2, to_cap, seed, stream, step, threshold, keep_scale, head_offset,
    heads_total, R: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    RUNS: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    q_at, g_at, k_at, v_at, dq_at = Q + h * q_h, DO + h * g_h, K_ + h // R * k_h, V + h // R * v_h, DQ + h * dq_h
    l_at, delta_at = LSE2 + b * l_b + h * l_h, DELTA + b * l_b + h * l_h
    if VARLEN:
        q_first, k_first = tl.load(CU_Q + b).to(tl.int64), tl.load(CU_K + b).to(tl.int64)
        T, S = (tl.load(CU_Q + b + 1) - q_first).to(tl.int32), (tl.load(CU_K + b + 1) - k_first).to(tl.int32)
        q_at, g_at, k_at, v_at = q_at + q_first * q_t, g_at + q_first * g_t, k_at + k_first * k_t, v_at + k_first * v_t
        dq_at, l_at, delta_at = dq_at + q_first * dq_t, l_at + q_first, delta_at + q_first
    else:
        q_at, g_at, k_at, v_at, dq_at = q_at + b * q_b, g_at + b * g_b, k_at + b * k_b, v_at + b * v_b, dq_at + b * dq_b
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    if first_query >= T:
        return
    shift = S - T
    q_index = first_query + tl.arange(0, BM)
    d = tl.arange(0, D)
    q_inside = q_index < T
    whole = q_inside[:, None] & (d < K)[None, :]
    m = tl.arange(0, BM)[:, None]
    first = first_query.to(tl.int64)
    q = tl.load(q_at + first * q_t + (m * q_t + d[None, :]), mask=whole, other=0.0)
    grad = tl.load(g_at + first * g_t + (m * g_t + d[None, :]), mask=whole, other=0.0)
    lse = tl.load(l_at + q_index, mask=q_inside, other=float("inf"))
    delta = tl.load(delta_at + q_index, mask=q_inside, other=0.0)
    dq = tl.zeros([BM, D], tl.float32)
    key_mask = KEY_MASK
    if HAS_KEY_MASK:
        key_mask = KEY_MASK + b * S
    row = b
    if DROPOUT:
        row = tl.load(ROWS + b)
    drop = (seed, stream, step, threshold, heads_total)
    head = head_offset + h
    begin, full, rest, end = key_range(first_query, S, shift, window, BM, BN, CAUSAL, WINDOW, HAS_KEY_MASK)
    if not HAS_KEY_MASK:
        dq = dq_tiles(
            dq, q, grad, lse, delta, k_at, v_at, k_t, v_t, full, rest, full, rest, q_index, q_inside, S, shift, window,
            scale_log2, cap_log2, to_cap, key_mask, drop, keep_scale, row, head, QPOS, KPOS, K, D, BN, CAUSAL, WINDOW,
            CAPPED, False, False, DROPOUT, RUNS, PRECISION,
        )  # fmt: skip
    dq = dq_tiles(
        dq, q, grad, lse, delta, k_at, v_at, k_t, v_t, begin, end - (rest - full), full, rest, q_index, q_inside, S,
        shift, window, scale_log2, cap_log2, to_cap, key_mask, drop, keep_scale, row, head, QPOS, KPOS, K, D, BN,
        CAUSAL, WINDOW, CAPPED, True, HAS_KEY_MASK, DROPOUT, RUNS, PRECISION,
    )  # fmt: skip
    tl.store(dq_at + first * dq_t + (m * dq_t + d[None, :]), (dq * scale).to(DQ.dtype.element_ty), mask=whole)
