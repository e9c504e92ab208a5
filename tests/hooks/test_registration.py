"""Hooks that torch's DDP refuses, and hooks that raise."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Rank, run_ranks
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from paracomm import hooks
from paracomm.errors import Error, InvalidArgument
from paracomm.parallel import DataParallel
from tests.hooks.cases import BUCKET_BYTES, batch, exact, gradients, loss, model, share, truth

BACKENDS = ["gloo", "paracomm"]


def replicate(rank: Rank, reducer: str) -> tuple[Any, Any]:
    """The model under DDP on a backend, or under our reducer ("ours"); and the communicator of the latter."""
    if reducer == "ours":
        comm = rank.connect()
        return DataParallel(model(), comm, bucket_bytes=BUCKET_BYTES, first_bucket_bytes=4000), comm
    dist.init_process_group(reducer)
    return DistributedDataParallel(model(), bucket_cap_mb=BUCKET_BYTES / (1 << 20)), None


def backward(replica: Any, rank: Rank, step: int = 0) -> None:
    loss(replica(share(batch(step), rank.rank, rank.world_size))).backward()
    if hasattr(replica, "finish"):
        replica.finish()


class CallableHook:
    """A hook that is an object, and a state of its own."""

    def __init__(self) -> None:
        self.buckets = 0

    def __call__(self, state, bucket):  # type: ignore[no-untyped-def]
        self.buckets += 1
        return default_hooks.allreduce_hook(state, bucket)


def with_option(state, bucket, option):  # type: ignore[no-untyped-def]
    assert option == 3
    return default_hooks.allreduce_hook(state, bucket)


def annotated(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Its annotations are strings, because of this file's first import."""
    return default_hooks.allreduce_hook(state, bucket)


def bf16_compress_hook(state, bucket):  # type: ignore[no-untyped-def]
    """DDP asks for NCCL where a hook has this name."""
    return default_hooks.allreduce_hook(state, bucket)


WELCOME = {
    "object": CallableHook(),
    "partial": partial(with_option, option=3),
    "annotated": annotated,
    "bf16": bf16_compress_hook,
}


def welcome(rank: Rank, backend: str) -> None:
    dist.init_process_group(backend)
    for hook in WELCOME.values():
        ddp = DistributedDataParallel(model(), bucket_cap_mb=BUCKET_BYTES / (1 << 20))
        with pytest.raises((TypeError, ValueError, AttributeError, RuntimeError)):
            ddp.register_comm_hook(None, hook)
        hooks.register(ddp, hook)
        for step in range(2):  # DDP has one bucket in the first
            ddp.zero_grad()
            backward(ddp, rank, step)
        right = truth(1, rank.world_size)
        for name, gradient in gradients(ddp.module).items():
            exact(right, name, gradient)
    assert WELCOME["object"].buckets > 2
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_ddp_refuses_is_welcome(backend: str) -> None:
    run_ranks(2, welcome, backend)


class OddState(hooks.QuantizedState):
    """Raises in a later bucket on one rank: while a bucket starts, or when it finishes."""

    def __init__(self, where: Any, late: bool) -> None:
        super().__init__(where, bits=8)
        self.late = late

    def start(self, bucket: Any) -> Any:
        finish = super().start(bucket)
        if bucket.index() != 1 or self.wire.rank != 1:
            return finish
        if not self.late:
            raise ValueError("nonsense")

        def fails() -> Any:
            finish()
            raise ValueError("nonsense")

        return fails


def foreign(state: Any, bucket: Any, rank: int, late: bool) -> Any:
    """A hook that is not ours, failing in the same two ways."""
    plain = default_hooks.allreduce_hook if dist.is_initialized() else hooks.allreduce_hook
    future = plain(state, bucket)
    if bucket.index() != 1 or rank != 1:
        return future
    if not late:
        raise ValueError("nonsense")

    def fails(_: Any) -> Any:
        raise ValueError("nonsense")

    return future.then(fails)


def raises(rank: Rank, reducer: str, ours: bool, late: bool) -> None:
    replica, comm = replicate(rank, reducer)
    if ours:
        hooks.register(replica, hooks.int8_hook, OddState(comm, late))
    else:
        hooks.register(replica, partial(foreign, rank=rank.rank, late=late), comm)
    with pytest.raises(Exception, match="nonsense") as caught:
        for step in range(4):  # who has all messages of the step in which it happens learns of it in the next
            backward(replica, rank, step)
            replica.zero_grad()
    if reducer == "ours" and ours:  # futures of torch's keep the text only
        assert isinstance(caught.value, ValueError if rank.rank == 1 else Error)
    rank.exchange(b"")  # nobody learns of it because a process has ended


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("reducer", ["gloo", "paracomm", "ours"])
def test_every_rank_learns_of_a_hook_that_raises(reducer: str, ours: bool, late: bool) -> None:
    run_ranks(2, raises, reducer, ours, late, timeout_s=30)


def test_what_takes_no_hook_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="takes no hook"):
        hooks.register(torch.nn.Linear(1, 1), hooks.noop_hook)
    with pytest.raises(InvalidArgument, match="must be callable"):
        hooks.register(torch.nn.Linear(1, 1), 3)  # type: ignore[arg-type]
