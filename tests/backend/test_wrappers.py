"""What people train with, unmodified on this backend: its results are those of Gloo, or of one process."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # which DDP imports: once here, and not on every rank
import torch.distributed as dist
import torch.nn.functional as F
from ranks import Rank, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Net(nn.Module):
    """Linear layers, one of which is used on request only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 32)
        self.sometimes, self.last = nn.Linear(32, 32), nn.Linear(32, 1)

    def forward(self, x: torch.Tensor, more: bool = True) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.last(self.sometimes(x) if more else x)


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * step + rank))


def reference(world_size: int, steps: int = 3, more: Callable[[int], bool] = lambda step: True) -> list[torch.Tensor]:
    """Parameters after plain SGD on the mean of all ranks' losses, in one process."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(steps):
        sum(model(batch(r, step), more(step)).square().mean() for r in range(world_size)).div(world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def same(model: Any, expected: list[torch.Tensor]) -> None:
    """As in one process, within rounding; and the same on every rank, to the bit."""
    for p, q in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-6)
        everybodys = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(everybodys, p.detach())
        assert all(torch.equal(everybodys[0], other) for other in everybodys)


def train(model: Any, rank: int, steps: int = 3, optimizer: Any = None, **forward: Any) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
    for step in range(steps):
        model(batch(rank, step), **{k: v(step) for k, v in forward.items()}).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# --- DistributedDataParallel ---
def ddp(rank: int, world_size: int) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"bucket_cap_mb": 0.002},
        {"gradient_as_bucket_view": True},
        {"static_graph": True, "bucket_cap_mb": 0.002},
        {"broadcast_buffers": False, "find_unused_parameters": True},
    ]
    for arguments in options:
        model = DDP(net(), **arguments)
        train(model, rank)
        same(model, reference(world_size))
    model = DDP(net(), find_unused_parameters=True)
    train(model, rank, more=lambda step: step % 2 == 0)
    same(model, reference(world_size, more=lambda step: step % 2 == 0))


def ddp_no_sync_and_join(rank: int, world_size: int) -> None:
    model, alone = DDP(net()), net()
    with model.no_sync():
        model(batch(rank, 0)).sum().backward()
    model(batch(rank, 1)).sum().backward()
    (sum(alone(batch(r, s)).sum() for r in range(world_size) for s in (0, 1)) / world_size).backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)
    model.zero_grad()
    with model.join():
        for step in range(2 + rank):
            model(batch(rank, step)).sum().backward()
    dist.barrier()


def ddp_mixed_precision_and_sparse(rank: int, world_size: int) -> None:
    model = nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Flatten(), nn.Linear(8, 1))
    torch.manual_seed(2)
    for p in model.parameters():
        nn.init.normal_(p)
    alone = copy.deepcopy(model)
    wrapped = DDP(model)
    tokens = [torch.tensor([[1, r], [r + 2, 1]]) for r in range(world_size)]
    wrapped(tokens[rank]).sum().backward()
    (sum(alone(t).sum() for t in tokens) / world_size).backward()
    for p, q in zip(wrapped.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad.to_dense(), q.grad.to_dense(), rtol=1e-5, atol=1e-6)
    half = DDP(net())
    with torch.autocast("cpu", torch.bfloat16):
        train(half, rank)
    gathered = [torch.empty_like(half.module.last.weight) for _ in range(world_size)]
    dist.all_gather(gathered, half.module.last.weight.detach())
    assert all(torch.equal(gathered[0], other) for other in gathered)


def ddp_hooks(rank: int, world_size: int) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    model = DDP(net(), bucket_cap_mb=0.002)
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    train(model, rank)
    same(model, reference(world_size))
    # Many buckets, and inside their callbacks waits for other operations' futures.
    model = DDP(net(), bucket_cap_mb=0.0005)
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    train(model, rank, steps=6)
    dist.barrier()


def zero(rank: int, world_size: int) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for as_view in (False, True):
        model, sgd = DDP(net()), torch.optim.SGD
        optimizer = ZeroRedundancyOptimizer(model.parameters(), sgd, lr=0.1, parameters_as_bucket_view=as_view)
        train(model, rank, optimizer=optimizer)
        same(model, reference(world_size))


# --- sharded ---
def fsdp1(rank: int, world_size: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import ShardingStrategy

    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = FSDP(net(), device_id=torch.device("cpu"), sharding_strategy=strategy, use_orig_params=True)
            train(model, rank)
            with FSDP.summon_full_params(model):
                same(model, reference(world_size))


def fully_sharded(rank: int, world_size: int) -> None:
    from torch.distributed.fsdp import fully_shard

    shapes = [(world_size,), (1, world_size)] if world_size < 4 else [(4,), (2, 2)]
    for shape in shapes:
        mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        model = net()
        for layer in (model.first, model.second):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, rank)
        for p, q in zip(model.parameters(), reference(world_size), strict=True):
            torch.testing.assert_close(p.full_tensor().detach(), q, rtol=1e-5, atol=1e-6)


def tensor_parallel(rank: int, world_size: int) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (world_size,))
    x = torch.arange(24.0).view(6, 4)
    sharded = distribute_tensor(x, mesh, [Shard(0)])
    assert torch.equal(sharded.full_tensor(), x)
    assert torch.equal(sharded.redistribute(mesh, [Shard(1)]).full_tensor(), x)
    assert torch.equal((sharded @ distribute_tensor(x.t(), mesh, [Replicate()])).full_tensor(), x @ x.t())
    alone, model = net(), net()
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    same_input = batch(0, 0)
    model(same_input).square().mean().backward()
    alone(same_input).square().mean().backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(grad, q.grad, rtol=1e-5, atol=1e-6)


def pipeline(rank: int, world_size: int) -> None:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    torch.manual_seed(3)
    stages = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(world_size)]
    alone = copy.deepcopy(stages)
    x, y = batch(0, 0), batch(0, 1)
    stage = PipelineStage(stages[rank], rank, world_size, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=F.mse_loss)
    if rank == 0:
        schedule.step(x)
    elif rank == world_size - 1:
        schedule.step(target=y, losses=[])
    else:
        schedule.step()
    for half_x, half_y in zip(x.chunk(2), y.chunk(2), strict=True):
        (F.mse_loss(nn.Sequential(*alone)(half_x), half_y) / 2).backward()
    for p, q in zip(stages[rank].parameters(), alone[rank].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


# --- beside training ---
def checkpoint(rank: int, world_size: int, folder: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (world_size,))
    whole = torch.arange(12.0).view(6, 2)
    state = {"w": distribute_tensor(whole, mesh, [Shard(0)]), "plain": torch.full((2,), 5.0), "step": 7}
    dcp.save(state, checkpoint_id=folder)
    found = {"w": distribute_tensor(torch.zeros(6, 2), mesh, [Shard(0)]), "plain": torch.zeros(2), "step": 0}
    dcp.load(found, checkpoint_id=folder)
    assert torch.equal(found["w"].full_tensor(), whole) and found["plain"].tolist() == [5, 5] and found["step"] == 7


def functional(rank: int, world_size: int) -> None:
    import torch.distributed._functional_collectives as funcol

    group = dist.group.WORLD
    x = torch.full((2 * world_size,), rank + 1.0)
    total = sum(range(1, world_size + 1))
    assert (funcol.all_reduce(x, "sum", group) == total).all()
    assert (funcol.reduce_scatter_tensor(x, "sum", 0, group) == total).all()
    assert funcol.all_gather_tensor(x[:1], 0, group).tolist() == [r + 1.0 for r in range(world_size)]
    assert funcol.all_to_all_single(x, None, None, group).tolist() == [r + 1.0 for r in range(world_size) for _ in "ab"]
    assert (funcol.broadcast(x, 1, group) == 2).all()
    largest = funcol.all_reduce_coalesced([x[:1], x[:2]], "max", group)
    assert [y.tolist() for y in largest] == [[world_size * 1.0], [world_size * 1.0] * 2]
    y = torch.nn.Parameter(torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.nn import functional as autograd

        (autograd.all_reduce(y * (rank + 1)).sum()).backward()
    assert y.grad.tolist() == [(rank + 1.0) * world_size] * 2


def compiled(rank: int, world_size: int) -> None:
    """Calls between the graphs of a compiled program: they run as they are, the second time too."""
    comm, peer = dist.group.WORLD.comm, (rank + 1) % world_size

    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        work = dist.all_reduce(x, async_op=True)
        work.wait()
        return x + 1

    def future(x: torch.Tensor) -> torch.Tensor:
        return dist.all_reduce(x, async_op=True).get_future().wait()[0] + 1

    def scatter(x: torch.Tensor) -> torch.Tensor:
        dist.scatter(out := torch.empty(2), [x[:2] + r for r in range(world_size)] if rank == 0 else None)
        return out + 1

    def exchange(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        ops = [dist.P2POp(dist.isend, x, peer), dist.P2POp(dist.irecv, out, (rank - 1) % world_size)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        return out + 1

    def own(x: torch.Tensor) -> torch.Tensor:
        return comm.all_reduce(x * 2, async_op=True).wait() + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch itself, about its own pybind classes
        for call in (all_reduce, future, scatter, exchange, own):
            run = torch.compile(call, backend="eager")
            for i in range(2):
                assert run(torch.full((4,), rank + 1.0 + i)).tolist() == call(torch.full((4,), rank + 1.0 + i)).tolist()

        torch.manual_seed(0)
        model = nn.Linear(8, 3)
        wrapped = DDP(copy.deepcopy(model))
        alike = DDP(model)
        run = torch.compile(wrapped, backend="eager")  # its second forward broadcasts the buckets' new order
        for step in range(3):
            run(batch(rank, step)).sum().backward()
            alike(batch(rank, step)).sum().backward()
    assert [p.grad.tolist() for p in wrapped.parameters()] == [p.grad.tolist() for p in alike.parameters()]


def sync_batch_norm(rank: int, world_size: int) -> None:
    """torch itself refuses it on a CPU; a model that holds it still runs where it needs no statistics of others."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match="GPU"):
        DDP(model)
    model.eval()
    assert model(batch(rank, 0)).shape == (4, 3)


def in_world(rank: Rank, check: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("paracomm")
    check(rank.rank, rank.world_size, *args)
    dist.destroy_process_group()


CHECKS = [
    ddp, ddp_no_sync_and_join, ddp_mixed_precision_and_sparse, ddp_hooks, zero, fsdp1, fully_sharded, tensor_parallel,
    pipeline, functional, compiled, sync_batch_norm,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_unmodified(check: Any) -> None:
    run_ranks(2, in_world, check)


@pytest.mark.slow
@pytest.mark.parametrize("check", [ddp, zero, fsdp1, fully_sharded, tensor_parallel, pipeline, functional])
def test_unmodified_on_four(check: Any) -> None:
    run_ranks(4, in_world, check, timeout_s=120)


def test_checkpoint(tmp_path: Path) -> None:
    run_ranks(2, in_world, checkpoint, str(tmp_path))
