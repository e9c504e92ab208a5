"""What a hook asks of an engine: a handful of collectives, over a torch process group or our own communicator.

A hook is written once, against `Wire`:

    | where the ranks meet                                            | wire      |
    |-----------------------------------------------------------------|-----------|
    | a torch process group (Gloo, NCCL, MPI, ...)                     | GroupWire |
    | a paracomm.Communicator, a process group of the backend paracomm | CommWire  |
    | an mpi4py communicator                                          | MpiWire   |

Every call starts an operation on whole, contiguous tensors and returns at once with something to wait for. All ranks
make the same calls on one wire in the same order. A hook that has a second message to send once the first arrived sends
it on a `twin()`, another order of its own: when the first arrives differs between ranks, and so would the order.
"""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_process_group_store, _world

from paracomm.comm import Communicator
from paracomm.errors import Error, InvalidArgument
from paracomm.hooks.lane import poll_while_well


class Pending(Protocol):
    """An operation under way."""

    def wait(self) -> Any: ...


class Wire(ABC):
    """An order of collectives over `world_size` ranks, of which this process is `rank`."""

    rank: int
    world_size: int

    @abstractmethod
    def average(self, x: Tensor) -> Pending:
        """The mean of every rank's x, in place. The sum of 16-bit floats must not overflow where the mean does not."""

    @abstractmethod
    def reduce(self, x: Tensor, root: int) -> Pending:
        """The sum of every rank's x, into the root's x; the others' x may be overwritten."""

    @abstractmethod
    def broadcast(self, x: Tensor, root: int) -> Pending:
        """The root's x, into everybody's."""

    @abstractmethod
    def all_gather(self, out: Tensor, x: Tensor) -> Pending:
        """Every rank's x [k], into out [world_size * k]."""

    @abstractmethod
    def all_to_all(self, out: Tensor, x: Tensor) -> Pending:
        """Block r of x [world_size * k] to rank r; block r of `out` [world_size * k] comes from it."""

    @abstractmethod
    def twin(self) -> Wire:
        """Another order of collectives over the same ranks. Collective."""

    @abstractmethod
    def split(self, color: int | None) -> Wire | None:
        """A wire of the ranks that give the same color, in rank order; None for color None. Collective."""

    @abstractmethod
    def hosts(self) -> list[int]:
        """The number of every rank's host, in order of first appearance. Collective."""

    @abstractmethod
    def abort(self, why: str) -> None:
        """Gives up: whoever waits here or on another rank raises. Never raises itself."""

    def check(self) -> None:  # noqa: B027 - an engine may know nothing
        """Raises if a rank gave up, where the engine tells."""

    def bytes_sent(self) -> int | None:
        """Payload bytes that this rank has sent to others on this wire; None where the engine does not count."""
        return None

    def close(self) -> None:  # noqa: B027 - an engine may have nothing to give back
        """Gives back what a twin or a split holds. The wire that a person made stays open."""


def wire_of(where: Any) -> Wire:
    """The wire over a process group (None: the default one), a Communicator, an mpi4py communicator, or a Wire.

    Raises InvalidArgument for anything else, and where there is no default process group.
    """
    if isinstance(where, Wire):
        return where
    if where is None:
        where = default_group()
    comm = getattr(where, "comm", where)  # a process group of our backend has one
    if isinstance(comm, Communicator):
        return CommWire(comm)
    if isinstance(where, dist.ProcessGroup):
        return GroupWire(where)
    if hasattr(where, "Iallreduce") and hasattr(where, "Get_rank"):
        from paracomm.hooks.mpi import MpiWire

        return MpiWire(where)
    raise InvalidArgument(
        f"hooks run over a torch process group, a paracomm.Communicator or an mpi4py communicator, not {type(where)}"
    )


def default_group() -> dist.ProcessGroup:
    """torch's default process group. Raises InvalidArgument where there is none."""
    if not dist.is_initialized():
        raise InvalidArgument(
            "no process group: call torch.distributed.init_process_group() first, or give the hook's state a "
            "process group or a paracomm.Communicator"
        )
    group: dist.ProcessGroup = _present(dist.group.WORLD)
    return group


class CommWire(Wire):
    """Over our own communicator."""

    def __init__(self, comm: Communicator, owned: bool = False) -> None:
        self.comm = comm
        self.rank, self.world_size = comm.rank, comm.world_size
        self._owned = owned

    def average(self, x: Tensor) -> Pending:
        return _present(self.comm.all_reduce(x, "avg", async_op=True))

    def reduce(self, x: Tensor, root: int) -> Pending:
        return _present(self.comm.reduce(x, root, async_op=True))

    def broadcast(self, x: Tensor, root: int) -> Pending:
        return _present(self.comm.broadcast(x, root, async_op=True))

    def all_gather(self, out: Tensor, x: Tensor) -> Pending:
        return _present(self.comm.all_gather(x, out=out, async_op=True))

    def all_to_all(self, out: Tensor, x: Tensor) -> Pending:
        return _present(self.comm.all_to_all(x, out=out, async_op=True))

    def twin(self) -> CommWire:
        return CommWire(_present(self.comm.split(0)), owned=True)

    def split(self, color: int | None) -> CommWire | None:
        part = self.comm.split(color)
        return None if part is None else CommWire(part, owned=True)

    def hosts(self) -> list[int]:
        return self.comm.host_indices

    def abort(self, why: str) -> None:
        self.comm.abort(why)

    def check(self) -> None:
        self.comm.check()

    def bytes_sent(self) -> int:
        return sum(self.comm.bytes_sent(peer) for peer in range(self.world_size) if peer != self.rank)

    def close(self) -> None:
        if self._owned:
            self.comm.close()


