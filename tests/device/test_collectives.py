"""Every collective on emulated GPUs: the bits of the host, for all algorithms, dtypes, reductions and places."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from paracomm import InvalidArgument
from paracomm.schedule.registry import cases as schedule_cases
from tests.comm import test_collectives, test_work
from tests.comm.cases import DTYPES, Case, cover, cross, digests, ops_of
from tests.device.emulation import device_digests, emulate, run_emulated
from tests.ranks import Rank, run_ranks

LARGE = 3001
WINDOW = 4096  # of the host: small, so that its buffers are cut as well


def check_bits(world_size: int, cases: tuple[Case, ...]) -> None:
    found = run_emulated(world_size, device_digests, list(cases))
    for rank, (ours, theirs) in enumerate(zip(found, digests("shm", world_size, cases, WINDOW), strict=True)):
        differ = [str(case) for case, a, b in zip(cases, ours, theirs, strict=True) if a != b]
        assert not differ, f"rank {rank}: bits differ from the host's: {differ[:5]}, {len(differ)} in all"


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_every_algorithm(world_size: int) -> None:
    """Every algorithm x count (0, 1, around the number of ranks, odd ones), over rotating dtypes, operators, places."""
    check_bits(world_size, tuple(cover(world_size, LARGE, per_count=1)))


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_every_dtype_and_reduction(world_size: int) -> None:
    cases = [
        case
        for case in cross(world_size, (67,))
        if case.root in (None, world_size - 1) and not case.arena and case.name in ("direct", "one_shot", "ordered")
    ]
    check_bits(world_size, tuple(cases))


def test_megabytes() -> None:
    """Tiles for all channels, messages around the rings' ends, and no kernel without messages."""
    base = Case("all_reduce", "ring", None, (), 700_001, "float32", mode="in_place")
    check_bits(2, (base, replace(base, name="ordered", dtype="bfloat16"), replace(base, name="direct", mode="out")))


