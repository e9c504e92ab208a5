"""Attention forward for sm_90: the tensor memory accelerator (TMA) loads, and warps have different work.

    warp group 0    asks the TMA for tiles of keys and values, `stages` ahead
    1 and 2         multiply and take exponents of half of the BM queries each
                    (as FlashAttention-3 divides the work: Shah et al., 2024)

Triton 3.7.1 makes this of a loop marked `warp_specialize` (its NVGPUWarpSpecialization pass) if the kernel

    has num_warps 4 (that is one group; the pass adds two) and at least two stages;
    has one loop with products: with two the pass fails. So full tiles are not peeled from masked ones as in
        attention_forward_kernels.py; the mask is one comparison and one selection an element instead, and is left out
        where all tiles are full (EDGE);
    has no branch with an else;
    loads what the groups divide, the queries, through a descriptor made in the kernel: one that comes in as an argument
        cannot be divided. Keys and values, which both groups read, have descriptors of the host, which cost a program
        nothing.

Otherwise it fails, or compiles without specialising, silently: the cases of every row assert USETMAXREG. It is wrong
where the coordinate of the queries' load has other uses: it adds 64 to that value for the second group, and to all that
is divided and made of it. Hence `before`; tests/kernels/test_specialised.py looks at the result.

Descriptors have a dimension each for batch and head, so that the TMA clips at a sequence's end, and not one head later.
"""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from paracomm.kernels.attention_forward_kernels import LN2
from paracomm.kernels.config import config
from paracomm.kernels.launch import dtype_name

if TYPE_CHECKING:
    from paracomm.kernels.attention import _Options
    from paracomm.kernels.attention_launch import Attention

KERNEL = "attention_forward_tma"
LOG2E = 1.4426950408889634
LINE = 16
"""Bytes that a descriptor's base and strides are multiples of."""


