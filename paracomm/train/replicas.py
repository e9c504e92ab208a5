"""The ranks of a run as the training loop sees them: our communicator, or torch DDP beside it for comparison."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import paracomm
from paracomm.errors import InvalidArgument
from paracomm.parallel import DataParallel
from paracomm.parallel.bucket import MIB


class Replicated(Protocol):
    """A model on every rank, whose gradients are averages after finish()."""

    def __call__(self, *args: Any) -> Any: ...

    def no_sync(self) -> AbstractContextManager[None]: ...

    def finish(self) -> None: ...

    @property
    def blocked_s(self) -> float | None: ...


class Replicas(Protocol):
    """All ranks of a run."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def replicate(self, model: nn.Module, bucket_bytes: int) -> Replicated: ...

    def sum(self, x: Tensor) -> Tensor: ...

    def barrier(self) -> None: ...

    def close(self) -> None: ...


class ParacommReplicas:
    """Ranks that talk through a paracomm communicator."""

    def __init__(self, comm: Any = None) -> None:
        self.comm = paracomm.init() if comm is None else comm
        self.rank: int = self.comm.rank
        self.world_size: int = self.comm.world_size

    def replicate(self, model: nn.Module, bucket_bytes: int) -> DataParallel:
        """`model` with rank 0's parameters; the first bucket is at most a quarter of the others."""
        return DataParallel(
            model, self.comm, bucket_bytes=bucket_bytes, first_bucket_bytes=max(1, min(MIB, bucket_bytes // 4))
        )

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks, in place."""
        self.comm.all_reduce(x, op="sum")
        return x

    def barrier(self) -> None:
        self.comm.barrier()

    def close(self) -> None:
        self.comm.close()


class _DDP:
    def __init__(self, model: nn.Module, bucket_bytes: int) -> None:
        self._model = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=bucket_bytes / MIB)
        self.blocked_s = None  # DDP waits inside of backward and does not say for how long

    def __call__(self, *args: Any) -> Any:
        return self._model(*args)

    def no_sync(self) -> AbstractContextManager[None]:
        return self._model.no_sync()

    def finish(self) -> None:
        pass


class DDPReplicas:
    """Ranks of torch.distributed under DistributedDataParallel, on any backend it knows."""

    def __init__(self, backend: str = "gloo") -> None:
        self._owned = not dist.is_initialized()
        if self._owned:
            if "RANK" in os.environ:
                dist.init_process_group(backend)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.rank: int = dist.get_rank()
        self.world_size: int = dist.get_world_size()

    def replicate(self, model: nn.Module, bucket_bytes: int) -> _DDP:
        """`model` under DDP with gradients as views into its buckets."""
        return _DDP(model, bucket_bytes)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks, in place."""
        dist.all_reduce(x)
        return x

    def barrier(self) -> None:
        dist.barrier()

    def close(self) -> None:
        if self._owned:
            dist.destroy_process_group()


class _Plain:
    blocked_s = 0.0

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, *args: Any) -> Any:
        return self._model(*args)

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self) -> None:
        pass


class Alone:
    """One process by itself, with no reducer between model and optimizer: what the ranks are measured against."""

    rank, world_size = 0, 1

    def replicate(self, model: nn.Module, bucket_bytes: int) -> _Plain:
        return _Plain(model)

    def sum(self, x: Tensor) -> Tensor:
        return x

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass


def open_replicas(reducer: str, backend: str) -> Replicas:
    """The ranks of this job, by `--reducer`; `backend` is torch.distributed's, for reducer ddp only."""
    if reducer == "paracomm":
        return ParacommReplicas()
    if reducer == "ddp":
        return DDPReplicas(backend)
    raise InvalidArgument(f"train: reducer is '{reducer}', expected paracomm or ddp")


def use_one_thread() -> None:
    """One compute thread a process, unless OMP_NUM_THREADS says otherwise: the ranks share the cores."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
