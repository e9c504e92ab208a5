"""Launches attention's kernels: strides, grids, configurations. Known to attention.py only; it needs Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from paracomm.kernels import reference
from paracomm.kernels.attention_backward_kernels import (
    attention_delta_kernel,
    attention_dkdv_kernel,
    attention_dq_kernel,
)
from paracomm.kernels.attention_forward_kernels import attention_forward_kernel
from paracomm.kernels.attention_tma import can_tma, forward_tma
from paracomm.kernels.config import config
from paracomm.kernels.launch import WIDE, aligned, dtype_name, expect_launchable, precision
from paracomm.kernels.philox import keep_mask_kernel
from paracomm.kernels.select import arch

if TYPE_CHECKING:
    from paracomm.kernels.attention import _Options

LOG2E = 1.4426950408889634


def padded(K: int) -> int:
    """Head sizes are padded to a power of two, at least what a product of tensor cores takes."""
    return max(16, triton.next_power_of_2(K))


def like(x: Tensor) -> Tensor:
    """An empty tensor for a kernel's result of x's shape, its rows aligned as `aligned` has them."""
    width = -(-x.shape[-1] // WIDE) * WIDE
    return torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)[..., : x.shape[-1]]


class Attention:
    """What the kernels of one attention share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, o: _Options) -> None:
        self.o, self.q = o, q
        self.H, self.G, self.K = q.shape[1], k.shape[1], q.shape[3]
        varlen = o.cu_q is not None
        self.B = q.shape[0] if o.cu_q is None else len(o.cu_q) - 1
        self.T, self.S = o.max_q, o.max_k
        expect_launchable("attention", self.B, self.H)
        given = (o.key_mask, o.cu_q, o.cu_k, o.rows, o.q_positions, o.k_positions)
        self.pointers = [None if x is None else x.contiguous() for x in given]
        capped, dropped = o.softcap != 0.0, o.rows is not None
        # Capped scores leave `bent` in units of log2; others are scaled within the exponent.
        self.scales = (1.0, o.softcap * LOG2E, o.scale / o.softcap) if capped else (o.scale * LOG2E, 1.0, 1.0)
        self.drop = (o.seed, o.stream, o.step, reference.threshold(o.p), 1 / (1 - o.p), o.head_offset, o.heads_total)
        self.flags: dict[str, Any] = {
            "R": self.H // self.G, "K": self.K, "D": padded(self.K), "CAUSAL": o.causal, "WINDOW": o.window > 0,
            "CAPPED": capped, "HAS_KEY_MASK": o.key_mask is not None, "DROPOUT": dropped,
            "RUNS": dropped and o.q_positions is None, "VARLEN": varlen, "PRECISION": precision(q),
        }  # fmt: skip
        self.heavy = "_heavy" if capped or dropped or o.window > 0 or o.key_mask is not None else ""
        self.lse_strides = (0, q.shape[2]) if varlen else (self.H * q.shape[2], q.shape[2])

    def strides(self, *tensors: Tensor) -> list[int]:
        return [stride for x in tensors for stride in x.stride()[:3]]

    def row(self, kernel: str) -> dict[str, int]:
        return config(kernel, arch(self.q), dtype_name(self.q), padded(self.K))

    def tuned(self, kernel: str) -> tuple[dict[str, int], dict[str, int]]:
        """(block sizes, warps and stages)."""
        found = self.row(kernel)
        return {key: found[key] for key in ("BM", "BN")}, {"num_warps": found["warps"], "num_stages": found["stages"]}


def launch_forward(q: Tensor, k: Tensor, v: Tensor, o: _Options) -> tuple[Tensor, Tensor]:
    q, k, v = map(aligned, (q, k, v))
    out, lse = like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    a = Attention(q, k, v, o)
    if not out.numel():
        return out.contiguous(), lse.fill_(-torch.inf)
    if not k.shape[2] or not a.B or not a.T:
        return torch.zeros_like(out, memory_format=torch.contiguous_format), lse.fill_(-torch.inf)
    if can_tma(q, k, v, o):
        return forward_tma(q, k, v, a)
    if o.cu_q is not None:  # tokens of no sequence
        out.zero_()
        lse.fill_(-torch.inf)
    blocks, options = a.tuned("attention_forward" + a.heavy)
    attention_forward_kernel[(triton.cdiv(a.T, blocks["BM"]), a.B * a.H)](
        q, k, v, out, lse, *a.pointers, *a.strides(q, k, v, out), *a.lse_strides, a.H, a.T, a.S, o.window, *a.scales,
        *a.drop, **a.flags, **blocks, **options,
    )  # fmt: skip
    return out.contiguous(), lse


def launch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, o: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, out = map(aligned, (grad, q, k, v, out))
    lse = lse.contiguous()
    dq, dk, dv = map(like, (q, k, v))
    a = Attention(q, k, v, o)
    if not q.numel() or not k.numel() or not a.B or not a.T or not a.S:
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))  # type: ignore[return-value]
    if o.cu_q is not None:
        for x in (dq, dk, dv):
            x.zero_()
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    blocks, options = a.tuned("attention_delta")
    attention_delta_kernel[(triton.cdiv(q.shape[2], blocks["BM"]), q.shape[0] * a.H)](
        out, grad, lse, delta, lse2, *a.strides(out, grad), a.H * q.shape[2], q.shape[2], a.H, q.shape[2], K=a.K,
        D=a.flags["D"], BM=blocks["BM"], **options,
    )  # fmt: skip
    blocks, options = a.tuned("attention_dkdv" + a.heavy)
    for which in (1, 2) if a.row("attention_dkdv" + a.heavy).get("SPLIT") else (0,):
        attention_dkdv_kernel[(triton.cdiv(a.S, blocks["BN"]), a.B * a.G)](
            q, k, v, grad, lse2, delta, dk, dv, *a.pointers, *a.strides(q, k, v, grad, dk, dv), *a.lse_strides, a.G,
            a.T, a.S, o.window, o.scale, *a.scales, *a.drop, WHICH=which, **a.flags, **blocks, **options,
        )  # fmt: skip
    blocks, options = a.tuned("attention_dq" + a.heavy)
    attention_dq_kernel[(triton.cdiv(a.T, blocks["BM"]), a.B * a.H)](
        q, k, v, grad, lse2, delta, dq, *a.pointers, *a.strides(q, k, v, grad, dq), *a.lse_strides, a.H, a.T, a.S,
        o.window, o.scale, *a.scales, *a.drop, **a.flags, **blocks, **options,
    )  # fmt: skip
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def launch_keep_mask(seed: int, stream: int, step: int, base: Tensor, offsets: Tensor, threshold: int) -> Tensor:
    base, offsets = base.contiguous(), offsets.contiguous()
    mask = torch.empty(*base.shape, len(offsets), dtype=torch.bool, device=base.device)
    keep_mask_kernel[(triton.cdiv(mask.numel(), 1024),)](
        base, offsets, mask, mask.numel(), len(offsets), reference.signed(seed), stream, step, threshold, BLOCK=1024
    )
    return mask
