"""Ranks, processes of this host, whose communicators run on emulated GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from tests.comm.cases import Case, digests_of
from tests.ranks import Rank, run_ranks

TIMEOUT_S = 30.0
"""Of an operation: longer than any takes here."""


def emulate() -> None:
    """From now on this process's communicators run on emulated GPUs."""
    os.environ["PARACOMM_DEVICE"] = "emulated"


def run_emulated(world_size: int, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """function(communicator, *args) on every rank, a process each."""
    return run_ranks(world_size, _rank, function, args, options, timeout_s=120)


def _rank(rank: Rank, function: Callable[..., Any], args: tuple, options: dict) -> Any:
    emulate()
    with rank.connect(**{"timeout_s": TIMEOUT_S, **options}) as comm:
        found = function(comm, *args)
        assert comm.device is None or comm.device.kind == "emulated"
        return found


OWN_BYTES = 200
"""What an operation tells its peers over the host's transports, at most: how long blocks are."""


def device_digests(comm: Any, cases: list[Case]) -> list[bytes]:
    """digests_of, all of it on the device."""
    comm.use_device()
    peer = (comm.rank + 1) % comm.world_size
    before = comm.bytes_sent(peer)
    found = digests_of(comm, cases)
    assert comm.bytes_sent(peer) < before + OWN_BYTES * len(cases)
    return found
