"""All-reduce of device memory over several hosts: the hosts' devices among themselves, and an engine between hosts.

The i-th rank of every host is on rail i. 2 hosts of 2 ranks, 4 elements a rank:

    host A: 0 1       host B: 2 3
    0: a b | 1: c d   2: a b | 3: c d     reduce-scatter inside a host, over its devices' memory
    0 <------- a b ------> 2              all-reduce on rail 0, between hosts
    1 <------- c d ------> 3              all-reduce on rail 1
    0: a b c d  ...                       all-gather inside

    bytes a rank sends to other hosts, h hosts of l ranks each: 2 S/l (h-1)/h

Between hosts it is a torch process group (NCCL, say), which has to take tensors of that device, or else the host's own
transports, through host memory. Where hosts have different numbers of ranks there are as many rails as ranks on the
smallest. 16-bit floats are rounded twice: inside a host, and between hosts. All ranks hold the same bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from typing import Any

from paracomm import background
from paracomm.comm.arrays import Several, contiguous, is_torch, known, native, unpack, view
from paracomm.comm.communicator import Communicator
from paracomm.comm.streams import SideStreams
from paracomm.errors import InvalidArgument, Timeout


class Rails:
    """All-reduce over the ranks of `comm`, host by host. Making one is collective.

    Args:
        comm: all ranks.
        between: a torch process group for every rail, in the order of `rails_of`; None: the host's transports.

            between = [dist.new_group(ranks, backend="nccl") for ranks in rails_of(comm.host_indices)]

    Raises InvalidArgument where the groups do not fit the rails.
    """

    def __init__(self, comm: Communicator, between: Sequence[Any] | None = None) -> None:
        hosts = comm.host_indices
        self._comm = comm
        self.hosts = len(set(hosts))
        self._on_this_host = hosts.count(hosts[comm.rank])
        self._rails = count_rails(hosts)
        rail = rail_of(hosts, comm.rank)
        leg = None if between is None or rail is None else _leg(between, rail, self._rails, self.hosts)
        self._inside = _member(comm.split(hosts[comm.rank]))
        self._across: Any = comm.split(rail) if between is None else leg
        self._sides = SideStreams()
        self._thread: ThreadPoolExecutor | None = None

    def all_reduce(self, x: Any, op: str = "sum", *, async_op: bool = False, timeout_s: float | None = None) -> Any:
        """The reduction of every rank's x, a torch tensor, NumPy array or Several, into x. Operations run in the order
        of the calls, on a thread of their own.

        Without `async_op` this returns x once the bytes from other hosts are here, and the current stream waits for the
        rest; with it, a `Crossing`. The timeout is that of each of the three steps.

        Raises as a Communicator's all_reduce.
        """
        first = x.arrays[0] if isinstance(x, Several) else x
        side = self._sides.of(first.device) if is_torch(first) and first.is_cuda else None
        ready = None if side is None else side.now()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "paracomm rails")
        future = self._thread.submit(self._in_turn, x, op, timeout_s, side, ready)
        crossing = Crossing(future, side, x)
        return crossing if async_op else crossing.wait()

    def _in_turn(self, x: Any, op: str, timeout_s: float | None, side: Any, ready: Any) -> Any:
        """Runs on the thread; returns the event of the side stream at the end, if there is one."""
        try:
            with background.busy():
                if side is None:
                    self._cross(x, op, timeout_s)
                    return None
                with side.after(ready, x) as ends:
                    self._cross(x, op, timeout_s)
                return ends[0]
        except Exception as error:
            self.abort(f"all_reduce over rails raised {type(error).__name__}: {error}")
            raise

    def _cross(self, x: Any, op: str, timeout_s: float | None) -> None:
        whole = x.packed() if isinstance(x, Several) else contiguous(native(x))
        flat = whole.reshape(-1)
        rows = block_sizes(math.prod(flat.shape), self._inside.world_size, self._rails)
        inner, outer = op, op
        exact = op == "avg" and not _is_floating(flat)
        if exact:
            inner = outer = "sum"
        shard = self._inside.reduce_scatter_v(flat, rows, inner, timeout_s=timeout_s)
        if self._across is not None:
            if inner == "avg" and self._on_this_host * self.hosts != self._comm.world_size:
                shard *= self._on_this_host * self.hosts / self._comm.world_size
            self._across.all_reduce(shard, outer, timeout_s=timeout_s)
            if exact:
                _divide(shard, self._comm.world_size)
        self._inside.all_gather_v(shard, out=flat, rows=rows, timeout_s=timeout_s)
        arrays = x.arrays if isinstance(x, Several) else [native(x)]
        if view(known(arrays[0])).address != view(known(flat)).address:  # a copy
            unpack(whole, arrays)

    def abort(self, why: str) -> None:
        """Gives up on every rank: whoever waits, here and elsewhere, raises Error."""
        for part in (self._inside, self._across, self._comm):
            if part is not None:
                part.abort(why)

    def close(self) -> None:
        """Leaves the groups that were made here, and ends the thread. What nobody has waited for may fail."""
        self._inside.close()
        if isinstance(self._across, Communicator):
            self._across.close()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None


class Crossing:
    """An all-reduce under way, as a Work. Its array must stay as it is until `wait()` returned or `done()` is true."""

    joins = False
    """`wait()` blocks until the bytes from other hosts are here."""

    def __init__(self, future: Future[Any], side: Any, result: Any) -> None:
        self._future, self._side, self._result = future, side, result

    def wait(self, timeout_s: float | None = None) -> Any:
        """Returns the array; the current stream then waits for what the GPU has yet to do. Raises what it failed with,
        and Timeout if it is not through in `timeout_s` seconds."""
        try:
            event = self._future.result(timeout_s)
        except NotInTime:
            if self._future.done():  # it failed with a Timeout of its own
                raise
            raise Timeout(f"all_reduce over rails was not complete {timeout_s:g} s after wait() was called") from None
        if event is not None:
            self._side.join(event)
        return self._result

    def done(self) -> bool:
        if not self._future.done():
            return False
        failed = self._future.exception() is not None
        return failed or self._future.result() is None or self._future.result().query()

    def exception(self) -> BaseException | None:
        return self._future.exception() if self._future.done() else None


def _leg(between: Sequence[Any], rail: int, rails: int, hosts: int) -> _GroupLeg:
    if len(between) != rails:
        raise InvalidArgument(f"between hosts it is one process group for each of {rails} rails, not {len(between)}")
    group = between[rail]
    if not hasattr(group, "size") or group.size() != hosts:
        ranks = group.size() if hasattr(group, "size") else "no"
        raise InvalidArgument(f"the process group of rail {rail} has {ranks} ranks here, there are {hosts} hosts")
    return _GroupLeg(group)


class _GroupLeg:
    """All-reduce by a torch process group."""

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self._group, self._dist = group, dist

    def all_reduce(self, x: Any, op: str, *, timeout_s: float | None) -> None:
        """The group has a timeout of its own."""
        if op == "avg":  # Gloo knows none, and in 16 bits the sum must not overflow where the mean does not
            x /= self._group.size()
            op = "sum"
        kind = getattr(self._dist.ReduceOp, "PRODUCT" if op == "prod" else op.upper())
        self._dist.all_reduce(x, op=kind, group=self._group)

    def abort(self, why: str) -> None:
        """Ends what can be ended: an engine without such a thing runs into its own timeout."""
        try:
            self._group.abort()
        except Exception:  # what it does is the backend's own, and some have no such thing
            return


def count_rails(hosts: list[int]) -> int:
    """As many as ranks on the smallest host. `hosts`: the number of every rank's host."""
    return min(hosts.count(host) for host in set(hosts))


