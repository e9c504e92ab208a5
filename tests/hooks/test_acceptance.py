"""Every hook of ours and of torch's, on every engine, under torch's DDP and under our reducer.

The gradients are held against those of one process within the error that the hook states; they are the same bits on
every rank; and what a lossy hook did not deliver is in its residuals. The hooks come from the registries (cases.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Rank, run_ranks
from torch.nn.parallel import DistributedDataParallel

from paracomm import hooks
from paracomm.parallel import DataParallel
from tests.hooks.cases import BUCKET_BYTES, check_steps, model, ours, torchs

CASES = ours() | torchs()
GROUPS = [name for name in ("gloo", "paracomm") if name == "gloo" or hasattr(dist.Backend, "PARACOMM")]


def gather(x: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.stack(parts)


def under_ddp(name: str, group: Any) -> None:
    case, module = CASES[name], model()
    ddp = DistributedDataParallel(module, bucket_cap_mb=BUCKET_BYTES / (1 << 20), process_group=group)
    state = case.state(group)
    # DDP refuses the first by name on a CPU; the others mix up their own messages where there are several buckets.
    if name.startswith(("torch:bf16", "torch:quantization", "torch:powerSGD", "torch:batched_powerSGD")):
        hooks.register(ddp, case.hook, state)
    else:
        if case.ours:
            state.bind(ddp)
        ddp.register_comm_hook(state, case.hook)
    check_steps(case, ddp, module, state, gather, dist.get_rank(), dist.get_world_size())
    if case.ours:
        state.close()


def under_our_reducer(name: str, where: Any, comm: Any) -> None:
    case, module = CASES[name], model()
    state = case.state(where)
    replica = DataParallel(module, comm, bucket_bytes=BUCKET_BYTES, first_bucket_bytes=4000)
    hooks.register(replica, case.hook, state)
    check_steps(case, replica, module, state, gather, comm.rank, comm.world_size)
    if case.ours:
        state.close()


def everywhere(rank: Rank, name: str) -> None:
    comm = rank.connect()
    dist.init_process_group(GROUPS[0])
    if CASES[name].ours:
        under_our_reducer(name, comm, comm)
    for backend in GROUPS:
        if backend == "gloo" and not CASES[name].on_gloo:
            with pytest.raises((RuntimeError, IndexError)):
                under_ddp(name, dist.group.WORLD)
            continue
        group = dist.group.WORLD if backend == GROUPS[0] else dist.new_group(backend=backend)
        under_ddp(name, group)
        under_our_reducer(name, group, comm)
    comm.close()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_two_ranks(name: str) -> None:
    run_ranks(2, everywhere, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_four_ranks(name: str) -> None:
    run_ranks(4, everywhere, name)


def test_every_hook_of_ours_states_its_error() -> None:
    assert {name for name, case in CASES.items() if case.ours} == set(hooks.HOOKS)