def defaults(comm: Any) -> None:
    """What is chosen on a device adds in the order of ranks, whatever the size."""
    n = comm.world_size
    for count in (1, 257, 40_001, 200_003):
        inputs = [torch.randn(count, generator=torch.Generator().manual_seed(r)) for r in range(n)]
        want = inputs[0].clone()
        for x in inputs[1:]:
            want += x
        assert torch.equal(comm.all_reduce(inputs[comm.rank].clone()), want), count
        rows = [count // n + (r < count % n) for r in range(n)]
        assert torch.equal(comm.reduce_scatter_v(inputs[comm.rank], rows), want.split(rows)[comm.rank]), count
    comm.use_table({"all_reduce": [[2**62, "ring", {}]]}, on_device=True)
    x = torch.full((1000,), comm.rank + 1.0)
    assert (comm.all_reduce(x) == n * (n + 1) / 2).all()
    assert ("all_reduce", "ring") in comm._algorithms.values()


def test_defaults() -> None:
    run_emulated(4, defaults)


def sizes_in_turn(comm: Any) -> None:
    """Calls that follow each other at once, of sizes whose blocks hold different elements: a slow rank still reads
    what a fast one's later call would overwrite."""
    n = comm.world_size
    for algorithm in ("one_shot", "ordered"):
        works = []
        for turn in range(60):
            x = torch.full(((400, 9001, 2500)[turn % 3],), turn + comm.rank, dtype=torch.int32)
            works.append((turn, comm.all_reduce(x, algorithm=algorithm, async_op=True)))
        for turn, work in works:
            assert (work.wait() == n * turn + n * (n - 1) // 2).all(), (algorithm, turn)


def test_sizes_in_turn() -> None:
    run_emulated(4, sizes_in_turn)


@pytest.mark.parametrize(
    "check",
    [
        test_collectives.kinds_of_arrays, test_collectives.dlpack, test_collectives.strides,
        test_collectives.blocks_of_any_size, test_work.several_in_flight, test_work.nobody_waits,
        test_work.waited_for_by_other_threads, test_work.dropped, test_work.in_order_with_others,
    ],
)  # fmt: skip
def test_as_on_the_host(check: Any) -> None:
    """What tests/comm says of arrays and asynchronous operations holds here, too."""
    run_emulated(3, check)


def blocks_of_nothing(comm: Any) -> None:
    rows = [0, 5, 0, 7][: comm.world_size]
    x = torch.full((sum(rows), 2), comm.rank + 1.0)
    mine = comm.reduce_scatter_v(x, rows)
    assert mine.shape == (rows[comm.rank], 2) and (mine == comm.world_size * (comm.world_size + 1) / 2).all()
    assert comm.all_gather_v(mine, rows=rows).shape == x.shape
    for dtype in (torch.float32, torch.bool):
        empty = torch.empty(0, dtype=dtype)
        assert comm.all_reduce(empty) is empty and comm.all_gather(empty).shape == (comm.world_size, 0)
        assert comm.broadcast(empty, 1) is empty and comm.reduce(empty, 1) is empty
    comm.barrier()


def test_blocks_of_nothing() -> None:
    run_emulated(4, blocks_of_nothing)


def parts(comm: Any) -> None:
    """Devices of their own, beside the whole's; and messages between two ranks."""
    n, r = comm.world_size, comm.rank
    with comm.split(r % 2) as half:
        for step in range(3):
            assert half.all_reduce(np.array([1 << r]))[0] == sum(1 << k for k in range(n) if k % 2 == r % 2)
            assert comm.all_reduce(np.array([step]))[0] == n * step
        assert half.device is not comm.device and half.device.kind == "emulated"
    sent = comm.send(np.arange(5) + r, (r + 1) % n, async_op=True)
    assert comm.recv(np.empty(5, np.int64), (r - 1) % n).tolist() == [(r - 1) % n + i for i in range(5)]
    sent.wait()
    with comm.split(0) as twin:
        assert twin.exchange(bytes([r])) == [bytes([k]) for k in range(n)]
        assert twin.device is None
        assert twin.use_device() is twin.use_device() is twin.device


def test_parts() -> None:
    run_emulated(4, parts)


def two_hosts(rank: Rank) -> None:
    """Between hosts emulated GPUs' memory is the host's, so its transports carry it."""
    emulate()
    with rank.connect(host_id="ab"[rank.rank // 2], timeout_s=30) as comm:
        assert comm.use_device() is None
        assert comm.all_reduce(torch.ones(1000))[0] == 4
        with comm.split(rank.rank // 2) as within:
            assert within.all_reduce(torch.ones(1000))[0] == 2 and within.device is not None
        assert comm.device is None


def test_two_hosts() -> None:
    run_ranks(4, two_hosts)


def buckets(comm: Any) -> None:
    device = comm.use_device()
    shapes = [(3, 5), (), (70_001,), (0,), (17,)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        tensors = [torch.randn(shape).to(dtype) for shape in shapes]
        bucket = device.bucket(tensors)
        for flat_dtype in (torch.float32, torch.bfloat16, dtype):
            flat = torch.empty(bucket.count, dtype=flat_dtype)
            bucket.pack(flat, 0.5)
            assert torch.equal(flat, (torch.cat([t.flatten() for t in tensors]).double() * 0.5).to(flat_dtype)), dtype
            comm.all_reduce(flat)
            bucket.unpack(flat, 2.0)
            want = (flat.double() * 2).to(dtype).split([t.numel() for t in tensors])
            assert all(torch.equal(t.flatten(), w) for t, w in zip(tensors, want, strict=True))
    words = [torch.arange(5), torch.arange(7)]
    bucket = device.bucket(words)
    flat = np.empty(12, np.int64)
    bucket.pack(flat)
    assert flat.tolist() == [*range(5), *range(7)]
    for wrong, why in ((flat[:11], "expected 12"), (np.empty(24, np.int64)[::2], "in one piece")):
        with pytest.raises(InvalidArgument, match=why):
            bucket.pack(wrong)
    with pytest.raises(InvalidArgument, match="only floating-point types"):
        bucket.unpack(flat, 0.5)
    with pytest.raises(InvalidArgument, match="of one dtype"):
        device.bucket([torch.ones(2), torch.ones(2).double()])
    with pytest.raises(InvalidArgument, match="at least one"):
        device.bucket([])


def test_buckets() -> None:
    run_emulated(2, buckets)


def test_all_of_it_is_covered() -> None:
    """The cases walk the registry, so that a new algorithm is among them."""
    for world_size in (2, 4):
        walked = {(case.collective, case.name) for case in cover(world_size, LARGE, per_count=1)}
        assert walked == {(collective, name) for collective, name, _, _ in schedule_cases(world_size)}
    assert {case.dtype for case in cover(4, LARGE, per_count=1)} == set(DTYPES)
    assert set(ops_of("bool")) < set(ops_of("int32"))
