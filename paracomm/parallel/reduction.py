"""Sums over ranks that do not depend on how gradients are cut, on any communicator.

Our own communicator adds by the schedule "ordered": the expression of an element is the same in all_reduce and in
reduce_scatter, wherever the element lies. Others (tests run the reducer on torch.distributed) add as they do.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from paracomm.comm import Communicator


class Pending(Protocol):
    """An operation under way: a Work of the communicator, a torch Future."""

    def wait(self) -> Any: ...


class GradientCommunicator(Protocol):
    """What a Reducer asks of a communicator. `empty(shape, dtype)` is used too where it exists."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_reduce(self, x: Tensor, op: str = ..., *, async_op: bool = ...) -> Any: ...


def start_all_reduce(comm: Any, x: Tensor, op: str) -> Pending:
    """Begins the reduction of every rank's x, in place."""
    ours = {"algorithm": "ordered"} if isinstance(comm, Communicator) else {}
    pending: Pending = comm.all_reduce(x, op=op, async_op=True, **ours)
    return pending


def start_reduce_scatter(comm: Any, x: Tensor, op: str) -> Pending:
    """Begins the reduction of this rank's block of every rank's x, in place; the other blocks keep what they held."""
    size = x.numel() // comm.world_size
    block = x[comm.rank * size : (comm.rank + 1) * size]
    pending: Pending = comm.reduce_scatter(x, op, out=block, async_op=True, algorithm="ordered")
    return pending


def new_flat(comm: Any, count: int, like: Tensor, dtype: Any = None) -> Tensor:
    """Zeros [count] on the device of `like`, in memory that the peers on this host have mapped where there is such."""
    dtype = like.dtype if dtype is None else dtype
    empty = getattr(comm, "empty", None)
    if empty is not None and like.device.type == "cpu":
        flat: Tensor = empty((count,), dtype)
        return flat.zero_() if not isinstance(comm, Communicator) else flat
    return like.new_zeros(count, dtype=dtype)


class Recycler:
    """Memory of flat tensors that come and go. What was given back is taken again by one of the same size and dtype;
    the whole, in use or not, is never more than was in use at one time."""

    def __init__(self) -> None:
        self._spare: list[Tensor] = []
        self._used = self._most = 0

    def take(self, comm: Any, count: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """[count], as of new_flat(), but that it holds anything."""
        nbytes = count * dtype.itemsize
        self._used += nbytes
        self._most = max(self._most, self._used)
        for index, spare in enumerate(self._spare):
            if spare.numel() == count and spare.dtype == dtype:
                return self._spare.pop(index)
        while self._spare and self._used + sum(spare.nbytes for spare in self._spare) > self._most:
            self._spare.pop(0)
        return new_flat(comm, count, like, dtype)

    def give_back(self, flat: Tensor) -> None:
        """Nobody uses `flat` any more."""
        self._used -= flat.nbytes
        self._spare.append(flat)

    def held(self) -> list[Tensor]:
        """What waits to be taken."""
        return list(self._spare)
