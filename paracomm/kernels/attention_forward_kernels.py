"""Attention on tiles, forward: nothing of size T x S is ever stored. attention_backward_kernels.py has the other half.

Shapes: B sequences, H query heads, G key-value heads (R = H / G share one), T queries, S keys, K head size, D = K
padded to a power of two. A query at t looks at keys up to t + S - T (causal), from t + S - T - window + 1 on.

    forward   one program for BM queries of a head; walks over tiles of BN keys with a running maximum and sum (Milakov
              and Gimelshein, 2018; Dao, "FlashAttention-2", 2023, algorithm 1). Returns lse, natural.
    delta     rowsum(do * out)
    dkdv      one program for BN keys of a key-value head; walks over the queries of its R heads
    dq        one program for BM queries of a head; walks over keys
              (FlashAttention-2, algorithm 2, in two kernels: no atomics, the same bits each time)

    keys      | masked | full  full  full | masked |     only tiles at an edge (window, diagonal, end) look at positions
    queries   t0..     ^ window            ^ diagonal, end

One loop takes the full tiles, another both ends' masked ones. A tile's first row is a pointer of 64 bits, offsets
within it are of 32. Scores are in units of log2: exp2(scale_log2 * qk - m) is one FFMA and one MUFU an element. `lse`
may be that of more keys than are given here, as context parallelism has it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paracomm.kernels.activation import tanh
from paracomm.kernels.philox import words_at, words_in_runs

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def bent(scores, cap_log2, to_cap, CAPPED: tl.constexpr):
    """Raw products to scores in log2 units where they are capped: cap tanh(scale qk / cap)."""
    if CAPPED:
        scores = cap_log2 * tanh(scores * to_cap)
    return scores


@triton.jit
def kept(
    drop, row, head, q_index, k_index, k_start, q_inside, k_inside, QPOS, KPOS, BN: tl.constexpr, RUNS: tl.constexpr
):
    """bool [BM, BN]: what dropout keeps. `drop` = (seed, stream, step, threshold, heads)."""
    seed, stream, step, threshold, heads = drop
    line = (row * heads + head) << 40
    if RUNS:
        base = line + (q_index.to(tl.int64) << 20)
        words = words_in_runs(base, k_start, BN, seed, stream, step)
    else:
        q_place = tl.load(QPOS + q_index, mask=q_inside, other=0)
        k_place = tl.load(KPOS + k_index, mask=k_inside, other=0)
        words = words_at(line + (q_place << 20)[:, None] + k_place[None, :], seed, stream, step)
    return words.to(tl.int64) >= threshold


@triton.jit
def visible(q_index, k_index, shift, S, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """bool [BM, BN]."""
    see = (k_index < S)[None, :]
    if CAUSAL:
        see = see & (k_index[None, :] <= q_index[:, None] + shift)
    if WINDOW:
        see = see & (k_index[None, :] > q_index[:, None] + shift - window)
    return see


@triton.jit
def tile_of(number, full, rest, MASKED: tl.constexpr):
    """The tile that a loop's round `number` takes. Loops over masked tiles have those of full..rest left out."""
    if MASKED:
        number = number + tl.where(number >= full, rest - full, 0)
    return number


