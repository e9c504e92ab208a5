"""A model of a loop on tensor cores: what an iteration costs if nothing overlaps, and if everything does.

A quarter of a streaming multiprocessor ("partition") issues one instruction of one warp a cycle; its tensor core does
PEAK[arch] FLOP a cycle, and its special function unit 4 results a cycle (8 cycles for a warp's 32). Of a loop's body:

    tensor   FLOP of its matrix instructions / PEAK
    mufu     8 cycles for each MUFU (exp2, reciprocal) of a warp
    issue    one cycle for each instruction
    serial   tensor / (tensor + max(mufu, issue))     nothing runs while the tensor core does
    overlap  tensor / max(tensor, mufu, issue)        everything does

Where a block has more warps than partitions, each partition works for several. The serial share is a floor that good
kernels beat (published figures of hand-written kernels lie between the two): it ranks configurations, it predicts no
time. Sources of the constants: NVIDIA A100 and H100 white papers (tables of peak rates and clock), CUDA C++ Programming
Guide, "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from paracomm.kernels.static.compile import Binary
from paracomm.kernels.static.sass import parse

KIB = 1024
PARTITIONS = 4
REGISTERS = 65536
PEAK = {80: 2048 // PARTITIONS, 90: 4096 // PARTITIONS}
"""Dense 16-bit FLOP a cycle of one partition."""
SHARED_BLOCK = {80: 163 * KIB, 90: 227 * KIB}
"""Bytes that one block may have."""
SHARED_SM = {80: 164 * KIB, 90: 228 * KIB}
THREADS = 2048
MUFU_CYCLES = 8


@dataclass(frozen=True)
class Estimate:
    """Cycles of a partition for an iteration of the heaviest loop on tensor cores; shares of peak."""

    tensor: float
    mufu: float
    issue: float

    @property
    def serial(self) -> float:
        return self.tensor / (self.tensor + max(self.mufu, self.issue))

    @property
    def overlap(self) -> float:
        return self.tensor / max(self.tensor, self.mufu, self.issue)


def flop(instruction: str) -> float:
    """Of one warp; a warp group of four shares an HGMMA. TF32 counts double, since its peak is half."""
    found = re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)\S*", instruction)
    if found:
        return 2 * int(found[1]) * int(found[2]) * int(found[3]) / PARTITIONS * (2 if "TF32" in found[0] else 1)
    found = re.search(r"\bHMMA\.(\d+)\S*", instruction)
    if found:
        depth = {"16816": 16, "1688": 8, "1684": 4}.get(found[1])
        if depth is None:
            raise ValueError(f"an HMMA of unknown shape: {instruction}")
        return 2 * 16 * 8 * depth * (2 if "TF32" in found[0] else 1)
    return 0.0


def estimate(binary: Binary) -> Estimate | None:
    """Of the loop with the most FLOP, and of several such the one with the fewest instructions, which is that over full
    tiles: those at an edge look at positions as well. None without a loop on tensor cores."""
    # Warps that specialisation added only load.
    each = max(1, binary.case.warps // PARTITIONS)
    found = [
        Estimate(
            tensor=sum(map(flop, body)) * each / PEAK[binary.arch],
            mufu=sum("MUFU" in line for line in body) * MUFU_CYCLES * each,
            issue=len(body) * each,
        )
        for body in parse(binary.code).loops()
    ]
    return max((e for e in found if e.tensor), key=lambda e: (e.tensor, -e.issue), default=None)


def occupancy(binary: Binary) -> int:
    """Blocks that a multiprocessor holds at a time, by registers, shared memory and threads."""
    warps = binary.warps
    of_warp = -(-binary.registers * 32 // 256) * 256
    by_registers = REGISTERS // (of_warp * warps) if of_warp else 32
    by_shared = SHARED_SM[binary.arch] // (binary.shared + KIB)
    return min(by_registers, by_shared, THREADS // (32 * warps), 32)


def fits(binary: Binary) -> str | None:
    """Why it must not be shipped; None if it may."""
    if binary.stack:
        return f"{binary.stack} bytes of stack a thread: registers spill"
    if binary.shared > SHARED_BLOCK[binary.arch]:
        return f"{binary.shared} bytes of shared memory, sm_{binary.arch} has {SHARED_BLOCK[binary.arch]}"
    if not occupancy(binary):
        return "no block fits a multiprocessor"
    return None
