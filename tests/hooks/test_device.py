"""Hooks on device memory: what ends a bucket is on a side stream (by stand-ins), and two levels of emulated GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo  # which DDP imports: once here, not on every rank
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from paracomm import hooks
from paracomm.comm import device
from paracomm.comm.streams import SideStreams
from paracomm.errors import Error
from tests.backend.streams import Cuda
from tests.hooks.cases import BUCKET_BYTES, batch, gradients, loss, model, share
from tests.ranks import Rank, run_ranks, say_goodbye

HOSTS = [0, 0, 1, 1]


def by_stand_ins(monkeypatch: pytest.MonkeyPatch, cuda: Cuda) -> Any:
    """A state whose side streams are stand-ins, and futures that know no devices."""
    state = hooks.AllReduceState(Rank(0, 1, lambda blob: [blob]).connect())
    state._sides = SideStreams(cuda)
    future = torch.futures.Future
    monkeypatch.setattr(torch.futures, "Future", lambda devices: future())
    return state


def test_the_end_of_a_bucket_is_on_the_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, buffer = Cuda(), torch.ones(3)
    state = by_stand_ins(monkeypatch, cuda)

    def finish() -> torch.Tensor:
        assert not torch.is_grad_enabled()
        cuda.log.append(f"{cuda.current_stream(0).name} finishes")
        return buffer

    assert state._finish_on_stream(buffer, finish).value() is buffer
    assert cuda.log == [
        "current records current:0", "side waits for current:0", "side finishes", "side records side:3",
    ]  # fmt: skip
    state.close()


def test_a_bucket_that_fails_there_is_heard_of_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    state = by_stand_ins(monkeypatch, Cuda())

    def finish() -> torch.Tensor:
        raise Error("rank 1 is gone")

    for _ in range(2):
        with pytest.raises(Error, match="rank 1 is gone"):
            state._finish_on_stream(torch.ones(3), finish)
    with pytest.raises(Error, match="a gradient hook raised Error: rank 1 is gone"):
        state.wire.check()
    state.close()


def two_levels(rank: Rank, name: str) -> list[bytes]:
    """Bits of the gradients of some steps."""
    dist.init_process_group("paracomm", pg_options={"host_id": f"host {HOSTS[rank.rank]}"})
    module = model()
    ddp = DistributedDataParallel(module, bucket_cap_mb=BUCKET_BYTES / (1 << 20))
    state, hook = hooks.make_hook(name)
    hooks.register(ddp, hook, state)
    found = []
    for step in range(3):
        ddp.zero_grad()
        loss(ddp(share(batch(step), rank.rank, len(HOSTS)))).backward()
        found += [gradient.numpy().tobytes() for gradient in gradients(module).values()]
    used = state.inside.comm.device
    assert (None if used is None else used.kind) == device.mode()
    state.close()
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("name", ["hierarchical", "hierarchical+int8"])
def test_two_levels_have_the_hosts_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 hosts of 2 emulated GPUs: a sum of two has one order, on the devices and over the host's transports."""
    on_host = run_ranks(4, say_goodbye, two_levels, name)
    monkeypatch.setenv("PARACOMM_DEVICE", "emulated")
    assert run_ranks(4, say_goodbye, two_levels, name) == on_host
    assert all(bits == on_host[0] for bits in on_host)
