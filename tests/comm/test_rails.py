"""All-reduce over rails: ranks of pretended hosts, on the host and on emulated GPUs; ourselves or Gloo between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from paracomm.comm.rails import Rails, block_sizes, count_rails, rail_of, rails_of
from paracomm.errors import Error, InvalidArgument, PeerLost, Timeout
from tests.ranks import Rank, rank_outcomes, run_ranks, say_goodbye

HOSTS = {"2 x 2": [0, 0, 1, 1], "interleaved": [0, 1, 0, 1], "3 + 1": [0, 0, 0, 1], "1 x 1": [0, 1], "one host": [0, 0]}
LAYOUTS = pytest.mark.parametrize("hosts", HOSTS.values(), ids=HOSTS)
DEVICES = pytest.mark.parametrize("device", ["host", "emulated"])


def connect(rank: Rank, hosts: list[int], **options: Any) -> Any:
    return rank.connect(host_id=f"host {hosts[rank.rank]}", timeout_s=20.0, **options)


def test_rails():
    assert [rail_of([0, 0, 1, 1], rank) for rank in range(4)] == [0, 1, 0, 1]
    assert [rail_of([0, 0, 0, 1], rank) for rank in range(4)] == [0, None, None, 0]
    assert rails_of([0, 1, 0, 1, 1]) == [[0, 1], [2, 3]] and count_rails([0, 1, 0, 1, 1]) == 2
    assert block_sizes(10, 5, 3) == [3, 3, 4, 0, 0] and block_sizes(1, 2, 2) == [0, 1]


def inputs(world_size: int, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    if dtype == torch.bool:
        return [torch.rand(count, generator=generator) < 0.7 for _ in range(world_size)]
    wide = torch.randint(-3, 4, (world_size, count), generator=generator)
    return list(wide.to(dtype))


def expected(everybodys: list[torch.Tensor], op: str) -> torch.Tensor:
    """Of small whole numbers, which no dtype rounds."""
    dtype, whole = everybodys[0].dtype, torch.stack(everybodys)
    if dtype == torch.bool:
        return whole.any(0) if op in ("sum", "max") else whole.all(0)
    if op == "avg" and not dtype.is_floating_point:
        return torch.div(whole.sum(0, dtype=dtype), len(everybodys), rounding_mode="trunc").to(dtype)
    wide = whole.double() if dtype.is_floating_point else whole.long()
    results = {"sum": wide.sum(0), "avg": wide.double().mean(0), "prod": wide.prod(0), "min": wide.amin(0)}
    return (results | {"max": wide.amax(0)})[op].to(dtype)


def reduce_all(rank: Rank, hosts: list[int]) -> None:
    rails = Rails(connect(rank, hosts))
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.bool):
        for op in ("sum", "min") if dtype == torch.bool else ("sum", "avg", "max"):
            for count in (0, 1, 1001):
                everybodys = inputs(len(hosts), count, dtype)
                x = everybodys[rank.rank].clone()
                assert rails.all_reduce(x, op) is x
                want = expected(everybodys, op)
                tolerance = 2 * torch.finfo(dtype).eps if op == "avg" and dtype.is_floating_point else 0.0
                torch.testing.assert_close(x, want, rtol=tolerance, atol=tolerance, msg=f"{op} {dtype} {count}")
    rails.close()


@LAYOUTS
def test_reductions(hosts):
    run_ranks(len(hosts), say_goodbye, reduce_all, hosts)


@pytest.mark.parametrize("layout", ["2 x 2", "3 + 1"])
def test_reductions_on_emulated_gpus(layout, monkeypatch):
    monkeypatch.setenv("PARACOMM_DEVICE", "emulated")
    run_ranks(4, say_goodbye, reduce_all, HOSTS[layout])


def same_bits(rank: Rank, hosts: list[int]) -> bytes:
    rails = Rails(connect(rank, hosts))
    x = torch.randn(12_345, generator=torch.Generator().manual_seed(rank.rank), dtype=torch.float32)
    strided = torch.zeros(2, 50).t()
    strided += rank.rank
    array = np.full((3, 5), rank.rank + 1, np.int32)
    works = [rails.all_reduce(x, "avg", async_op=True), rails.all_reduce(strided, async_op=True)]
    rails.all_reduce(array, "prod", timeout_s=10.0)
    for work in works:
        work.wait(20.0)
        assert work.done() and work.exception() is None
    assert (strided == sum(range(len(hosts)))).all() and (array == np.prod(np.arange(len(hosts)) + 1)).all()
    rails.close()
    rails.close()
    return x.numpy().tobytes()


@LAYOUTS
def test_every_rank_has_the_same_bits(hosts):
    assert len(set(run_ranks(len(hosts), say_goodbye, same_bits, hosts))) == 1


# --- a process group between hosts ---
def over_gloo(rank: Rank, hosts: list[int]) -> None:
    comm = connect(rank, hosts)
    dist.init_process_group("gloo")
    rails = Rails(comm, [dist.new_group(ranks) for ranks in rails_of(hosts)])
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        for op in ("sum", "avg", "prod", "max"):
            everybodys = inputs(len(hosts), 101, dtype)
            x = everybodys[rank.rank].clone()
            rails.all_reduce(x, op)
            tolerance = 4 * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
            torch.testing.assert_close(x, expected(everybodys, op), rtol=tolerance, atol=4 * tolerance)
    with pytest.raises(InvalidArgument, match="one process group for each of 2 rails, not 1"):
        Rails(comm, [dist.group.WORLD])
    with pytest.raises(InvalidArgument, match="has 4 ranks here, there are 2 hosts"):
        Rails(comm, [dist.group.WORLD, dist.group.WORLD])
    rails.close()
    dist.destroy_process_group()


@DEVICES
def test_a_process_group_between_hosts(device, monkeypatch):
    if device == "emulated":
        monkeypatch.setenv("PARACOMM_DEVICE", "emulated")
    run_ranks(4, say_goodbye, over_gloo, HOSTS["2 x 2"])


# --- what fails ---
def one_stays_out(rank: Rank, hosts: list[int]) -> None:
    rails = Rails(rank.connect(host_id=f"host {hosts[rank.rank]}", timeout_s=1.0))
    x = torch.ones(1000)
    rails.all_reduce(x)
    if rank.rank == 3:
        return
    rails.all_reduce(x)


def test_a_rank_that_leaves_is_named_on_all_hosts():
    outcomes = rank_outcomes(4, one_stays_out, HOSTS["2 x 2"], timeout_s=20.0)
    for outcome in outcomes[:3]:
        assert isinstance(outcome.error, Error), outcome.failure
    assert any(isinstance(outcome.error, PeerLost | Timeout) for outcome in outcomes)
    assert any("rank 3" in str(outcome.error) or "rank 1 (" in str(outcome.error) for outcome in outcomes[:3])


def not_in_time(rank: Rank, hosts: list[int]) -> None:
    rails = Rails(connect(rank, hosts))
    if rank.rank == 0:
        work = rails.all_reduce(torch.ones(10), async_op=True)
        with pytest.raises(Timeout, match=r"not complete 0\.2 s after wait"):
            work.wait(0.2)
        assert not work.done() and work.exception() is None
        rank.exchange(b"")
        work.wait(10.0)
    else:
        rank.exchange(b"")
        rails.all_reduce(torch.ones(10))


def test_a_wait_has_an_end():
    run_ranks(4, say_goodbye, not_in_time, HOSTS["2 x 2"])
