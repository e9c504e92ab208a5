"""DDP's buckets move into the arena, and nobody can tell from the numbers."""

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import paracomm
from paracomm import _C
from paracomm.backend import mapped
from tests.ranks import Rank, run_ranks

STEPS = 6
ARENA = _C.Arena.process


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 300), nn.Tanh(), nn.Linear(300, 500))


def train(rank: Rank, **options: Any) -> tuple[list[torch.Tensor], DistributedDataParallel]:
    """Weights after STEPS of AdamW, and what holds the buckets."""
    ddp = DistributedDataParallel(net(), bucket_cap_mb=0.7, **options)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    for step in range(STEPS):
        x = torch.randn(8, 300, generator=torch.Generator().manual_seed(10 * step + rank.rank))
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in ddp.parameters()], ddp


def as_if_they_were_not(rank: Rank, options: dict[str, Any]) -> None:
    dist.init_process_group("paracomm")
    before = ARENA().bytes_in_use
    for _ in range(2):  # the second model's buckets may lie where the first one's lay
        weights, ddp = train(rank, **options)
        assert ARENA().bytes_in_use - before > 1_000_000, "no bucket was moved"
        if options.get("gradient_as_bucket_view"):
            inside = [ARENA().contains(p.grad.data_ptr(), p.grad.nbytes) for p in ddp.parameters() if p.dim() == 2]
            assert all(inside)
        del ddp
        for _ in range(20):  # before torch 2.13 the last few Works are kept (see work.py)
            dist.all_reduce(torch.ones(1), async_op=True).wait()
        gc.collect()
        assert ARENA().bytes_in_use == before, "a bucket that torch freed is still in the arena"
    mapped.LEAST_BYTES = 1 << 40
    unmoved, _ = train(rank, **options)
    assert ARENA().bytes_in_use == before
    assert all(torch.equal(a, b) for a, b in zip(weights, unmoved, strict=True))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}, {"static_graph": True}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_the_result_is_as_if_they_were_not(options: dict[str, Any]) -> None:
    run_ranks(2, as_if_they_were_not, options)


def test_every_view_sees_the_move() -> None:
    comm, x = paracomm.init(), torch.randn(1 << 18)
    expected, view = x.clone(), x[1000:].view(-1, 8)
    before = ARENA().bytes_in_use
    assert mapped.move(x, comm)
    assert ARENA().contains(view.data_ptr(), view.nbytes)
    x += 1
    assert torch.equal(view.flatten(), (expected + 1)[1000:])
    del x
    gc.collect()
    assert torch.equal(view.flatten(), (expected + 1)[1000:])
    del view
    gc.collect()
    assert ARENA().bytes_in_use == before


def test_memory_that_is_not_torchs_own_stays() -> None:
    import numpy as np

    memory = np.arange(1 << 17, dtype=np.float32)
    x = torch.from_numpy(memory)
    assert not mapped.move(x, paracomm.init())
    assert x.data_ptr() == memory.ctypes.data


def test_a_full_arena_leaves_a_bucket_where_it_is() -> None:
    class Full:
        def empty(self, *_: Any) -> None:
            raise paracomm.Error("the arena is full")

    x = torch.randn(1 << 18)
    address = x.data_ptr()
    assert not mapped.move(x, Full())  # type: ignore[arg-type]
    assert x.data_ptr() == address
