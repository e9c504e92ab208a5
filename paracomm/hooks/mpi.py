"""A hook's wire over mpi4py, so that gradients between hosts take the fabric that a cluster's MPI knows.

Hooks wait on threads of their own, so that MPI must have been started with MPI_THREAD_MULTIPLE, as mpi4py does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from paracomm.errors import InvalidArgument
from paracomm.hooks.wire import Pending, Wire


class _Request:
    def __init__(self, request: Any, x: Tensor | None = None, divisor: int = 1) -> None:
        self._request, self._x, self._divisor = request, x, divisor

    def wait(self) -> None:
        self._request.Wait()
        if self._x is not None and self._divisor > 1:
            self._x.div_(self._divisor)


class MpiWire(Wire):
    """Over an mpi4py communicator; CPU tensors only, and no 16-bit float can be averaged. MPI counts no bytes."""

    def __init__(self, comm: Any, owned: bool = False) -> None:
        from mpi4py import MPI

        if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
            raise InvalidArgument("MpiWire: MPI was not started with MPI_THREAD_MULTIPLE, and hooks wait on threads")
        self._mpi = MPI
        self.comm = comm
        self.rank, self.world_size = comm.Get_rank(), comm.Get_size()
        self._owned = owned

    def average(self, x: Tensor) -> Pending:
        if x.dtype in (torch.float16, torch.bfloat16):
            raise InvalidArgument(f"MpiWire: MPI has no {x.dtype}; average float32, or quantise")
        return _Request(self.comm.Iallreduce(self._mpi.IN_PLACE, _view(x), op=self._mpi.SUM), x, self.world_size)

    def reduce(self, x: Tensor, root: int) -> Pending:
        if self.rank == root:
            return _Request(self.comm.Ireduce(self._mpi.IN_PLACE, _view(x), op=self._mpi.SUM, root=root))
        return _Request(self.comm.Ireduce(_view(x), None, op=self._mpi.SUM, root=root))

    def broadcast(self, x: Tensor, root: int) -> Pending:
        return _Request(self.comm.Ibcast(_view(x), root=root))

    def all_gather(self, out: Tensor, x: Tensor) -> Pending:
        return _Request(self.comm.Iallgather(_view(x), _view(out)))

    def all_to_all(self, out: Tensor, x: Tensor) -> Pending:
        return _Request(self.comm.Ialltoall(_view(x), _view(out)))

    def twin(self) -> MpiWire:
        return MpiWire(self.comm.Dup(), owned=True)

    def split(self, color: int | None) -> MpiWire | None:
        part = self.comm.Split(self._mpi.UNDEFINED if color is None else color, self.rank)
        return None if color is None else MpiWire(part, owned=True)

    def hosts(self) -> list[int]:
        numbers: dict[str, int] = {}
        names = self.comm.allgather(self._mpi.Get_processor_name())
        return [numbers.setdefault(name, len(numbers)) for name in names]

    def abort(self, why: str) -> None:
        """MPI can only end all of its processes, which is for their owner to decide: nothing is done."""

    def close(self) -> None:
        if self._owned:
            self.comm.Free()


def _view(x: Tensor) -> np.ndarray:
    array: np.ndarray = x.detach().numpy()
    return array
