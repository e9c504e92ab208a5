"""Launches the kernels of decode_kernels.py. Known to decode.py only; it needs Triton."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from paracomm.kernels.attention_launch import LOG2E, padded
from paracomm.kernels.config import config
from paracomm.kernels.decode_kernels import decode_kernel, merge_kernel
from paracomm.kernels.launch import dtype_name, expect_launchable, last_contiguous
from paracomm.kernels.select import arch

TILES = 2
"""The least that a part has: less, and writing its result costs as much as reading its keys."""
PARTS = 128
"""The most of them, which merge reads in CHUNKs."""
CHUNK = 16
BLOCKS = 2
"""Programs that a multiprocessor should have to read at full speed."""

UNIT = 8
"""Elements that strides of a cache are multiples of, where it can be read 16 bytes at a time. Other caches are read
element by element, in smaller tiles, since a copy would cost more than reading."""


def processors(x: Tensor) -> int:
    """Multiprocessors of its GPU; interpreted, those of a small one."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.device.type == "cuda" else 8


def parts_of(tiles: int, programs: int, count: int) -> int:
    """Into how many parts `tiles` tiles of keys are divided, if each is read by `programs` programs, on `count`
    multiprocessors."""
    return max(1, min(tiles // TILES, triton.cdiv(BLOCKS * count, programs), PARTS))


def launch_decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    q, k, v = map(last_contiguous, (q, k, v))
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    lengths = None if lengths is None else lengths.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if not out.numel():
        return out, lse.fill_(-torch.inf)
    if not S:
        return out.zero_(), lse.fill_(-torch.inf)
    strides = [*k.stride()[:3], *v.stride()[:3]]
    even = all(stride % UNIT == 0 for stride in strides) and all(x.data_ptr() % 16 == 0 for x in (k, v))
    unit = UNIT if even else 1
    row = config("decode" if unit == UNIT else "decode_odd", arch(q), dtype_name(q), padded(K))
    BM, BN = row["BM"], row["BN"]
    blocks = triton.cdiv(H // G * T, BM)
    seen = S if window < 0 else min(S, window + T - 1 + BN)
    parts = parts_of(triton.cdiv(seen, BN), B * G * blocks, processors(q))
    results, sums = out, lse
    if parts > 1:
        results = q.new_empty(B, H, T, parts, K, dtype=torch.float32)
        sums = q.new_empty(B, H, T, parts, dtype=torch.float32)
    expect_launchable("decode", B, G)
    capped = softcap != 0.0
    scales = (1.0, softcap * LOG2E, scale / softcap) if capped else (scale * LOG2E, 1.0, 1.0)
    decode_kernel[(parts, B * G, blocks)](
        q, k, v, lengths, results, sums, *q.stride()[:3], *(stride // unit for stride in strides), H, T, S, window,
        *scales, R=H // G, K=K, D=padded(K), BM=BM, BN=BN, WINDOW=window > 0, CAPPED=capped, UNIT=unit,
        num_warps=row["warps"], num_stages=row["stages"],
    )  # fmt: skip
    if parts > 1:
        merge_kernel[(B * H * T,)](
            results, sums, out, lse, parts, K=K, D=padded(K), P=triton.next_power_of_2(parts), BP=CHUNK, num_warps=4
        )
    return out, lse
