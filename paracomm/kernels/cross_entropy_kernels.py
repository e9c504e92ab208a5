"""The log-sum-exp of x weight^T and its gradients on tiles: logits never reach memory. Kernels and launchers.

Needs Triton. Shapes: N rows x [N, D], V tokens weight [V, D]; logits [N, V] = x weight^T + bias, perhaps bent to
cap tanh(logits / cap).

    lse       a program has BM rows and one part of the vocabulary, of which there are up to PARTS: tiles [BM, BN] of
              logits by products over D, a running maximum and sum (Milakov and Gimelshein, 2018), and the logit of the
              target. Parts [parts, N] are put together by torch.
    dlogits   for a chunk of C tokens: the tiles again, then exp(logit - lse) dlse + [target] dlogit, stored [N, C] in
              the dtype
    dx        += dlogits weight[chunk]     float32, by torch (cuBLAS)
    dweight   [chunk] = dlogits^T x        by torch; a row is written once, so that nothing is summed over chunks

Products: 4 N V D multiply-adds, 1 more than with logits kept. Bytes beside inputs and gradients: forward 12 N parts;
backward N C e + N D (4 + e), whatever V is (C: about 2 D; e: bytes of an element). F.linear with F.cross_entropy keeps
logits and their float32 softmax, N V (e + 4), and has as much again in backward.

Why so: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024) also take the logits twice, but add
to dx and dweight from all tiles, which needs atomics or locks; without, each tile of dx would take all logits of its
rows again, D / BN times. Liger Kernel (Hsu et al., 2024) takes chunks of rows, once, as it goes forward: then dweight
is summed over chunks, in float32 another 4 V D bytes, and a vocabulary on several ranks, where dlogits need the lse of
all, would communicate a chunk at a time. Chunks of the vocabulary have neither.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paracomm.kernels.activation import tanh
from paracomm.kernels.attention_forward_kernels import LOG2E
from paracomm.kernels.config import config
from paracomm.kernels.launch import WIDE, aligned, dtype_name, precision
from paracomm.kernels.select import arch

PARTS = 32
"""Of the vocabulary, at most: enough programs for few rows. A constant, so that other chips give the same bits."""
GROUP = 8
"""Tiles of rows that are worked on together, so that x's and weight's tiles stay in the cache."""


@triton.jit
def logits_tile(
    X, W, BIAS, row, col, x_n, w_v, N, V, D, cap, to_cap, EVEN: tl.constexpr, CAPPED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits, float32 [BM, BN]; what lies beyond N and V is as the last. EVEN: D is a multiple of BK."""
    row = tl.minimum(row, N - 1).to(tl.int64)
    col = tl.minimum(col, V - 1).to(tl.int64)
    k = tl.arange(0, BK)
    x_at = X + row[:, None] * x_n + k[None, :]
    w_at = W + col[None, :] * w_v + k[:, None]
    logits = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, D, BK):
        if EVEN:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(k < D - start)[None, :], other=0.0)
            w = tl.load(w_at, mask=(k < D - start)[:, None], other=0.0)
        logits = tl.dot(x, w, logits, input_precision=PRECISION)
        x_at += BK
        w_at += BK
    if BIAS is not None:
        logits += tl.load(BIAS + col).to(tl.float32)[None, :]
    if CAPPED:
        logits = cap * tanh(logits * to_cap)
    return logits


@triton.jit
def cross_entropy_forward_kernel(
    X, W, BIAS, TARGETS, TOP, TOTAL, LOGIT, x_n, w_v, N, V, D, part, cap, to_cap, EVEN: tl.constexpr,
    CAPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """TOP, TOTAL, LOGIT [parts, N] of tokens p part to (p + 1) part, multiples of BN. LOGIT is 0 without the target."""
    m, p = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), GROUP)
    row = m * BM + tl.arange(0, BM)
    target = tl.load(TARGETS + row, mask=row < N, other=-1)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    at_target = tl.zeros([BM], tl.float32)
    for start in range(p * part, tl.minimum(p * part + part, V), BN):
        col = start + tl.arange(0, BN)
        logits = logits_tile(X, W, BIAS, row, col, x_n, w_v, N, V, D, cap, to_cap, EVEN, CAPPED, BM, BN, BK, PRECISION)
        real = (col < V)[None, :]
        at_target += tl.sum(tl.where((col[None, :] == target[:, None]) & real, logits, 0.0), 1)
        logits = tl.where(real, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2((top - reference) * LOG2E) + tl.sum(tl.exp2((logits - reference[:, None]) * LOG2E), 1)
        top = new_top
    at = p.to(tl.int64) * N + row
    tl.store(TOP + at, top, mask=row < N)
    tl.store(TOTAL + at, total, mask=row < N)
    tl.store(LOGIT + at, at_target, mask=row < N)


@triton.jit
def cross_entropy_backward_kernel(
    X, W, BIAS, TARGETS, LSE, REST, DLSE, DLOGIT, DLOGITS, x_n, w_v, d_n, first, N, V, D, cap, to_cap,
    EVEN: tl.constexpr, CAPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """DLOGITS [N, V] for the V tokens from `first` on, where W and BIAS begin."""
    m, n = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), GROUP)
    row = m * BM + tl.arange(0, BM)
    col = n * BN + tl.arange(0, BN)
    logits = logits_tile(X, W, BIAS, row, col, x_n, w_v, N, V, D, cap, to_cap, EVEN, CAPPED, BM, BN, BK, PRECISION)
    inside = row < N
    target = tl.load(TARGETS + row, mask=inside, other=-1)
    lse = tl.load(LSE + row, mask=inside, other=0.0)
    rest = tl.load(REST + row, mask=inside, other=0.0)
    dlse = tl.load(DLSE + row, mask=inside, other=0.0)
    dlogit = tl.load(DLOGIT + row, mask=inside, other=0.0)
    grad = tl.exp2((logits - lse[:, None] - rest[:, None]) * LOG2E) * dlse[:, None]
    grad += tl.where((first + col)[None, :] == target[:, None], dlogit[:, None], 0.0)
    if CAPPED:
        bend = logits * (1.0 / cap)
        grad *= 1.0 - bend * bend
    at = DLOGITS + row.to(tl.int64)[:, None] * d_n + col[None, :]
    tl.store(at, grad.to(DLOGITS.dtype.element_ty), mask=inside[:, None] & (col < V)[None, :])


