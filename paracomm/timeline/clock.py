"""One time for ranks whose clocks know nothing of each other.

What a rank sends was read before it is received. From an exchange of all ranks, rank r learns two such orders:

    rank 0   before_0 -------- exchange -------- after_0          before_0 <= after_r  on one clock
    rank r         before_r -- exchange ---- after_r              before_r <= after_0

and so bounds of what it has to add to its own clock: before_0 - after_r and after_0 - before_r. The narrowest bounds of
several exchanges hold all of them; their middle is off by half their distance at most, however long a message took
(compare Cristian, "Probabilistic clock synchronization", 1989, which halves one round trip). How clocks drift apart
during a record is not in the bound.
"""

from __future__ import annotations

import struct
import time
from typing import Any, NamedTuple

ROUNDS = 12
_FORM = struct.Struct("<4q")


class Clock(NamedTuple):
    """Of one rank, in nanoseconds.

    ahead_ns: rank 0's clock minus this rank's. error_ns: by how much that may be wrong.
    unix_ns: the wall clock of rank 0 minus rank 0's clock. own_unix_ns: the same of this rank.
    began_ns: on rank 0's clock; equal on all ranks of a record.
    """

    ahead_ns: int
    error_ns: int
    unix_ns: int
    own_unix_ns: int
    began_ns: int


def now() -> int:
    """CLOCK_MONOTONIC, nanoseconds: equal on all processes of a host, and the core's std::chrono::steady_clock."""
    return time.perf_counter_ns()


def align(comm: Any) -> Clock:
    """This rank's clock beside rank 0's; collective, ROUNDS + 1 exchanges. comm None: of one rank by itself.

    Ranks of one host share a clock, and have no error.
    """
    own_unix = time.time_ns() - now()
    if comm is None or comm.world_size == 1:
        return Clock(0, 0, own_unix, own_unix, now())
    lowest, highest = -(1 << 62), 1 << 62
    unix = began = before = after = 0
    for turn in range(ROUNDS + 1):
        last_before, last_after = before, after
        before = now()
        blobs = comm.exchange(_FORM.pack(before, last_after, own_unix, began))
        after = now()
        first_before, first_last_after, unix, began_there = _FORM.unpack(blobs[0])
        lowest = max(lowest, first_before - after)
        if turn:
            highest = min(highest, first_last_after - last_before)
        began = began_there or first_before
    if comm.host_indices[comm.rank] == comm.host_indices[0]:
        return Clock(0, 0, unix, own_unix, began)
    return Clock((lowest + highest) // 2, (highest - lowest + 1) // 2, unix, own_unix, began)
