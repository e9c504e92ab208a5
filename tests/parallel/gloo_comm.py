"""A communicator over torch.distributed and Gloo, so that the reducer is tested apart from our own core."""

from __future__ import annotations

import torch
import torch.distributed as dist


class GlooWork:
    def __init__(self, work: dist.Work, x: torch.Tensor, divisor: int) -> None:
        self._work, self._x, self._divisor = work, x, divisor

    def wait(self) -> None:
        self._work.wait()
        if self._divisor > 1:
            self._x /= self._divisor


class GlooComm:
    """The part of paracomm.Communicator that the reducer and the training loop use."""

    def __init__(self) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def all_reduce(self, x: torch.Tensor, op: str = "sum", *, async_op: bool = False) -> GlooWork | torch.Tensor:
        work = GlooWork(dist.all_reduce(x, async_op=True), x, self.world_size if op == "avg" else 1)
        if async_op:
            return work
        work.wait()
        return x

    def broadcast(self, x: torch.Tensor, root: int = 0) -> torch.Tensor:
        dist.broadcast(x, src=root)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x)
        return torch.stack(parts)

    def barrier(self) -> None:
        dist.barrier()

    def close(self) -> None:
        dist.destroy_process_group()
