"""Training on emulated GPUs: DDP and our reducer, with every hook, give the bits that the host gives."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
import torch._dynamo  # DDP imports it: once here, and not on every rank
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from paracomm import hooks
from paracomm.parallel import DataParallel
from tests.comm.cases import bits
from tests.device.emulation import emulate
from tests.hooks.cases import BUCKET_BYTES, KINDS, batch, loss, model, share
from tests.ranks import Rank, run_ranks
from tests.train.test_command import on_rank, options

__all__ = ["options"]  # the fixture

ORDERED = {"all_reduce": [[2**62, "ordered", {}]], "reduce_scatter": [[2**62, "ordered", {}]]}
"""What the device does, on the host: sums in the order of ranks."""
STEPS = 3


def gradients(replica: Any, module: torch.nn.Module, rank: Rank) -> str:
    """A digest of the gradients of some steps on this rank's rows."""
    digest = hashlib.blake2b()
    for step in range(STEPS):
        module.zero_grad()
        loss(replica(share(batch(step), rank.rank, rank.world_size))).backward()
        if hasattr(replica, "finish"):
            replica.finish()
        for parameter in module.parameters():
            digest.update(bits(parameter.grad))
    return digest.hexdigest()


def by_ddp(rank: Rank, comm: Any, name: str | None) -> str:
    module = model()
    ddp = DistributedDataParallel(module, bucket_cap_mb=BUCKET_BYTES / (1 << 20))
    if name is None:
        return gradients(ddp, module, rank)
    state = KINDS[name].make(dist.group.WORLD)
    state.bind(ddp)
    ddp.register_comm_hook(state, KINDS[name].hook)
    found = gradients(ddp, module, rank)
    state.close()
    return found


def by_our_reducer(rank: Rank, comm: Any, name: str | None) -> str:
    module = model()
    replica = DataParallel(module, comm, bucket_bytes=BUCKET_BYTES, first_bucket_bytes=4000)
    if name is None:
        return gradients(replica, module, rank)
    state = KINDS[name].make(comm)
    hooks.register(replica, KINDS[name].hook, state)
    found = gradients(replica, module, rank)
    state.close()
    return found


def train(rank: Rank, emulated: bool) -> dict[str, str]:
    if emulated:
        emulate()
    dist.init_process_group("paracomm", pg_options=None if emulated else {"table": ORDERED})
    comm = rank.connect(table=ORDERED)
    found = {}
    for name in (None, *KINDS):
        for reducer in (by_ddp, by_our_reducer):
            torch.manual_seed(0)
            found[f"{reducer.__name__}, {name}"] = reducer(rank, comm, name)
    assert (comm.device is not None) == emulated
    assert (dist.group.WORLD.comm.device is not None) == emulated
    comm.close()
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_bits_of_the_host(world_size: int) -> None:
    on_device, on_host = (run_ranks(world_size, train, emulated) for emulated in (True, False))
    for rank, (ours, theirs) in enumerate(zip(on_device, on_host, strict=True)):
        differ = [what for what, digest in theirs.items() if ours[what] != digest]
        assert not differ, f"rank {rank}: other bits than the host's: {differ}"


def command(rank: Rank, options: list[str]) -> tuple[int, str]:
    emulate()
    return on_rank(rank, options)


@pytest.mark.parametrize("reducer", ["ddp", "paracomm"])
def test_the_train_command(options: list[str], reducer: str) -> None:
    """Its losses and weights agree with one process's."""
    (code, said), _ = run_ranks(2, command, [*options, "--check", "--check-steps", "2", "--reducer", reducer])
    assert code == 0 and "losses and weights agree" in said, said
