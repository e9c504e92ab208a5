"""Sums over ranks that do not depend on how gradients are cut, on any communicator.

Our own communicator adds by the schedule "ordered": the expression of an element is the same in all_reduce and in
reduce_scatter, wherever the element lies. Others (tests run the reducer on torch.distributed) add as they do.
"""

from __future__ import annotations

from typing import Any, Protocol

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