@triton.jit
def forward_tiles(
    acc, total, top, q, k_base, v_base, k_step, v_step, first, last, full, rest, q_index, q_inside, S, shift, window,
    scale_log2, cap_log2, to_cap, KEY_MASK, drop, row, head, QPOS, KPOS, K: tl.constexpr, D: tl.constexpr,
    BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, RUNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rounds first..last into acc [BM, D], total and top [BM]. MASKED: the tiles may hold what is not seen."""
    d = tl.arange(0, D)
    n = tl.arange(0, BN)
    for number in tl.range(first, last, disable_licm=True):
        start = tile_of(number, full, rest, MASKED) * BN
        k_index = start + n
        k_at = k_base + tl.cast(start, tl.int64) * k_step + (n[None, :] * k_step + d[:, None])
        v_at = v_base + tl.cast(start, tl.int64) * v_step + (n[:, None] * v_step + d[None, :])
        if MASKED or D != K:
            inside = (k_index < S)[None, :] & (d < K)[:, None]
            k = tl.load(k_at, mask=inside, other=0.0)
            v = tl.load(v_at, mask=tl.trans(inside), other=0.0)
        else:
            k = tl.load(k_at)
            v = tl.load(v_at)
        scores = tl.dot(q, k, input_precision=PRECISION)
        scores = bent(scores, cap_log2, to_cap, CAPPED)
        if MASKED:
            see = visible(q_index, k_index, shift, S, window, CAUSAL, WINDOW)
            if HAS_KEY_MASK:
                see = see & tl.load(KEY_MASK + k_index, mask=k_index < S, other=False)[None, :]
            scores = tl.where(see, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        # A query that has seen nothing yet, as it may have before a masked tile, has a top of -inf.
        reference = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
        p = tl.exp2(scores * scale_log2 - reference[:, None])
        fade = tl.exp2(top - reference)
        total = total * fade + tl.sum(p, 1)
        if DROPOUT:
            keep = kept(drop, row, head, q_index, k_index, start, q_inside, k_index < S, QPOS, KPOS, BN, RUNS)
            p = tl.where(keep, p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit
def key_range(
    first_query,
    S,
    shift,
    window,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
):
    """(begin, full, rest, end) of the tiles of keys that queries first_query.. see: all see full..rest whole."""
    begin = 0
    end = tl.cdiv(S, BN)
    rest = S // BN
    if CAUSAL:
        end = tl.cdiv(tl.maximum(tl.minimum(S, first_query + BM + shift), 0), BN)
        rest = tl.minimum(rest, tl.maximum(first_query + shift + 1, 0) // BN)
    full = 0
    if WINDOW:
        begin = tl.minimum(tl.maximum(first_query + shift - window + 1, 0) // BN, end)
        full = tl.maximum(tl.minimum(tl.cdiv(tl.maximum(first_query + BM + shift - window, 0), BN), end), begin)
    rest = tl.maximum(rest, full)
    if HAS_KEY_MASK:
        rest = full
    return begin, full, rest, end


@triton.jit
def attention_forward_kernel(
    Q, K_, V, OUT, LSE, KEY_MASK, CU_Q, CU_K, ROWS, QPOS, KPOS,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, l_b, l_h,
    H, T, S, window, scale_log2, cap_log2, to_cap, seed, stream, step, threshold, keep_scale, head_offset, heads_total,
    R: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, RUNS: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    q_at, k_at, v_at, o_at = Q + h * q_h, K_ + h // R * k_h, V + h // R * v_h, OUT + h * o_h
    l_at = LSE + b * l_b + h * l_h
    if VARLEN:
        q_first, k_first = tl.load(CU_Q + b).to(tl.int64), tl.load(CU_K + b).to(tl.int64)
        T, S = (tl.load(CU_Q + b + 1) - q_first).to(tl.int32), (tl.load(CU_K + b + 1) - k_first).to(tl.int32)
        q_at, k_at, v_at, o_at = q_at + q_first * q_t, k_at + k_first * k_t, v_at + k_first * v_t, o_at + q_first * o_t
        l_at = l_at + q_first
    else:
        q_at, k_at, v_at, o_at = q_at + b * q_b, k_at + b * k_b, v_at + b * v_b, o_at + b * o_b
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # those with the most keys begin
    if first_query >= T:
        return
    shift = S - T
    q_index = first_query + tl.arange(0, BM)
    d = tl.arange(0, D)
    q_inside = q_index < T
    whole = q_inside[:, None] & (d < K)[None, :]
    m = tl.arange(0, BM)[:, None]
    q_at, o_at = q_at + first_query.to(tl.int64) * q_t, o_at + first_query.to(tl.int64) * o_t
    q = tl.load(q_at + (m * q_t + d[None, :]), mask=whole, other=0.0)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
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
        acc, total, top = forward_tiles(
            acc, total, top, q, k_at, v_at, k_t, v_t, full, rest, full, rest, q_index, q_inside, S, shift, window,
            scale_log2, cap_log2, to_cap, key_mask, drop, row, head, QPOS, KPOS, K, D, BN, CAUSAL, WINDOW, CAPPED,
            False, False, DROPOUT, RUNS, PRECISION,
        )  # fmt: skip
    acc, total, top = forward_tiles(
        acc, total, top, q, k_at, v_at, k_t, v_t, begin, end - (rest - full), full, rest, q_index, q_inside, S, shift,
        window, scale_log2, cap_log2, to_cap, key_mask, drop, row, head, QPOS, KPOS, K, D, BN, CAUSAL, WINDOW, CAPPED,
        True, HAS_KEY_MASK, DROPOUT, RUNS, PRECISION,
    )  # fmt: skip
    nothing = total == 0.0
    safe = tl.where(nothing, 1.0, total)
    lse = tl.where(nothing, float("-inf"), (top + tl.log2(safe)) * LN2)
    tl.store(l_at + q_index, lse, mask=q_inside)
    out = acc * ((keep_scale if DROPOUT else 1.0) / safe)[:, None]
    tl.store(o_at + (m * o_t + d[None, :]), out.to(OUT.dtype.element_ty), mask=whole)
