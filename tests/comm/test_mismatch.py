"""Ranks that do different things find out, all of them, and are told what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from paracomm.errors import Error
from tests.comm.cases import TRANSPORTS, connect
from tests.ranks import Rank, run_ranks

WORLD = 3
# Nobody waits that long unless a mismatch goes unnoticed; the error is a Timeout then.
PATIENCE_S = 15.0

Call = Callable[[Any], Any]


def ones(count: int = 100, dtype: str = "float32") -> np.ndarray:
    return np.ones(count, dtype)


# name -> what every rank but the last calls, what the last one calls, words that at least one error holds
MISMATCHES: dict[str, tuple[Call, Call, tuple[str, ...]]] = {
    "operation": (
        lambda c: c.all_reduce(ones()),
        lambda c: c.all_gather(ones()),
        ("all_reduce", "all_gather"),
    ),
    "operation, large": (
        lambda c: c.all_reduce(ones(1_000_000)),
        lambda c: c.broadcast(ones(1_000_000), 1),
        ("all_reduce", "broadcast"),
    ),
    "barrier": (lambda c: c.barrier(), lambda c: c.all_reduce(ones()), ("barrier", "all_reduce")),
    "dtype": (
        lambda c: c.all_reduce(ones()),
        lambda c: c.all_reduce(ones(dtype="int32")),
        ("dtype", "float32", "int32"),
    ),
    "count": (lambda c: c.all_reduce(ones(100)), lambda c: c.all_reduce(ones(101)), ("count", "100", "101")),
    "count, large": (
        lambda c: c.all_reduce(ones(1_000_000)),
        lambda c: c.all_reduce(ones(900_000)),
        ("count", "1000000", "900000"),
    ),
    "no elements": (lambda c: c.all_reduce(ones(0)), lambda c: c.all_reduce(ones(1)), ("count", "0", "1")),
    "reduction": (
        lambda c: c.all_reduce(ones(), "max"),
        lambda c: c.all_reduce(ones(), "min"),
        ("reduction", "max", "min"),
    ),
    "root of broadcast": (lambda c: c.broadcast(ones(), 0), lambda c: c.broadcast(ones(), 2), ("root", "0", "2")),
    "root of reduce": (lambda c: c.reduce(ones(), 0), lambda c: c.reduce(ones(), 2), ("root", "0", "2")),
    "root of gather": (lambda c: c.gather(ones(), 1), lambda c: c.gather(ones(), 2), ("root", "1", "2")),
    "root of scatter": (
        lambda c: c.scatter(ones(300), 0, out=ones()),
        lambda c: c.scatter(ones(300), 2, out=ones()),
        ("root", "0", "2"),
    ),
    "order": (
        lambda c: (c.all_reduce(ones()), c.broadcast(ones())),
        lambda c: (c.broadcast(ones()), c.all_reduce(ones())),
        ("all_reduce", "broadcast"),
    ),
    "one call more": (
        lambda c: None,
        lambda c: c.all_reduce(ones()),
        ("barrier", "all_reduce"),
    ),
    "algorithm": (
        lambda c: c.all_reduce(ones(), algorithm="ring"),
        lambda c: c.all_reduce(ones(), algorithm="direct"),
        ("schedule", "different algorithms"),
    ),
    "rows of all_gather_v": (
        lambda c: c.all_gather_v(ones(5 + c.rank), rows=[5, 6, 7]),
        lambda c: c.all_gather_v(ones(8), rows=[5, 6, 8]),
        ("count",),
    ),
    "rows of all_to_all_v": (
        lambda c: c.all_to_all_v(ones(6), [2, 2, 2], [2, 2, 2]),
        lambda c: c.all_to_all_v(ones(7), [3, 2, 2], [2, 2, 2]),
        ("bytes", "8", "12"),
    ),
    "asynchronous": (
        lambda c: c.all_reduce(ones(), async_op=True).wait(),
        lambda c: c.all_reduce(ones(50), async_op=True).wait(),
        ("count", "100", "50"),
    ),
}


def provoke(rank: Rank, transport: str) -> dict[str, tuple[str, str]]:
    """{name: (exception type, text)} of every mismatch, each on a communicator of its own, with a barrier after it: a
    rank whose part needs no answer learns of it at the next call at the latest."""
    found = {}
    for name, (call, other_call, _) in MISMATCHES.items():
        with connect(rank, transport, timeout_s=PATIENCE_S) as comm:
            try:
                (call if rank.rank < rank.world_size - 1 else other_call)(comm)
                comm.barrier()
                found[name] = ("none", "")
            except Error as error:
                found[name] = (type(error).__name__, str(error))
            rank.exchange(b"")  # nobody leaves before all have seen it
    return found


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_mismatch_is_raised_on_every_rank(transport: str) -> None:
    found = run_ranks(WORLD, provoke, transport, threads=transport == "local")
    wrong = [
        f"{name}: rank {rank}: {kind}: {text}"
        for rank, of_rank in enumerate(found)
        for name, (kind, text) in of_rank.items()
        if kind != "Mismatch"
    ]
    assert not wrong, "\n".join(wrong)
    for name, (_, _, words) in MISMATCHES.items():
        texts = [of_rank[name][1] for of_rank in found]
        assert any(all(word in text for word in words) for text in texts), f"{name}: {texts}"
        assert all("rank" in text for text in texts), f"{name}: {texts}"