# --- launchers ---
def _shared(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float, kernel: str) -> tuple[dict[str, int], dict]:
    """(its row of the table, the arguments that both kernels have)."""
    row = config(kernel, arch(x), dtype_name(x))
    return row, {
        "x_n": x.stride(0), "w_v": weight.stride(0), "N": len(x), "D": x.shape[1], "cap": softcap or 1.0,
        "to_cap": 1 / softcap if softcap else 1.0, "EVEN": x.shape[1] % row["BK"] == 0, "CAPPED": softcap != 0.0,
        "BM": row["BM"], "BN": row["BN"], "BK": row["BK"], "PRECISION": precision(x), "GROUP": GROUP,
        "num_warps": row["warps"], "num_stages": row["stages"],
    }  # fmt: skip


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse [N], logit [N], rest [N]), float32. A target that is not in 0..V-1 has a logit of 0.

    lse is rounded; `rest` is what it lacks. Without, all exp(logit - lse) of a row whose lse is 20 are off by 1e-6, six
    times as much as the plain version errs.
    """
    N, V = len(x), len(weight)
    if not N or not V:
        zero = x.new_zeros(N, dtype=torch.float32)
        return zero - torch.inf, zero, torch.zeros_like(zero)
    x, weight = map(aligned, (x, weight))
    row, shared = _shared(x, weight, bias, softcap, "cross_entropy_forward")
    part = triton.cdiv(triton.cdiv(V, row["BN"]), row.get("parts", PARTS)) * row["BN"]
    parts = triton.cdiv(V, part)
    top, total, logit = torch.empty(3, parts, N, dtype=torch.float32, device=x.device)
    cross_entropy_forward_kernel[(triton.cdiv(N, row["BM"]), parts)](
        x, weight, None if bias is None else bias.contiguous(), targets.contiguous(), top, total, logit, V=V, part=part,
        **shared,
    )  # fmt: skip
    most = top.amax(0)
    most = most.masked_fill(most == -torch.inf, 0.0)
    log_total = (total * (top - most).exp()).sum(0).log()
    lse = most + log_total
    return lse, logit.sum(0), log_total - (lse - most)


def launch_backward(
    dlse: Tensor, dlogit: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor,
    rest: Tensor, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dweight, dbias or an empty tensor)."""
    (N, D), V = x.shape, len(weight)
    dbias = weight.new_zeros(0 if bias is None else V)
    if not N or not V:
        return torch.zeros_like(x), torch.zeros_like(weight), dbias
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    dx = torch.zeros(N, D, dtype=torch.float32, device=x.device)
    x, weight = map(aligned, (x, weight))
    bias = None if bias is None else bias.contiguous()
    row, shared = _shared(x, weight, bias, softcap, "cross_entropy_backward")
    rows = [t.contiguous() for t in (targets, lse, rest, dlse, dlogit)]
    chunk = min(V, row.get("chunk", triton.cdiv(max(2 * D, 2048), row["BN"]) * row["BN"]))
    buffer = torch.empty(N, triton.cdiv(chunk, WIDE) * WIDE, dtype=x.dtype, device=x.device)
    for first in range(0, V, chunk):
        own = weight[first : first + chunk]
        C = len(own)
        dlogits = buffer[:, :C]
        cross_entropy_backward_kernel[(triton.cdiv(N, row["BM"]), triton.cdiv(C, row["BN"]))](
            x, own, None if bias is None else bias[first : first + C], *rows, dlogits, d_n=buffer.stride(0),
            first=first, V=C, **shared,
        )  # fmt: skip
        if x.dtype == torch.float32:
            dx.addmm_(dlogits, own)
        else:
            dx += dlogits @ own
        torch.mm(dlogits.mT, x, out=dweight[first : first + C])
        if bias is not None:
            dbias[first : first + C] = dlogits.sum(0, dtype=torch.float32)
    return dx.to(x.dtype), dweight, dbias
