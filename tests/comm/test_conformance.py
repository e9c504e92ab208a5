"""Every algorithm gives the right result, and the same bits, whatever carries it."""

from __future__ import annotations

import pytest

from tests.comm.cases import TRANSPORTS, Case, cover, cross, digests

WORLDS = (1, 2, 3, 4, 5, 7, 8)
# Small windows cut small buffers into many tiles.
LARGE = 10007


def window_bytes(world_size: int) -> int:
    return 4096 * world_size


def check(transport: str, world_size: int, cases: tuple[Case, ...], window: int) -> None:
    found = digests(transport, world_size, cases, window)
    for i, case in enumerate(cases):
        if case.collective == "all_reduce":
            assert len({of_rank[i] for of_rank in found}) == 1, f"{case}: ranks hold different bits"
    if transport == "local":
        return
    for rank, (ours, theirs) in enumerate(zip(found, digests("local", world_size, cases, window), strict=True)):
        differ = [str(case) for case, a, b in zip(cases, ours, theirs, strict=True) if a != b]
        assert not differ, f"rank {rank}: bits differ between {transport} and local: {differ[:5]}, {len(differ)} in all"


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_algorithms(transport: str, world_size: int) -> None:
    """Every algorithm x count, over rotating dtypes, reductions, places and memories."""
    check(transport, world_size, tuple(cover(world_size, LARGE, per_count=2)), window_bytes(world_size))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_dtype_and_reduction(transport: str) -> None:
    cases = [
        case
        for case in cross(3, (65,))
        if case.root in (None, 2) and case.mode == ("in_place" if case.collective == "broadcast" else "out")
    ]
    check(transport, 3, tuple(case for case in cases if case.arena == (case.op == "sum")), window_bytes(3))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_megabytes(transport: str) -> None:
    """The window that users have, and buffers of several of them."""
    check(transport, 4, tuple(case for case in cover(4, 700_001, per_count=1) if case.count > 100_000), 0)


@pytest.mark.parametrize(
    "world_size",
    [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3, 4, 5)),
     pytest.param(8, marks=pytest.mark.exhaustive)],
)  # fmt: skip
@pytest.mark.parametrize("transport", ["shm", "mixed"])  # held to the bits of "local"; "mixed" has TCP too
def test_everything(transport: str, world_size: int) -> None:
    """All of it, crossed."""
    counts = (0, 1, world_size + 1, 1031) if world_size <= 4 else (1, 1031)
    cases = tuple(cross(world_size, counts))
    check(transport, world_size, cases, window_bytes(world_size))
