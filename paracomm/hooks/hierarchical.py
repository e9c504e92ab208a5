"""Two levels: the ranks of a host sum in full precision, one of them averages between hosts through any other hook.

    host A: 0 1          host B: 2 3
    1 -> 0               3 -> 2              sum inside, shared memory, float32
    0 <------ hook ------> 2                 mean between the leaders: int8, PowerSGD, ... on any engine
    0 -> 1               2 -> 3              broadcast inside

    bytes that a host sends to others, h hosts: those of the hook on h ranks, 2 S (h-1)/h for allreduce_hook

The two levels need not be of one kind: ours inside, and between the leaders a process group of NCCL, MPI, UCC or Gloo,
or an mpi4py communicator, so that a cluster uses the fabric that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from paracomm.errors import InvalidArgument
from paracomm.hooks.plain import AllReduceState, first_tensor
from paracomm.hooks.state import Bucket, Finish, HookState, ddp_hook, state_for
from paracomm.hooks.wire import Wire, wire_of


class HierarchicalState(HookState):
    """Full precision inside a host, `outer` between hosts.

    Args:
        where: all ranks: a process group (None: the default one), a Communicator, a Wire.
        outer: makes the state of the hook between hosts, given the wire of the leaders (the first rank of each host);
            it is called on leaders only. None: AllReduceState.
        inside: a group or Communicator of this host's ranks; None: found by host and made from `where`.
        between: what the leaders meet on: a group, an mpi4py communicator, ...; made from `where` if None. On a rank
            that is no leader it is ignored.

    The error is that of `outer` on the means of the hosts. Raises InvalidArgument where `between` has another number of
    ranks than there are hosts.
    """

    def __init__(
        self,
        where: Any = None,
        *,
        outer: Callable[[Wire], HookState] | None = None,
        inside: Any = None,
        between: Any = None,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(where, model=model, feedback=False)
        hosts = self.wire.hosts()
        host = hosts[self.wire.rank]
        self.hosts = len(set(hosts))
        self._owned: list[Wire] = []
        if inside is None:
            self.inside: Wire = self._own(self.wire.split(host))
        else:
            self.inside = wire_of(inside)
        self._inside_again = self._own(self.inside.twin())
        leads = self.inside.rank == 0
        made: Any = self._own(self.wire.split(0 if leads else None)) if between is None else None
        self.outer: HookState | None = None
        if leads:
            wire: Wire = made if between is None else wire_of(between)
            if wire.world_size != self.hosts:
                raise InvalidArgument(f"{wire.world_size} leaders meet between {self.hosts} hosts")
            self.outer = (AllReduceState if outer is None else outer)(wire)
            self.outer.share_names(self.names)

    def _own(self, wire: Any) -> Any:
        if wire is not None:
            self._owned.append(wire)
        return wire

    def start(self, bucket: Bucket) -> Finish:
        buffer = bucket.buffer()
        work = self.inside.reduce(buffer, 0)

        def finish() -> Tensor:
            work.wait()
            if self.outer is not None:
                # Hosts of different sizes: each counts by its ranks in the mean over hosts.
                buffer.mul_(self.hosts / self.wire.world_size)
                result = first_tensor(self.outer.run(bucket).wait())
                if result.data_ptr() != buffer.data_ptr():
                    buffer.copy_(result)
            self._inside_again.broadcast(buffer, 0).wait()
            return buffer

        return finish

    def wires(self) -> list[Wire]:
        return [self.inside, self._inside_again, *([] if self.outer is None else self.outer.wires())]

    def abort(self, why: str) -> None:
        super().abort(why)
        self.wire.abort(why)

    def bytes_between(self) -> int | None:
        """Payload bytes that this rank sent to other hosts so far; 0 where it is no leader."""
        return 0 if self.outer is None else self.outer.bytes_sent()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"outer": None if self.outer is None else self.outer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.outer is not None and state["outer"] is not None:
            self.outer.load_state_dict(state["outer"])

    def close(self) -> None:
        super().close()
        if self.outer is not None:
            self.outer.close()
        for wire in self._owned:
            wire.close()


@ddp_hook
def hierarchical_hook(state: Any, bucket: Bucket) -> Any:
    """Two levels. `state`: a HierarchicalState, a process group (None: the default), a Communicator."""
    return state_for(HierarchicalState, state).run(bucket)
