"""What hook states keep: it survives a checkpoint, another process group, and buckets that are put together anew."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Rank, run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from paracomm import hooks
from paracomm.errors import InvalidArgument
from paracomm.parallel import DataParallel
from tests.hooks.cases import BOUNDS, BUCKET_BYTES, KINDS, batch, gradients, loss, model, share, truth

BUCKET_MB = BUCKET_BYTES / (1 << 20)


def everyones_mean(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def through_a_file(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def add_steps(total: dict[str, Tensor], replica: Any, module: nn.Module, steps: range, rank: Rank) -> None:
    for step in steps:
        module.zero_grad()
        loss(replica(share(batch(step), rank.rank, rank.world_size))).backward()
        if hasattr(replica, "finish"):
            replica.finish()
        for name, gradient in gradients(module).items():
            total[name] += gradient


def assert_nothing_is_lost(total: dict[str, Tensor], state: Any, expected: dict[str, Tensor], lost: float) -> None:
    """What came out and what the residuals hold is what went in."""
    memory = state.state_dict()["memory"]
    for name, went_in in expected.items():
        left = everyones_mean(memory.get(name, torch.zeros(went_in.numel())))
        missing = (total[name] + left.view_as(went_in) - went_in).abs().max()
        assert missing <= lost * went_in.abs().max() + 1e-7, f"{name}: {float(missing):.1e} was lost"


def resume(rank: Rank, name: str) -> None:
    """Two steps under DDP on Gloo, a checkpoint, then one step each on our backend and in our reducer."""
    comm = rank.connect()
    dist.init_process_group("gloo")
    kind = KINDS[name]
    total = {key: torch.zeros_like(p) for key, p in model().named_parameters()}

    module, state = model(), kind.make()
    ddp = DistributedDataParallel(module, bucket_cap_mb=BUCKET_MB)
    hooks.register(ddp, kind.hook, state)
    add_steps(total, ddp, module, range(2), rank)
    saved = through_a_file(state.state_dict())
    state.close()

    module, group = model(), dist.new_group(backend="paracomm")
    ddp, state = DistributedDataParallel(module, bucket_cap_mb=BUCKET_MB, process_group=group), kind.make(group)
    hooks.register(ddp, kind.hook, state)
    state.load_state_dict(saved)
    assert state.steps == 2 and same(state.state_dict(), saved)
    add_steps(total, ddp, module, range(2, 3), rank)
    saved = through_a_file(state.state_dict())
    state.close()

    module, state = model(), kind.make(comm)
    replica = DataParallel(module, comm, bucket_bytes=BUCKET_BYTES, first_bucket_bytes=4000)
    hooks.register(replica, kind.hook, state)
    state.load_state_dict(saved)
    assert state.steps == 3 and same(state.state_dict(), saved)
    add_steps(total, replica, module, range(3, 4), rank)
    lost = BOUNDS[name][1]
    if lost is not None:
        truths = [truth(step, rank.world_size).mean for step in range(4)]
        assert_nothing_is_lost(total, state, {key: sum(t[key] for t in truths) for key in total}, lost)
    state.close()
    with pytest.raises(InvalidArgument, match="state of a"):
        state.load_state_dict(saved | {"kind": "OtherState"})
    comm.close()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_goes_on_with_any_group(name: str) -> None:
    run_ranks(2, resume, name)


class Crossed(nn.Module):
    """Uses its layers in the order in which they were made, reversed: DDP regroups them after the first backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = [33, 47, 29, 61, 41, 37]
        self.layers = nn.ModuleList(nn.Linear(b, a) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = torch.tanh(layer(x))
        return x


def regroup(rank: Rank, name: str) -> None:
    dist.init_process_group("paracomm")
    kind, module = KINDS[name], Crossed()
    alone, state, seen = copy.deepcopy(module), KINDS[name].make(), []
    ddp = DistributedDataParallel(module, bucket_cap_mb=BUCKET_MB)

    def watched(state: Any, bucket: Any) -> Any:
        seen.append((bucket.index(), state.names.of(bucket)))
        return kind.hook(state, bucket)

    hooks.register(ddp, watched, state)
    result = {key: torch.zeros_like(p) for key, p in module.named_parameters()}
    expected, layouts = copy.deepcopy(result), []
    for step in range(4):
        x = torch.randn(2, 37, generator=torch.Generator().manual_seed(10 * step + rank.rank))
        for net, total in ((ddp, result), (alone, expected)):
            net.zero_grad()
            loss(net(x)).backward()
            for key, gradient in gradients(getattr(net, "module", net)).items():
                total[key] += gradient
        layouts.append(sorted(seen))
        seen.clear()
    assert layouts[0] != layouts[1] == layouts[3], "DDP did not regroup its buckets"
    mean = {key: everyones_mean(total) for key, total in expected.items()}
    assert_nothing_is_lost(result, state, mean, BOUNDS[name][1] or 0.0)
    state.close()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["int8", "int4", "topk", "powersgd", "bf16"])
def test_residuals_survive_the_regrouping_of_buckets(name: str) -> None:
    run_ranks(2, regroup, name)


def split_unevenly(rank: Rank) -> None:
    """Rank 0 is in a group that rank 1 does not know, which torch mistakes for another number of groups."""
    dist.init_process_group("gloo")
    dist.new_group([0, 1])
    if rank.rank == 0:
        dist.new_group([0], use_local_synchronization=True)
    wire = hooks.wire_of(None).twin()
    x = torch.full((3,), float(rank.rank))
    wire.average(x).wait()
    assert x.tolist() == [0.5] * 3
    part = hooks.wire_of(None).split(None if rank.rank else 0)
    assert (part is None) == (rank.rank == 1)
    again = hooks.wire_of(None).twin()
    again.average(x).wait()
    for each in (wire, again):
        each.close()
    dist.destroy_process_group()


def test_groups_are_made_whatever_other_groups_a_rank_is_in() -> None:
    run_ranks(2, split_unevenly)
