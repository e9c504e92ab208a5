"""The ranks of a run as the training loop sees them: a mesh of ours, or torch by itself beside it for comparison."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import paracomm
from paracomm.errors import InvalidArgument
from paracomm.parallel import DataParallel, Layout, Pipeline
from paracomm.parallel.bucket import MIB
from paracomm.parallel.context import context_positions
from paracomm.parallel.cost import measured_cut
from paracomm.parallel.pipeline import layers_of
from paracomm.parallel.rng import Place, at
from paracomm.train.storage import Alone, Ranks


class MeshReplicas:
    """Ranks of paracomm on a mesh, as `layout` says; comm None: those of this job.

    This one takes share part[0] of part[1] of a batch.
    """

    def __init__(self, layout: Layout | None = None, comm: Any = None) -> None:
        self.layout = Layout() if layout is None else layout
        self.comm = paracomm.init() if comm is None else comm
        self.mesh = self.layout.mesh(self.comm)
        self.rank: int = self.comm.rank
        self.world_size: int = self.comm.world_size
        self.part = self.mesh.index("dp"), self.mesh.size("dp")

    def positions(self, length: int) -> Tensor:
        """This rank's of a sequence, int64."""
        return context_positions(length, self.mesh.size("cp"), self.mesh.index("cp"))

    def replicate(self, model: nn.Module, bucket_bytes: int, rows: int) -> DataParallel | Pipeline:
        """`model` by the layout; the first bucket is at most a quarter of the others.

        Stages of a pipeline are cut by what layers cost on rank 0, on microbatches of a batch of `rows`.
        """
        first_bytes = max(1, min(MIB, bucket_bytes // 4))
        first = self._cut(model, rows // self.layout.microbatch_count) if self.layout.pp > 1 else None
        return self.layout.spread(
            model, self.mesh, bucket_bytes=bucket_bytes, first_bucket_bytes=first_bytes, first=first
        )

    def _cut(self, model: Any, rows: int) -> list[int]:
        length = model.config.context
        batch = {name: torch.zeros(rows, length, dtype=torch.int64) for name in ("tokens", "targets")}
        with at(Place(0, 0, torch.arange(rows), torch.arange(length))):
            return measured_cut(layers_of(model), batch, self.layout.pipeline_schedule(), self.comm)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over all ranks, in place."""
        self.comm.all_reduce(x, op="sum")
        return x

    def exchange(self, blob: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order."""
        return cast("list[bytes]", self.comm.exchange(blob))

    def beside(self) -> Ranks:
        """The same ranks once more, for another thread. Collective; whoever asks closes it."""
        twin = self.comm.split(0)
        assert twin is not None
        return cast("Ranks", twin)

    def barrier(self) -> None:
        self.comm.barrier()

    def close(self) -> None:
        self.mesh.close()
        self.comm.close()


class TorchReplica:
    """A model of torch's own, under DDP or by itself, as the loop uses a DataParallel."""

    blocked_s = None
    """DDP waits inside of backward and does not say for how long."""

    def __init__(self, module: nn.Module, ddp: DistributedDataParallel | None) -> None:
        self.module, self._ddp = module, ddp

    def __call__(self, *args: Any) -> Any:
        return self.module(*args) if self._ddp is None else self._ddp(*args)

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext() if self._ddp is None else self._ddp.no_sync()

    def finish(self) -> None:
        pass

    def optimizer(self, kind: type[torch.optim.Optimizer], groups: Any, **options: Any) -> torch.optim.Optimizer:
        return kind(groups, **options)

    def clip_(self, max_norm: float) -> float:
        return float(nn.utils.clip_grad_norm_(self.module.parameters(), max_norm))


class TorchRanks:
    """All ranks of torch.distributed, as checkpoints talk through them: a Gloo group of its own."""

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def exchange(self, blob: bytes) -> list[bytes]:
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, blob, group=self._group)
        return everyone

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None


class TorchReplicas:
    """Ranks of torch.distributed under DistributedDataParallel, on any backend it knows.

    backend None: one process by itself, with nothing of ours: what all ranks are measured against.
    """

    def __init__(self, backend: str | None = "gloo") -> None:
        self.ddp = backend is not None
        self._owned = self.ddp and not dist.is_initialized()
        if self._owned:
            alone: dict[str, Any] = (
                {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            )
            dist.init_process_group(backend, **alone)
        self.rank: int = dist.get_rank() if self.ddp else 0
        self.world_size: int = dist.get_world_size() if self.ddp else 1
        self.part = self.rank, self.world_size

    def positions(self, length: int) -> Tensor:
        return torch.arange(length)

    def replicate(self, model: nn.Module, bucket_bytes: int, rows: int) -> TorchReplica:
        """`model`, under DDP with gradients as views into its buckets."""
        if not self.ddp:
            return TorchReplica(model, None)
        cap = bucket_bytes / MIB
        return TorchReplica(model, DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=cap))

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks, in place."""
        if self.ddp:
            dist.all_reduce(x)
        return x

    def exchange(self, blob: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order."""
        everyone: list[Any] = [blob] * self.world_size
        if self.ddp:
            dist.all_gather_object(everyone, blob)
        return everyone

    def beside(self) -> Ranks:
        """The same ranks once more, for another thread. Collective; whoever asks closes it."""
        return TorchRanks() if self.ddp else Alone()

    def barrier(self) -> None:
        if self.ddp:
            dist.barrier()

    def close(self) -> None:
        if self._owned:
            dist.destroy_process_group()


Replica: TypeAlias = DataParallel | Pipeline | TorchReplica
Replicas: TypeAlias = MeshReplicas | TorchReplicas


def open_replicas(reducer: str, backend: str, layout: Layout) -> Replicas:
    """The ranks of this job, by `--reducer`; `backend` is torch.distributed's, for reducer ddp only."""
    if reducer == "paracomm":
        return MeshReplicas(layout)
    if reducer == "ddp":
        replicas = TorchReplicas(backend)
        layout.check(world_size=replicas.world_size)
        return replicas
    raise InvalidArgument(f"train: reducer is '{reducer}', expected paracomm or ddp")


def use_one_thread() -> None:
    """One compute thread a process, unless OMP_NUM_THREADS says otherwise: the ranks share the cores."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
