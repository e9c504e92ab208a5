"""The counter-based random words of paracomm.parallel.rng, for kernels.

Word `index` of a (seed, stream, step) is number index & 3 of Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As
Easy as 1, 2, 3", SC'11) with counter (index >> 2 low, index >> 2 high, stream, step) and key seed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words_at(index, seed, stream, step):
    """uint32 words of the shape of `index` (int64, any values): a Philox block for each element."""
    block = index.to(tl.uint64) >> 2
    lane = (index & 3).to(tl.int32)
    w0, w1, w2, w3 = _block(block, seed, stream, step)
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def words_in_runs(base, start, COUNT: tl.constexpr, seed, stream, step):
    """uint32 words [M, COUNT] of base[m] + start + 0..COUNT-1; base + start are multiples of 4: a block for four."""
    index = base[:, None] + (start + 4 * tl.arange(0, COUNT // 4))[None, :]
    block = index.to(tl.uint64) >> 2
    w0, w1, w2, w3 = _block(block, seed, stream, step)
    even, odd = tl.join(w0, w2), tl.join(w1, w3)
    return tl.reshape(tl.join(even, odd), (base.shape[0], COUNT))


@triton.jit
def _block(block, seed, stream, step):
    """The four words of each block."""
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, _same(block, stream), _same(block, step))


@triton.jit
def _same(like, value):
    return tl.zeros_like(like).to(tl.uint32) + value.to(tl.uint32)


@triton.jit
def keep_mask_kernel(BASE, OFFSETS, OUT, count, width, seed, stream, step, threshold, BLOCK: tl.constexpr):
    """OUT[i, j] = word(BASE[i] + OFFSETS[j]) >= threshold, flattened [count]."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    base = tl.load(BASE + place // width, mask=inside, other=0)
    offset = tl.load(OFFSETS + place % width, mask=inside, other=0)
    words = words_at(base + offset, seed, stream, step)
    tl.store(OUT + place, words.to(tl.int64) >= threshold, mask=inside)