@triton.jit
def attention_forward_tma_kernel(
    Q, KEYS, VALUES, OUT, LSE, q_b, q_h, q_t, o_b, o_h, o_t, H, T, S, window, scale_log2, cap_log2, to_exponent,
    R: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, EDGE: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    """As attention_forward_kernels.py's. KEYS, VALUES: descriptors of [B, G, S, K] in tiles [1, 1, BN, D]."""
    b = tl.program_id(1) // H
    h = tl.program_id(1) % H
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # those with the most keys begin
    before = (tl.program_id(0) + 1 - tl.num_programs(0)) * BM  # -first_query, which is the coordinate: see above
    shift = S - T
    q_tiles = tl.make_tensor_descriptor(Q + b.to(tl.int64) * q_b + h * q_h, [T, K], [q_t, 1], [BM, D])
    q = q_tiles.load([first_query, 0])
    q_index = tl.arange(0, BM) - before
    n = tl.arange(0, BN)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    begin = 0
    end = S
    last = tl.zeros([BM], tl.int32) + S  # a query sees keys first <= k < last
    if CAUSAL:
        end = tl.minimum(S, first_query + BM + shift)
        last = tl.minimum(last, q_index + shift + 1)
    if WINDOW:
        begin = tl.maximum(first_query + shift - window + 1, 0) // BN * BN
        first = q_index + shift - window + 1
    for start in tl.range(begin, end, BN, warp_specialize=SPECIALISED):
        k = KEYS.load([b, h // R, start, 0]).reshape([BN, D])
        scores = tl.dot(q, k.T)
        if CAPPED:  # cap tanh(scale qk / cap): what cancels near 0 is far below the inputs' 16 bits
            scores = cap_log2 - 2.0 * cap_log2 / (1.0 + tl.exp2(scores * to_exponent))
        if EDGE:
            see = n[None, :] < (last - start)[:, None]
            if WINDOW:
                see = see & (n[None, :] >= (first - start)[:, None])
            scores = tl.where(see, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        reference = new_top
        if EDGE:
            reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores * scale_log2 - reference[:, None])
        fade = tl.exp2(top - reference)
        total = total * fade + tl.sum(p, 1)
        v = VALUES.load([b, h // R, start, 0]).reshape([BN, D])
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None])
        top = new_top
    nothing = total == 0.0
    safe = tl.where(nothing, 1.0, total)
    lse = tl.where(nothing, float("-inf"), (top + tl.log2(safe)) * LN2)
    q_inside = q_index < T
    tl.store(LSE + tl.program_id(1).to(tl.int64) * T + q_index, lse, mask=q_inside)
    d = tl.arange(0, D)
    out_at = OUT + b.to(tl.int64) * o_b + h * o_h + q_index.to(tl.int64)[:, None] * o_t + d[None, :]
    tl.store(out_at, (acc / safe[:, None]).to(OUT.dtype.element_ty), mask=q_inside[:, None] & (d < K)[None, :])


def can_tma(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, o: _Options) -> bool:
    """Whether forward_tma() computes this: on sm_90, in 16 bits, without key_mask, dropout or variable lengths, with
    rows where the TMA can fetch them."""
    on_hopper = q_BHTK.device.type == "cuda" and torch.cuda.get_device_capability(q_BHTK.device)[0] == 9
    return on_hopper and fits_tma(q_BHTK, k_BGSK, v_BGSK, o)


def fits_tma(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, o: _Options) -> bool:
    """can_tma() for any device."""
    plain = o.key_mask is None and o.rows is None and o.cu_q is None
    tensors = (q_BHTK, k_BGSK, v_BGSK)
    return plain and q_BHTK.element_size() == 2 and all(x.numel() and _in_lines(x) for x in tensors)


def _in_lines(x: Tensor) -> bool:
    strides = [stride * x.element_size() for stride, size in zip(x.stride()[:3], x.shape, strict=False) if size > 1]
    return x.stride(3) == 1 and x.data_ptr() % LINE == 0 and all(each > 0 and each % LINE == 0 for each in strides)


def _described(x_BGSK: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """In tiles [1, 1, rows, columns]. The stride of a dimension of size 1 is never used, but must be in whole lines."""
    strides = [stride if size > 1 else LINE for stride, size in zip(x_BGSK.stride()[:3], x_BGSK.shape, strict=False)]
    return TensorDescriptor(x_BGSK, list(x_BGSK.shape), [*strides, 1], [1, 1, rows, columns])


def forward_tma(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, a: Attention) -> tuple[Tensor, Tensor]:
    """(out_BHTK, lse_BHT), as launch_forward() of attention_launch.py, for what can_tma() takes."""
    row = config(KERNEL, 90, dtype_name(q_BHTK), a.flags["D"])
    out = torch.empty(q_BHTK.shape, dtype=q_BHTK.dtype, device=q_BHTK.device)
    lse = q_BHTK.new_empty(q_BHTK.shape[:3], dtype=torch.float32)
    flags: dict[str, Any] = {key: a.flags[key] for key in ("R", "K", "D", "CAUSAL", "WINDOW", "CAPPED")}
    flags |= {"BM": row["BM"], "BN": row["BN"], "SPECIALISED": bool(row["SPECIALISED"])}
    flags["EDGE"] = flags["CAUSAL"] or flags["WINDOW"] or bool(a.S % row["BN"])
    keys, values = (_described(x, row["BN"], flags["D"]) for x in (k_BGSK, v_BGSK))
    scale_log2, cap_log2, to_cap = a.scales

    def launch() -> None:
        triton.set_allocator(_scratch)
        attention_forward_tma_kernel[(triton.cdiv(a.T, row["BM"]), a.B * a.H)](
            q_BHTK, keys, values, out, lse, *a.strides(q_BHTK, out), a.H, a.T, a.S, a.o.window, scale_log2, cap_log2,
            2 * LOG2E * to_cap, **flags, num_warps=row["warps"], num_stages=row["stages"],
        )  # fmt: skip

    contextvars.copy_context().run(launch)  # the allocator of others stays what it is
    return out, lse


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where programs put the descriptors that they make. torch's memory is aligned to 512 bytes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
