"""torch's hooks that step an optimizer inside DDP's backward, on our backend: they train as plain steps do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Rank, run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import ddp_zero_hook, default_hooks, optimizer_overlap_hooks
from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel

from paracomm import hooks
from tests.hooks.cases import BUCKET_BYTES, batch, loss, model, share

STEPS = 6
BUCKET_MB = BUCKET_BYTES / (1 << 20)


def in_one_process(steps: range) -> dict[str, Tensor]:
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for step in steps:
        optimizer.zero_grad()
        loss(module(batch(step))).backward()
        optimizer.step()
    return dict(module.named_parameters())


def assert_trained(module: nn.Module, expected: dict[str, Tensor]) -> None:
    untrained = dict(model().named_parameters())
    for name, parameter in module.named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=1e-4, atol=1e-6), name
        assert not torch.allclose(parameter, untrained[name], rtol=1e-4, atol=1e-6), name


def backward(ddp: Any, step: int, rank: Rank) -> None:
    loss(ddp(share(batch(step), rank.rank, rank.world_size))).backward()


ZERO_HOOKS = {
    "hook_with_zero_step": ddp_zero_hook.hook_with_zero_step,
    "hook_with_zero_step_interleaved": ddp_zero_hook.hook_with_zero_step_interleaved,
}


def zero(rank: Rank, name: str, shard_buckets: bool, inner: str) -> None:
    dist.init_process_group("paracomm")
    ddp = DistributedDataParallel(model(), bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.1, momentum=0.9)
    plain = hooks.allreduce_hook if inner == "ours" else default_hooks.allreduce_hook
    ddp.register_comm_hook(None, ZERO_HOOKS[name](plain, ddp, optimizer, shard_buckets=shard_buckets))
    for step in range(STEPS):
        ddp.zero_grad()
        backward(ddp, step, rank)
        optimizer.step()  # does nothing, by torch's design
    # torch learns the buckets in the first two steps, and updates nothing in them.
    assert_trained(ddp.module, in_one_process(range(2, STEPS)))
    dist.destroy_process_group()


@pytest.mark.parametrize("shard_buckets", [False, True])
@pytest.mark.parametrize("name", ZERO_HOOKS)
def test_zero_steps_inside_backward(name: str, shard_buckets: bool) -> None:
    run_ranks(2, zero, name, shard_buckets, "torch")


def test_zero_steps_behind_our_hook() -> None:
    run_ranks(2, zero, "hook_with_zero_step", False, "ours")


class Functional:
    """An optimizer of torch's functional kind: one parameter at a time."""

    def __init__(self) -> None:
        self.velocity: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step_param(self, parameter: Tensor, gradient: Tensor) -> None:
        velocity = self.velocity.setdefault(parameter, torch.zeros_like(parameter))
        velocity.mul_(0.9).add_(gradient)
        parameter.sub_(velocity, alpha=0.1)


def then_optimizer(rank: Rank) -> None:
    dist.init_process_group("paracomm")
    ddp = DistributedDataParallel(model(), bucket_cap_mb=BUCKET_MB)
    state = optimizer_overlap_hooks._OptimizerHookState(Functional())
    ddp.register_comm_hook(None, optimizer_overlap_hooks._hook_then_optimizer(default_hooks.allreduce_hook, state))
    for step in range(STEPS):
        ddp.zero_grad()
        backward(ddp, step, rank)
    assert_trained(ddp.module, in_one_process(range(STEPS)))
    dist.destroy_process_group()


def test_an_optimizer_behind_the_hook() -> None:
    run_ranks(2, then_optimizer)


def in_backward(rank: Rank) -> None:
    """torch steps such optimizers on a stream of the accelerator; without one it cannot make the stream."""
    dist.init_process_group("paracomm")
    module = model()
    _apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": 0.1})
    with pytest.raises(RuntimeError, match="accelerator"):
        backward(DistributedDataParallel(module), 0, rank)
    dist.destroy_process_group()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a machine without accelerator is what is tested")
def test_optimizers_in_backward_need_an_accelerator() -> None:
    run_ranks(2, in_backward)
