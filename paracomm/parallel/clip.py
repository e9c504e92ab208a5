"""The global norm of the gradients, the same bits in every layout, and clipping by it.

A sum of floats depends on its order, and every layout has another one. So squares are rounded to a grid first, on which
sums are exact and therefore associative (pre-rounding: Demmel and Nguyen, "Parallel reproducible summation", IEEE
Transactions on Computers 2015). With the largest |g| below 2^e over all ranks:

    s = (g / 2^e)^2                  in [0, 1), float64
    high = round(s * 2^BITS)         a chunk of these adds up to less than 2^53: exact in float64, in any order
    low  = round((s * 2^BITS - high) * 2^BITS)
    norm = 2^e * sqrt((sum(high) + sum(low) / 2^BITS) / 2^BITS)      sums in Python's integers

Each rank takes a part of what it holds, so that every element counts once. One all_reduce of the maximum, which shows
what is not finite as well, and one of the two sums, as pieces of 31 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from paracomm.errors import Error, InvalidArgument
from paracomm.parallel.bucket import Bucket

CHUNK = 1 << 14
"""Elements whose float64 scratch stays in the second cache."""
BITS = 38
"""2^38 times a chunk's 2^14 elements stays below 2^53."""
PIECE = 31
NAME_BYTES = 256


def counted(buckets: Sequence[Bucket], first_of: Any) -> Iterator[tuple[Bucket, int, Tensor]]:
    """(bucket, member, elements) of what this rank counts: its block, of what no other rank of tp counts.

    Args:
        first_of: first_of(axis) is whether this rank is the first on an axis of the mesh.
    """
    for bucket in buckets:
        if bucket.gradient is None:
            raise Error("clip_() came before the first finish(): there are no reduced gradients yet")
        there, gradient = bucket.take_up(), bucket.gradient
        whole_on_tp = {axis for axis in ("tp",) if axis not in getattr(bucket.members[0], "partial", ())}
        for slot, (offset, member) in enumerate(zip(bucket.offsets, bucket.members, strict=True)):
            if hasattr(member, "copy_of") or not there[slot]:  # another stage counts it, or nobody
                continue
            cut_over = getattr(getattr(member, "shard", None), "axis", None)
            if not all(first_of(axis) for axis in whole_on_tp - {cut_over}):
                continue
            start, stop = max(offset, bucket.block.start), min(offset + member.numel(), bucket.block.stop)
            if start < stop:
                yield bucket, slot, gradient[start - bucket.owned.start : stop - bucket.owned.start]


@torch.no_grad()
def global_norm(buckets: Sequence[Bucket], comm: Any, first_of: Any) -> float:
    """The 2-norm of all gradients over all ranks of `comm`, the whole mesh; equal bits on every rank.

    Raises Error, on every rank, for a gradient that is not finite, naming the parameter and the rank that has it.
    """
    mine = list(counted(buckets, first_of))
    tops = [_top(part) for _, _, part in mine]
    finite = [top for top in tops if math.isfinite(top)]
    largest = torch.tensor([max(finite, default=0.0), len(finite) < len(tops)], dtype=torch.float64)
    comm.all_reduce(largest, op="max")
    if largest[1]:
        bad = next(((b, slot) for (b, slot, _), top in zip(mine, tops, strict=True) if not math.isfinite(top)), None)
        raise Error(_who(comm, "" if bad is None else bad[0].names[bad[1]]))
    top = float(largest[0])
    if top == 0.0:
        return 0.0
    exponent = math.frexp(top)[1]
    pieces = torch.tensor(_pieces(*_sums([part for _, _, part in mine], exponent)), dtype=torch.int64)
    comm.all_reduce(pieces, op="sum")
    high, low = (sum(piece << (PIECE * k) for k, piece in enumerate(half)) for half in pieces.view(2, -1).tolist())
    # Division of Python's integers rounds once.
    return math.ldexp(math.sqrt(((high << BITS) + low) / (1 << 2 * BITS)), exponent)


def _top(part: Tensor) -> float:
    """The largest magnitude; NaN if there is one. Far faster than vector_norm(part, inf)."""
    low, high = (float(edge) for edge in torch.aminmax(part))
    return math.nan if math.isnan(low) else max(-low, high)


def _sums(parts: Sequence[Tensor], exponent: int) -> tuple[int, int]:
    """The exact sums of `high` and of `low`, see the head of this file."""
    high, low, shift = 0, 0, -exponent
    device = parts[0].device if parts else torch.device("cpu")
    s, h = (torch.empty(CHUNK, dtype=torch.float64, device=device) for _ in range(2))
    for part in parts:
        for chunk in part.split(CHUNK):
            a, b = s[: len(chunk)], h[: len(chunk)]
            a.copy_(chunk)
            if abs(exponent) > 200:  # squares would be out of range
                a.mul_(2.0 ** (shift // 2)).mul_(2.0 ** (shift - shift // 2)).square_().mul_(2.0**BITS)
            else:
                a.square_().mul_(2.0 ** (BITS + 2 * shift))
            torch.round(a, out=b)
            high += int(b.sum())
            low += int(a.sub_(b).mul_(2.0**BITS).round_().sum())
    return high, low


def _pieces(*sums: int) -> list[int]:
    """Each sum as three integers that 2^31 ranks can add without overflow; the last one has the sign."""
    mask = (1 << PIECE) - 1
    return [piece for s in sums for piece in (s & mask, (s >> PIECE) & mask, s >> 2 * PIECE)]


def _who(comm: Any, name: str) -> str:
    mine = torch.zeros(NAME_BYTES, dtype=torch.uint8)
    encoded = name.encode()[:NAME_BYTES]
    mine[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8) if encoded else mine[:0]
    everyone = comm.all_gather(mine).view(comm.world_size, NAME_BYTES)
    found = [(rank, bytes(row.tolist()).rstrip(b"\0").decode(errors="replace")) for rank, row in enumerate(everyone)]
    rank, name = next((rank, name) for rank, name in found if name)
    return f"the gradient of '{name}' is not finite, rank {rank} of {comm.world_size} found"


@torch.no_grad()
def scale(buckets: Sequence[Bucket], norm: float, max_norm: float) -> None:
    """Scales what this rank owns so that the global norm is at most `max_norm`, as torch's clip_grad_norm_ does."""
    if not max_norm > 0:
        raise InvalidArgument(f"clip_: max_norm is {max_norm}, expected more than 0")
    factor = max_norm / (norm + 1e-6)
    if factor < 1.0:
        for bucket in buckets:
            assert bucket.gradient is not None
            bucket.gradient.mul_(factor)
            if bucket.stage == 0 and bucket.data is not None and bucket.dtype != bucket.master_dtype:
                bucket.data.copy_(bucket.gradient)
