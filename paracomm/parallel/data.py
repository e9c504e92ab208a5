"""Data parallelism: every rank holds the model and sees its share of the batch; gradients are averaged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paracomm.errors import Mismatch
from paracomm.parallel.bucket import COMMUNICATOR, MIB, GradientCommunicator, Hook, Reducer, all_reduce_hook


class Communicator(GradientCommunicator, Protocol):
    """What DataParallel asks of a communicator."""

    def broadcast(self, x: Tensor, root: int = ...) -> Any: ...

    def all_gather(self, x: Tensor) -> Any: ...


class DataParallel(nn.Module):
    """`module` on every rank of `comm`, with rank 0's parameters and buffers from the start.

    forward() is the module's own. After each backward call `finish()`: it returns when every gradient is the average
    over the ranks, bitwise equal on all of them. Where every rank's loss is the mean over an equal share of the batch,
    that is the gradient of the mean over the whole batch.

        for inputs, targets in batches:
            parallel.zero_grad()
            loss(parallel(inputs), targets).backward()
            parallel.finish()
            optimizer.step()

    Raises Mismatch if the ranks' parameters differ in name, shape or dtype. See Reducer for the other arguments.
    """

    def __init__(
        self,
        module: nn.Module,
        comm: Communicator,
        *,
        bucket_bytes: int = 25 * MIB,
        first_bucket_bytes: int = MIB,
        hook: Hook = all_reduce_hook,
        state: Any = COMMUNICATOR,
    ) -> None:
        super().__init__()
        self.module = module
        self.comm = comm
        _expect_same_parameters(module, comm)
        broadcast_parameters(module, comm)
        self.reducer = Reducer(
            module.named_parameters(),
            comm,
            bucket_bytes=bucket_bytes,
            first_bucket_bytes=first_bucket_bytes,
            hook=hook,
            state=state,
        )

    @property
    def process_group(self) -> Any:
        """torch's default process group, which torch's hooks for ZeRO ask of a DistributedDataParallel."""
        import torch.distributed as dist

        return dist.group.WORLD

    _has_rebuilt_buckets = True
    """What they ask as well: these buckets are final from the start."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def finish(self) -> None:
        """Waits for the averages; errors of the communication are raised here."""
        self.reducer.finish()

    @property
    def blocked_s(self) -> float:
        """Seconds that finish() spent blocked, since the start."""
        return self.reducer.blocked_s

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only accumulate; the first one outside sends the sum."""
        before = self.reducer.enabled
        self.reducer.enabled = False
        try:
            yield
        finally:
            self.reducer.enabled = before


@torch.no_grad()
def broadcast_parameters(module: nn.Module, comm: Communicator, root: int = 0) -> None:
    """Gives every rank the parameters and buffers of `root`."""
    for tensor in (*module.parameters(), *module.buffers()):
        whole = tensor.detach().contiguous()
        comm.broadcast(whole, root=root)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)


def _expect_same_parameters(module: nn.Module, comm: Communicator) -> None:
    described = [
        f"{name} {tuple(parameter.shape)} {parameter.dtype} requires_grad={parameter.requires_grad}"
        for name, parameter in module.named_parameters()
    ]
    counts = comm.all_gather(torch.tensor([len(described)])).flatten().tolist()
    if len(set(counts)) > 1:
        raise Mismatch(f"DataParallel rank {comm.rank}: the ranks have {counts} parameters, expected the same number")
    if not described:
        return
    digests = torch.tensor([_digest(line) for line in described], dtype=torch.int64)
    everyone = comm.all_gather(digests).view(comm.world_size, -1)
    for rank, theirs in enumerate(everyone):
        differs = (theirs != digests).nonzero()
        if len(differs):
            index = int(differs[0])
            raise Mismatch(
                f"DataParallel rank {comm.rank}: rank {rank}'s parameter {index} is not '{described[index]}'"
            )


def _digest(line: str) -> int:
    return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little", signed=True)
