"""Attention of a few queries over many keys, which are divided so that all of a GPU reads them (Dao et al.,
"Flash-Decoding", 2023).

    decode   one program for one part of the keys of a key-value head and BM rows, a row being one of the T queries of
             one of the R heads that share these keys: keys are read once for all of them. Writes each row's result over
             its part, and the logarithm of the sum of its exponents.
    merge    one program a row: the parts' results, weighted by their sums, in order

    keys     | part 0: tiles 0 1 2 | part 1: 3 4 5 | part 2: 6 7 |      of those that the window and the length leave

What takes time is reading, so every tile looks at positions, and float32 is multiplied as such (8 FLOP a byte read at
K = 128, where an H100 has 20; on tensor cores its parts would not fit the registers). Names as in
attention_forward_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paracomm.kernels.attention_forward_kernels import LN2, LOG2E, bent


@triton.jit(do_not_specialize=["S"])
def decode_kernel(
    Q, K_, V, LENGTHS, OUT, LSE, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, H, T, S, window, scale_log2, cap_log2,
    to_cap, R: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """OUT [B, H, T, parts, K], LSE [B, H, T, parts]; a part without keys writes 0 and -inf. Strides of keys and values
    are in UNITs: with 8 it is seen that 16 bytes may be read at a time."""
    k_b, k_h, k_t, v_b, v_h, v_t = k_b * UNIT, k_h * UNIT, k_t * UNIT, v_b * UNIT, v_h * UNIT, v_t * UNIT
    part, parts = tl.program_id(0), tl.num_programs(0)
    b = (tl.program_id(1) // (H // R)).to(tl.int64)
    g = tl.program_id(1) % (H // R)
    length = S
    if LENGTHS is not None:
        length = tl.minimum(tl.load(LENGTHS + b), S)
    row = tl.program_id(2) * BM + tl.arange(0, BM)
    h = g * R + row // T
    t = row % T
    last = length - T + t  # the last place that a row sees
    low = 0
    if WINDOW:
        low = tl.maximum(length - T - window + 1, 0) // BN
    high = (length + BN - 1) // BN
    share = (tl.maximum(high - low, 0) + parts - 1) // parts
    begin = (low + part * share) * BN
    end = tl.minimum(begin + share * BN, length)
    d = tl.arange(0, D)
    n = tl.arange(0, BN)
    whole = (row < R * T)[:, None] & (d < K)[None, :]
    q_at = Q + b * q_b + h.to(tl.int64)[:, None] * q_h + t[:, None] * q_t + d[None, :]
    q = tl.load(q_at, mask=whole, other=0.0)
    first = begin.to(tl.int64)
    k_at = K_ + b * k_b + g * k_h + first * k_t + n[None, :] * k_t + d[:, None]
    v_at = V + b * v_b + g * v_h + first * v_t + n[:, None] * v_t + d[None, :]
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for start in tl.range(begin, end, BN):
        place = start + n
        inside = (place < end)[None, :] & (d < K)[:, None]
        k = tl.load(k_at, mask=inside, other=0.0)
        v = tl.load(v_at, mask=tl.trans(inside), other=0.0)
        scores = bent(tl.dot(q, k, input_precision="ieee"), cap_log2, to_cap, CAPPED)
        see = (place < end)[None, :] & (place[None, :] <= last[:, None])
        if WINDOW:
            see = see & (place[None, :] > (last - window)[:, None])
        scores = tl.where(see, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores * scale_log2 - reference[:, None])
        fade = tl.exp2(top - reference)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        top = new_top
        k_at += BN * k_t
        v_at += BN * v_t
    nothing = total == 0.0
    safe = tl.where(nothing, 1.0, total)
    lse = tl.where(nothing, float("-inf"), (top + tl.log2(safe)) * LN2)
    place = ((b * H + h) * T + t) * parts + part
    tl.store(LSE + place, lse, mask=row < R * T)
    tl.store(OUT + place[:, None] * K + d[None, :], (acc / safe[:, None]).to(OUT.dtype.element_ty), mask=whole)


@triton.jit
def merge_kernel(
    PARTS, SUMS, OUT, LSE, parts, K: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BP: tl.constexpr
):  # fmt: skip
    """PARTS [rows, parts, K] and SUMS [rows, parts] to OUT [rows, K] and LSE [rows]; P: parts, padded; BP at a time."""
    row = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, P)
    sums = tl.load(SUMS + row * parts + each, mask=each < parts, other=float("-inf"))
    top = tl.max(sums, 0)
    reference = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2((sums - reference) * LOG2E), 0)
    d = tl.arange(0, D)
    out = tl.zeros([D], tl.float32)
    for first in tl.range(0, parts, BP):
        some = first + tl.arange(0, BP)
        inside = some < parts
        weight = tl.exp2((tl.load(SUMS + row * parts + some, mask=inside, other=float("-inf")) - reference) * LOG2E)
        at = PARTS + (row * parts + some)[:, None] * K + d[None, :]
        values = tl.load(at, mask=inside[:, None] & (d < K)[None, :], other=0.0)
        out += tl.sum(values * weight[:, None], 0)
    nothing = total == 0.0
    safe = tl.where(nothing, 1.0, total)
    tl.store(LSE + row, tl.where(nothing, float("-inf"), reference + tl.log2(safe) * LN2))
    tl.store(OUT + row * K + d, (out / safe).to(OUT.dtype.element_ty), mask=d < K)