GAVE_UP = "paracomm/hooks/gave up"
"""In a group's store: why a rank did."""


class _Watched:
    def __init__(self, work: Any, wire: Wire) -> None:
        self._work, self._wire = work, wire

    def wait(self) -> None:
        poll_while_well(self._work.is_completed, self._wire)
        self._work.wait()


class GroupWire(Wire):
    """Over a torch process group, by the public functions of torch.distributed."""

    def __init__(self, group: dist.ProcessGroup, key: tuple[Any, ...] | None = None) -> None:
        self.group = group
        self.rank, self.world_size = group.rank(), group.size()
        self._key = key
        # MPI has none.
        self._store = None if dist.get_backend(group) == "mpi" else _get_process_group_store(group)

    def average(self, x: Tensor) -> Pending:
        x.div_(self.world_size)
        return self._watched(x, dist.all_reduce(x, group=self.group, async_op=True))

    def reduce(self, x: Tensor, root: int) -> Pending:
        return self._watched(x, dist.reduce(x, self._global(root), group=self.group, async_op=True))

    def broadcast(self, x: Tensor, root: int) -> Pending:
        return self._watched(x, dist.broadcast(x, self._global(root), group=self.group, async_op=True))

    def all_gather(self, out: Tensor, x: Tensor) -> Pending:
        return self._watched(x, dist.all_gather_into_tensor(out, x, group=self.group, async_op=True))

    def all_to_all(self, out: Tensor, x: Tensor) -> Pending:
        return self._watched(x, dist.all_to_all_single(out, x, group=self.group, async_op=True))

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)

    def _watched(self, x: Tensor, work: Any) -> Pending:
        """Gloo has no abort: whoever waits looks now and then whether a rank gave up."""
        return _Watched(_present(work), self) if x.device.type == "cpu" else _present(work)

    def twin(self) -> GroupWire:
        return _present(self.split(0))

    def split(self, color: int | None) -> GroupWire | None:
        everybodys = self._gathered((color, len(_world.pg_names)))
        ranks = dist.get_process_group_ranks(self.group)
        members = [rank for rank, (theirs, _) in zip(ranks, everybodys, strict=True) if theirs == color]
        if dist.get_backend(self.group) == "mpi" and members != ranks:
            raise InvalidArgument("torch's MPI splits no group: give the parts as groups, or an mpi4py communicator")
        known = max(groups for theirs, groups in everybodys if theirs == color)
        return None if color is None else self._over(members, known)

    def _over(self, ranks: list[int], known: int) -> GroupWire:
        """A group of `ranks`, each of which calls this; none of them knows more than `known` groups so far."""
        backend = dist.get_backend(self.group)
        key = (dist.group.WORLD, backend, *ranks)
        idle = _idle.get(key, [])
        if idle:
            return GroupWire(idle.pop(0), key)
        # Only the members take part, so that hooks of a subgroup need nobody else. MPI groups need everybody.
        local = backend != "mpi"
        # torch names a local group after its ranks and how many groups this process knows: all must know as many.
        while local and len(_world.pg_names) < known:
            dist.new_group([dist.get_rank()], backend=backend, use_local_synchronization=True)
        group = dist.new_group(ranks, timeout=self._timeout(), backend=backend, use_local_synchronization=local)
        return GroupWire(group, key)

    def _timeout(self) -> timedelta | None:
        for device in self.group._device_types:
            options = getattr(self.group._get_backend(device), "options", None)
            if options is not None:
                return options._timeout
        return None

    def _gathered(self, value: Any) -> list[Any]:
        everybodys: list[Any] = [None] * self.world_size
        dist.all_gather_object(everybodys, value, group=self.group)
        return everybodys

    def hosts(self) -> list[int]:
        numbers: dict[str, int] = {}
        return [numbers.setdefault(name, len(numbers)) for name in self._gathered(_host_name())]

    def abort(self, why: str) -> None:
        self._key = None
        try:
            if self._store is not None:
                self._store.set(GAVE_UP, f"rank {self.rank}: {why}")
            self.group.abort()
        except Exception:  # what it does is the backend's own, and some have no such thing
            return

    def check(self) -> None:
        if self._store is not None and self._store.check([GAVE_UP]):
            raise Error(self._store.get(GAVE_UP).decode())

    def close(self) -> None:
        if self._key is not None:
            _idle.setdefault(self._key, []).append(self.group)
            self._key = None


_idle: dict[tuple[Any, ...], list[dist.ProcessGroup]] = {}
"""Groups that wires gave back, by default group, backend and ranks. They are used again, and never destroyed: torch
names a group after its ranks, so that the next one would meet in the store where the last one left its traces."""


def _host_name() -> str:
    """Ranks of one machine and one network have equal ones."""
    namespace = Path("/proc/self/ns/net")
    return f"{socket.gethostname()} {os.stat(namespace).st_ino if namespace.exists() else ''}"


def _present(found: Any) -> Any:
    """torch and split() type as None what only a rank outside the group is given."""
    if found is None:
        raise InvalidArgument("this rank is not a member of the group")
    return found


def as_float(x: Tensor) -> Tensor:
    """x itself where it is contiguous float32, otherwise a copy that is."""
    return x.to(torch.float32).contiguous()
