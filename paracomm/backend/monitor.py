"""The monitored barrier: through the Store, so that a rank that does not come leaves the communicator as it was."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from paracomm.comm import Communicator
from paracomm.errors import Error, Timeout


def monitored_barrier(store: Any, comm: Communicator, number: int, limit_s: float, wait_all_ranks: bool) -> None:
    """Rank 0 waits for every rank's key, the others for rank 0's verdict. `number` counts the calls on this rank.

    Raises Timeout: on rank 0 with the first rank that did not come (or all of them, if `wait_all_ranks`), on the
    others because rank 0 did not come, or because some other rank did not.
    """
    prefix, rank = f"paracomm/monitored/{number}", comm.rank
    deadline = time.monotonic() + limit_s
    if rank != 0:
        store.set(f"{prefix}/{rank}", b"here")
        if not _came(store, f"{prefix}/verdict", deadline + limit_s):
            raise Timeout(_failed_to_hear(rank, "rank 0 did not come in time"))
        verdict = bytes(store.get(f"{prefix}/verdict")).decode()
        if verdict != "passed":
            raise Error(_failed_to_hear(rank, verdict))
        return
    if limit_s <= 0:
        raise Timeout(f"Rank 0 timed out in monitoredBarrier after {limit_s * 1000:.0f} ms")
    missing: list[int] = []
    for peer in range(1, comm.world_size):
        if _came(store, f"{prefix}/{peer}", deadline):
            continue
        missing.append(peer)
        if not wait_all_ranks:
            break
    if not missing:
        store.set(f"{prefix}/verdict", b"passed")
        return
    who = f"Rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
    hosts = ", ".join(sorted({comm.hosts[peer] for peer in missing}))
    text = f"{who} failed to pass monitoredBarrier in {limit_s * 1000:.0f} ms (host {hosts})"
    store.set(f"{prefix}/verdict", text.encode())
    raise Timeout(text)


def _failed_to_hear(rank: int, why: str) -> str:
    return (
        f"Rank {rank} successfully reached monitoredBarrier, but received errors while waiting for send/recv from "
        f"rank 0: {why}"
    )


def _came(store: Any, key: str, deadline: float) -> bool:
    try:
        store.wait([key], timedelta(seconds=max(0.001, deadline - time.monotonic())))
    except RuntimeError:  # how a Store says that the time is up
        return False
    return True
