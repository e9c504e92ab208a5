"""Rotary embedding, forward and backward, in one kernel; and its launcher. Needs Triton.

    y_low  = x_low  cos_low  - x_high sin_low          backward: dx_low  = dy_low  cos_low  + dy_high sin_high
    y_high = x_high cos_high + x_low  sin_high                   dx_high = dy_high cos_high - dy_low  sin_low

low, high: the first and the second K / 2 features (Su et al., "RoFormer", 2021; pairs as in Llama). A program has BM
positions of a head; sums are taken in float32. Bytes moved: 2 B H T K e; the tables stay in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paracomm.kernels.config import config
from paracomm.kernels.launch import dtype_name, expect_launchable, last_contiguous
from paracomm.kernels.select import arch


@triton.jit
def rotary_kernel(
    X, COS, SIN, Y, x_b, x_h, x_t, c_t, s_t, H, T, HALF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Y [B, H, T, K] is contiguous; BN: a power of two from HALF = K / 2 on."""
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, BN)
    mask = (t < T)[:, None] & (k < HALF)[None, :]
    bh = tl.program_id(1).to(tl.int64)
    line = t.to(tl.int64)[:, None]
    x_at = X + (bh // H) * x_b + (bh % H) * x_h + line * x_t + k[None, :]
    low = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x_at + HALF, mask=mask, other=0.0).to(tl.float32)
    cos_at = COS + line * c_t + k[None, :]
    sin_at = SIN + line * s_t + k[None, :]
    cos_low = tl.load(cos_at, mask=mask, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_at + HALF, mask=mask, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_at, mask=mask, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_at + HALF, mask=mask, other=0.0).to(tl.float32)
    if TRANSPOSED:
        y_low = low * cos_low + high * sin_high
        y_high = high * cos_high - low * sin_low
    else:
        y_low = low * cos_low - high * sin_low
        y_high = high * cos_high + low * sin_high
    y_at = Y + (bh * T + line) * (2 * HALF) + k[None, :]
    tl.store(y_at, y_low.to(Y.dtype.element_ty), mask=mask)
    tl.store(y_at + HALF, y_high.to(Y.dtype.element_ty), mask=mask)


def launch(x: Tensor, cosine: Tensor, sine: Tensor, transposed: bool) -> Tensor:
    """[B, H, T, K], contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    B, H, T, K = x.shape
    expect_launchable("rotary", B, H)
    x, cosine, sine = map(last_contiguous, (x, cosine, sine))
    BN = max(2, triton.next_power_of_2(K // 2))
    row = config("rotary", arch(x), dtype_name(x), BN)
    rotary_kernel[(triton.cdiv(T, row["BM"]), B * H)](
        x, cosine, sine, y, *x.stride()[:3], cosine.stride(0), sine.stride(0), H, T, HALF=K // 2, BM=row["BM"], BN=BN,
        TRANSPOSED=transposed, num_warps=row["warps"], num_stages=row["stages"],
    )  # fmt: skip
    return y
