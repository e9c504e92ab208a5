"""Every collective of torch.distributed on this backend: synchronous and asynchronous, dtypes, strides, lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Rank, run_ranks

import paracomm

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.complex64, torch.complex128,
]  # fmt: skip
MOVED = [*DTYPES, torch.bool, torch.float8_e4m3fn]


def each_call(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """The call, asynchronously and waited for."""
    work = call(*args, async_op=True, **kwargs)
    work.wait()
    assert work.is_completed() and work.is_success() and work.exception() is None


def rank_tensor(rank: int, dtype: torch.dtype, count: int = 6) -> torch.Tensor:
    values = (torch.arange(count) + rank) % 3 + 1
    return values.bool() if dtype == torch.bool else values.to(dtype)


def equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    return bool((x.float() == y.float()).all()) if x.dtype == torch.float8_e4m3fn else torch.equal(x, y)


def variants(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor as it is, and with its elements far apart."""
    yield x.clone()
    wide = torch.zeros(len(x), 3, dtype=torch.float32).to(x.dtype)
    wide[:, 1] = x
    yield wide[:, 1]


def reductions(rank: int, world_size: int) -> None:
    dist.init_process_group("paracomm")
    ops: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
        dist.ReduceOp.SUM: lambda s: s.sum(0, dtype=s.dtype),
        dist.ReduceOp.PRODUCT: lambda s: s.prod(0, dtype=s.dtype),
        dist.ReduceOp.MIN: lambda s: s.amin(0),
        dist.ReduceOp.MAX: lambda s: s.amax(0),
    }
    for dtype in DTYPES:
        everybodys = torch.stack([rank_tensor(r, dtype) for r in range(world_size)])
        for op, expected in ops.items():
            if dtype.is_complex and op != dist.ReduceOp.SUM:
                continue
            want = expected(everybodys)
            for x in variants(everybodys[rank]):
                dist.all_reduce(x, op)
                assert torch.equal(x, want), (dtype, op)
            for x in variants(everybodys[rank]):
                each_call(dist.all_reduce, x, op)
                assert torch.equal(x, want), (dtype, op)
            x = everybodys[rank].clone()
            dist.reduce(x, 1, op)
            assert torch.equal(x, want) or rank != 1
            block, whole = torch.zeros(6, dtype=dtype), torch.cat([everybodys[rank]] * world_size)
            dist.reduce_scatter_tensor(block, whole, op)
            assert torch.equal(block, want)
            each_call(dist.reduce_scatter, block.zero_(), list(whole.split(6)), op)
            assert torch.equal(block, want)
    x = torch.tensor([1.0, 2.0]) * (rank + 1)
    dist.all_reduce(x, dist.ReduceOp.AVG)
    assert torch.equal(x, torch.tensor([1.0, 2.0]) * (world_size + 1) / 2)
    for op, want_bits in ((dist.ReduceOp.BAND, 0b100), (dist.ReduceOp.BOR, 0b111), (dist.ReduceOp.BXOR, 0b011)):
        bits = torch.tensor([0b101 if rank == 0 else 0b110])
        dist.all_reduce(bits, op)
        assert bits.item() == want_bits or world_size > 2
    for bad in (dist.ReduceOp.MIN, dist.ReduceOp.BAND):
        with pytest.raises(ValueError):
            dist.all_reduce(torch.ones(2, dtype=torch.complex64), bad)
    dist.destroy_process_group()


def movements(rank: int, world_size: int) -> None:
    dist.init_process_group("paracomm")
    for dtype in MOVED:
        everybodys = [rank_tensor(r, dtype) for r in range(world_size)]
        for call in (lambda f, *a, **k: f(*a, **k), each_call):
            for x in variants(everybodys[rank]):
                call(dist.broadcast, x, 1)
                assert equal(x, everybodys[1])
            for mine in variants(everybodys[rank]):
                outs = [next(variants(torch.zeros(6).to(dtype))) for _ in range(world_size)]
                call(dist.all_gather, outs, mine)
                assert all(map(equal, outs, everybodys)), dtype
                whole = torch.zeros(6 * world_size).to(dtype)
                call(dist.all_gather_into_tensor, whole, mine)
                assert equal(whole, torch.cat([e.float() for e in everybodys]).to(dtype) if dtype == MOVED[-1]
                             else torch.cat(everybodys))  # fmt: skip
                outs = list(torch.zeros(6 * world_size).to(dtype).split(6))
                call(dist.gather, mine, outs if rank == 0 else None, 0)
                assert rank != 0 or all(map(equal, outs, everybodys))
                out = torch.zeros(6).to(dtype)
                call(dist.scatter, out, everybodys if rank == 1 else None, 1)
                assert equal(out, everybodys[rank])
                outs = list(torch.zeros(6, world_size).to(dtype).t().contiguous())
                call(dist.all_to_all, outs, [mine] * world_size)
                assert all(map(equal, outs, everybodys))
    dist.destroy_process_group()