def rail_of(hosts: list[int], rank: int) -> int | None:
    """The rail of `rank`, or None: it is on none."""
    number = hosts[:rank].count(hosts[rank])
    return number if number < count_rails(hosts) else None


def rails_of(hosts: list[int]) -> list[list[int]]:
    """The ranks of every rail, for making process groups of them."""
    found: list[list[int]] = [[] for _ in range(count_rails(hosts))]
    for rank in range(len(hosts)):
        rail = rail_of(hosts, rank)
        if rail is not None:
            found[rail].append(rank)
    return found


def block_sizes(count: int, world_size: int, rails: int) -> list[int]:
    """Elements of every local rank's block: nearly equal ones for the first `rails` ranks, none for the others."""
    bounds = [count * rail // rails for rail in range(rails + 1)]
    sizes = [high - low for low, high in itertools.pairwise(bounds)]
    return sizes + [0] * (world_size - rails)


def _member(comm: Communicator | None) -> Communicator:
    assert comm is not None  # every rank gave a color
    return comm


def _is_floating(flat: Any) -> bool:
    return bool(flat.is_floating_point() or flat.is_complex()) if is_torch(flat) else flat.dtype.kind in "fc"


def _divide(x: Any, divisor: int) -> None:
    """Whole numbers, towards zero, as the core divides."""
    below = (x % divisor != 0) & (x < 0)
    x //= divisor
    x += below