def uneven(rank: int, world_size: int) -> None:
    dist.init_process_group("paracomm")
    rows = [3 * r + 1 for r in range(world_size)]
    outs = [torch.zeros(n, 2) for n in rows]
    dist.all_gather(outs, torch.full((rows[rank], 2), float(rank)))
    assert all((out == r).all() for r, out in enumerate(outs))
    block = torch.zeros(rows[rank], 2)
    dist.reduce_scatter(block, [torch.full((n, 2), float(rank + 1)) for n in rows])
    assert (block == sum(range(1, world_size + 1))).all()
    # Rank r sends s + 1 rows to rank s, and nothing to itself but where r == s.
    sends = [peer + 1 for peer in range(world_size)]
    source = torch.cat([torch.full((n, 2), float(10 * rank + peer)) for peer, n in enumerate(sends)])
    out = torch.zeros((rank + 1) * world_size, 2)
    for call in (lambda f, *a: f(*a), each_call):
        call(dist.all_to_all_single, out.zero_(), source, [rank + 1] * world_size, sends)
        assert all((part == 10 * peer + rank).all() for peer, part in enumerate(out.split(rank + 1)))
    empty = [0] * world_size
    dist.all_to_all_single(torch.zeros(0, 2), torch.zeros(0, 2), empty, empty)
    equal_blocks = torch.arange(4.0 * world_size) + 100 * rank
    out = torch.zeros(4 * world_size)
    dist.all_to_all_single(out, equal_blocks)
    assert torch.equal(out, torch.cat([torch.arange(4.0) + 4 * rank + 100 * peer for peer in range(world_size)]))
    with pytest.raises(ValueError, match="splits"):
        dist.all_to_all_single(out, equal_blocks, [1] * world_size, [1] * world_size)
    dist.destroy_process_group()


def coalesced(rank: int, world_size: int) -> None:
    dist.init_process_group("paracomm")
    total = sum(range(1, world_size + 1))
    xs = [torch.full((n,), float(rank + 1)) for n in (1, 5, 0, 3)]
    with dist._coalescing_manager():
        for x in xs:
            dist.all_reduce(x)
    assert all((x == total).all() for x in xs)
    outs, ins = [torch.zeros(world_size, 2), torch.zeros(3 * world_size)], [torch.full((2,), 1.0 * rank), torch.ones(3)]
    with dist._coalescing_manager(async_ops=True) as manager:
        for out, x in zip(outs, ins, strict=True):
            dist.all_gather_into_tensor(out, x)
    manager.wait()
    assert torch.equal(outs[0][:, 0], torch.arange(1.0 * world_size)) and (outs[1] == 1).all()
    outs, ins = [torch.zeros(2), torch.zeros(1)], [torch.ones(2 * world_size), torch.arange(1.0 * world_size)]
    with dist._coalescing_manager():
        for out, x in zip(outs, ins, strict=True):
            dist.reduce_scatter_tensor(out, x)
    assert (outs[0] == world_size).all() and outs[1].item() == world_size * rank
    lists = [[torch.zeros(2), torch.zeros(3)] for _ in range(world_size)]
    dist.all_gather_coalesced(lists, [torch.full((2,), float(rank)), torch.full((3,), -float(rank))])
    assert all((a == r).all() and (b == -r).all() for r, (a, b) in enumerate(lists))
    dist.destroy_process_group()


def objects(rank: int, world_size: int) -> None:
    dist.init_process_group("paracomm")
    everybodys: list[Any] = [None] * world_size
    dist.all_gather_object(everybodys, {"rank": rank, "pad": "x" * 1000 * rank})
    assert [e["rank"] for e in everybodys] == list(range(world_size))
    heard: list[Any] = ["from 0", 3] if rank == 0 else [None, None]
    dist.broadcast_object_list(heard, 0)
    assert heard == ["from 0", 3]
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, [f"to {r}" for r in range(world_size)] if rank == 0 else None, 0)
    assert mine == [f"to {rank}"]
    gathered: list[Any] = [None] * world_size
    dist.gather_object(rank, gathered if rank == 0 else None, 0)
    assert rank != 0 or gathered == list(range(world_size))
    if rank == 0:
        dist.send_object_list([{"a": 1}], 1)
    elif rank == 1:
        dist.recv_object_list(heard := [None], 0)
        assert heard == [{"a": 1}]
    dist.destroy_process_group()


def sparse(rank: int, world_size: int) -> None:
    dist.init_process_group("paracomm")
    dense = torch.zeros(5, 2)
    dense[rank] = 1
    dense[4] = rank
    x = dense.to_sparse(1)
    dist.all_reduce(x)
    want = torch.zeros(5, 2)
    want[:world_size] = 1
    want[4] = sum(range(world_size))
    assert x.is_sparse and torch.equal(x.to_dense(), want)
    with pytest.raises(ValueError, match="sparse"):
        dist.all_reduce(dense.to_sparse(), dist.ReduceOp.MAX)
    dist.destroy_process_group()


def to_itself(rank: int, world_size: int) -> None:
    """What a rank sends to itself passes the gate of arrays too."""
    dist.init_process_group("paracomm")
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    for refused in (freed, torch.zeros(1).expand(4), torch.ones(4).to_sparse(), torch.ones(4, device="meta")):
        with pytest.raises(paracomm.InvalidArgument):
            dist.irecv(refused, rank)
    for refused in (freed, torch.ones(4).to_sparse(), torch.ones(4, device="meta")):
        with pytest.raises(paracomm.InvalidArgument):
            dist.isend(refused, rank)
    x, conjugated = torch.zeros(8)[::2], torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    receives = [dist.irecv(x, rank), dist.irecv(y := torch.zeros(2), rank)]
    dist.isend(torch.ones(1).expand(4), rank)
    dist.isend(conjugated, rank)
    for work in receives:
        work.wait()
    assert x.tolist() == [1.0] * 4 and y.tolist() == [-2.0, 4.0]
    dist.destroy_process_group()


@pytest.mark.parametrize("check", [reductions, movements, uneven, coalesced, objects, sparse, to_itself])
@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives(world_size: int, check: Any) -> None:
    run_ranks(world_size, in_world, check)


def in_world(rank: Rank, check: Callable[[int, int], None]) -> None:
    check(rank.rank, rank.world_size)
