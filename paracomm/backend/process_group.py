"""The process group: torch.distributed's calls, under the old and the new name of each, as calls of a Communicator.

Synchronous calls run in the caller's thread. Asynchronous ones are queued, and run by whoever waits for them first or,
if nobody does, by the core's progress thread. Those of a GPU's tensors are on streams, and nobody runs them: a
synchronous call returns when the current stream waits for it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import _profiler_enabled

from paracomm.backend import sparse
from paracomm.backend.devices import Devices, device_types
from paracomm.backend.mapped import BucketMapper
from paracomm.backend.monitor import monitored_barrier
from paracomm.backend.point_to_point import PointToPoint
from paracomm.backend.tensors import flat, movable, pack, reducible, restored, room, unpack
from paracomm.backend.trace import named
from paracomm.backend.work import COMPLETED, Publisher, Work, seconds
from paracomm.comm import Communicator
from paracomm.comm.compiled import untraced
from paracomm.errors import InvalidArgument
from paracomm.timeline import record

Tensor = torch.Tensor
Tensors = Sequence[Tensor]

OPS = {
    dist.ReduceOp.SUM: "sum",
    dist.ReduceOp.AVG: "avg",
    dist.ReduceOp.PRODUCT: "prod",
    dist.ReduceOp.MIN: "min",
    dist.ReduceOp.MAX: "max",
    dist.ReduceOp.BAND: "band",
    dist.ReduceOp.BOR: "bor",
    dist.ReduceOp.BXOR: "bxor",
}


# To ask a ReduceOp for its kind takes 1.5 us, for its hash a third of that. Where the hash is not the kind's: nothing.
_kinds = [(dist.ReduceOp(kind), dist.ReduceOp(kind), name) for kind, name in OPS.items()]
_BY_HASH = {hash(one): name for one, _, name in _kinds} if all(hash(a) == hash(b) for a, b, _ in _kinds) else {}
_NO_TIME = timedelta(0)


class ProcessGroup(dist.ProcessGroup):
    """A torch.distributed process group over a Communicator, for tensors of the CPU and of this rank's GPU.

    Raises paracomm's errors, which are RuntimeErrors: PeerLost, Timeout and Mismatch on every surviving rank, and
    InvalidArgument (also a ValueError) before anything is sent.
    """

    def __init__(self, comm: Communicator, store: Any, settings: Mapping[str, Any], name: str) -> None:
        super().__init__(comm.rank, comm.world_size)  # type: ignore[call-arg]  # with a store, it wants backends of C++
        self.comm = comm
        self._store, self._settings = store, settings
        self._name, self._desc = name, "undefined"
        self._fast: Any = comm.fast_all_reduce
        self._timeout_s: float | None = None
        self._publisher = Publisher()
        self._mapper = BucketMapper(comm)
        self._between_hosts = len(set(comm.host_indices)) > 1
        self._devices = Devices(comm)
        self._p2p = PointToPoint(comm)
        self._splits = self._monitored = self._sequence = 0

    # --- who we are ---
    def getBackendName(self) -> str:
        return "paracomm"

    def getRank(self) -> int:
        return self.comm.rank

    def getSize(self) -> int:
        return self.comm.world_size

    def getGroupName(self) -> str:
        return self._name

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupDesc(self) -> str:
        return self._desc

    def setGroupDesc(self, desc: str) -> None:
        self._desc = desc

    _set_group_name, _set_group_desc = setGroupName, setGroupDesc

    @property
    def _device_types(self) -> list[torch.device]:
        return device_types()

    def _get_backend(self, device: Any) -> Any:
        kind = torch.device(device).type
        if kind not in [known.type for known in self._device_types]:
            raise RuntimeError(f"No backend type associated with device type {kind}")
        return self

    def _get_backend_name(self) -> str:
        return "paracomm"

    name = _get_backend_name
    supports_splitting = supports_coalescing = supports_time_estimate = False

    def get_group_store(self) -> Any:
        return self._store

    def _set_sequence_number_for_group(self) -> None:
        pass

    # --- its end, its timeout ---
    def set_timeout(self, timeout: timedelta) -> None:
        """Of every later operation that brings none of its own."""
        self._timeout_s = timeout.total_seconds()
        self._fast = lambda *_: None  # knows the communicator's timeout only

    _set_default_timeout = set_timeout

    def shutdown(self) -> None:
        """Leaves. Peers that still need this rank raise PeerLost."""
        self._devices.close()
        self.comm.close()

    def abort(self) -> None:
        """Gives up on every rank."""
        why = "abort() was called on the process group"
        self._devices.abort(why)
        self.comm.abort(why)
        self.shutdown()

    # --- how a call runs ---
    def _run(
        self, opts: Any, value: list[Tensor], call: Callable[..., Any], *args: Any,
        finish: Callable[[], None] | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """`call` of the communicator as `opts` say: at once, or as a Work whose future holds `value`."""
        timeout_s = self._limit(opts)
        if not getattr(opts, "asyncOp", True):
            call(*args, timeout_s=timeout_s, **kwargs)
            if finish is not None:
                finish()
            return COMPLETED
        part = call(*args, timeout_s=timeout_s, async_op=True, **kwargs)
        if part.joins:
            return self._devices.work(part, value, args, finish)
        return Work([part], value, finish, self._publisher, self._between_hosts)

    def _limit(self, opts: Any) -> float | None:
        own = seconds(getattr(opts, "timeout", None))
        return self._timeout_s if own is None else own

    def use_between(self, groups: Sequence[Any]) -> None:
        """From now on all_reduce of device memory goes between hosts by these process groups, one a rail. Collective,
        before this group's first such all_reduce.

            rails = paracomm.comm.rails.rails_of(group.comm.host_indices)
            group.use_between([dist.new_group(ranks, backend="nccl") for ranks in rails])

        Raises InvalidArgument where they do not fit the rails, or it is too late.
        """
        self._devices.use_between(groups)

    # --- all to all ---
    def allreduce(self, tensors: Tensors | Tensor, opts: Any = None, timeout: timedelta | None = None) -> Any:
        if not isinstance(opts, dist.AllreduceOptions):  # the short form: allreduce(tensor, op)
            opts = _options(dist.AllreduceOptions, reduceOp=opts, timeout=timeout)
        if isinstance(tensors, Tensor):
            tensors = [tensors]
        asks_async = getattr(opts, "asyncOp", True)  # torch 2.6 does not say: it waits for the Work itself
        by_reducer = asks_async and _asked_by_reducer()
        if by_reducer:
            self._mapper.notice(tensors[0])
        waits = not asks_async or (by_reducer and not self._between_hosts)
        seen = _profiler_enabled() or record.current is not None
        if waits and len(tensors) == 1 and not seen and not opts.timeout > _NO_TIME:
            try:
                if self._fast(tensors[0], op_name(opts.reduceOp), None):
                    return Work([], list(tensors), None, self._publisher) if asks_async else COMPLETED
            except InvalidArgument:
                pass  # it takes dense tensors of its own dtypes only
        return self._all_reduce(tensors, opts)

    @named("all_reduce")
    def _all_reduce(self, tensors: Tensors, opts: Any) -> Any:
        op = op_name(opts.reduceOp)
        if len(tensors) > 1:
            return self._all_reduce_coalesced(tensors, opts)
        if tensors[0].layout != torch.strided:
            return sparse.all_reduce(self.comm, tensors[0], op, self._limit(opts))
        source = reducible(tensors[0].detach(), op)
        return self._run(opts, list(tensors), self._devices.all_reducer(source), source, op)

    @named("all_reduce_coalesced")
    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> Any:
        return self._all_reduce_coalesced(tensors, opts or _options(dist.AllreduceCoalescedOptions))

    def _all_reduce_coalesced(self, tensors: Tensors, opts: Any) -> Any:
        op = op_name(opts.reduceOp)
        real = [reducible(tensor.detach(), op) for tensor in tensors]
        whole = pack(real)
        return self._run(
            opts, list(tensors), self._devices.all_reducer(whole), whole, op, finish=lambda: unpack(whole, real)
        )

    @named("all_gather", inputs=1)
    def allgather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> Any:
        """The future is NCCL's, which torch's quantisation hooks take apart: [all outputs, one after the other]; where
        they differ in size, a list of them."""
        source = movable(inputs[0].detach())
        outs = [movable(out.detach()) for out in outputs[0]]
        _need(len(outs) == self.comm.world_size, "all_gather", f"{len(outs)} outputs for {self.comm.world_size} ranks")
        _need(all(out.dtype == source.dtype for out in outs), "all_gather", "input and outputs differ in dtype")
        rows = [out.numel() for out in outs]
        target, copied = room(outs)
        finish = (lambda: unpack(target, outs)) if copied else None
        if len(set(rows)) == 1 and rows[0] == source.numel():
            value = [restored(target, outputs[0])] if getattr(opts, "asyncOp", True) else []
            return self._run(opts, value, self.comm.all_gather, source, out=target, finish=finish)
        return self._run(opts, list(outputs[0]), self.comm.all_gather_v, flat(source), out=target, rows=rows,
                         finish=finish)  # fmt: skip

    @named("all_gather_single", inputs=1)
    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        return self._all_gather_single(output, input, opts)

    def _all_gather_single(self, output: Tensor, input: Tensor, opts: Any) -> Any:
        return self._run(opts, [output], self.comm.all_gather, movable(input.detach()), out=movable(output.detach()))

    @named("all_gather_coalesced", inputs=1)
    def allgather_coalesced(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> Any:
        """outputs[rank][i] becomes rank's inputs[i]."""
        _need(len(outputs) == self.comm.world_size, "all_gather_coalesced", "one list for every rank")
        sources = [movable(tensor.detach()) for tensor in inputs]
        outs = [movable(tensor.detach()) for row in outputs for tensor in row]
        target = outs[0].new_empty(sum(out.numel() for out in outs))
        value = [tensor for row in outputs for tensor in row]
        return self._run(opts, value, self.comm.all_gather, pack(sources), out=target,
                         finish=lambda: unpack(target, outs))  # fmt: skip

    @named("all_gather_single_coalesced", inputs=1)
    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Any:
        """outputs[i] becomes every rank's inputs[i], one after the other."""
        world_size = self.comm.world_size
        if len(outputs) == 1:
            return self._all_gather_single(outputs[0], inputs[0], opts)
        sources = [movable(tensor.detach()) for tensor in inputs]
        outs = [movable(tensor.detach()) for tensor in outputs]
        target = sources[0].new_empty((world_size, sum(source.numel() for source in sources)))

        def finish() -> None:
            parts = target.split([source.numel() for source in sources], dim=1)
            with torch.no_grad():
                for out, part in zip(outs, parts, strict=True):
                    out.copy_(part.reshape(out.shape))

        return self._run(opts, list(outputs), self.comm.all_gather, pack(sources), out=target, finish=finish)

    @named("reduce_scatter", inputs=1)
    def reduce_scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any = None) -> Any:
        opts = opts or _options(dist.ReduceScatterOptions)
        op = op_name(opts.reduceOp)
        out = reducible(outputs[0].detach(), op)
        sources = [reducible(tensor.detach(), op) for tensor in inputs[0]]
        _need(len(sources) == self.comm.world_size, "reduce_scatter", f"{len(sources)} inputs")
        rows = [source.numel() for source in sources]
        whole = pack(sources)
        if len(set(rows)) == 1:
            return self._run(opts, list(outputs), self.comm.reduce_scatter, whole, op, out=out)
        return self._run(opts, list(outputs), self.comm.reduce_scatter_v, whole, rows, op, out=out)

    @named("reduce_scatter_single", inputs=1)
    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        return self._reduce_scatter_single(output, input, opts or _options(dist.ReduceScatterOptions))

    def _reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any) -> Any:
        op = op_name(opts.reduceOp)
        source, out = reducible(input.detach(), op), reducible(output.detach(), op)
        return self._run(opts, [output], self.comm.reduce_scatter, source, op, out=out)

    @named("reduce_scatter_single_coalesced", inputs=1)
    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Any:
        """outputs[i] becomes this rank's block of the reduction of inputs[i]."""
        opts = opts or _options(dist.ReduceScatterOptions)
        if len(outputs) == 1:
            return self._reduce_scatter_single(outputs[0], inputs[0], opts)
        op, world_size = op_name(opts.reduceOp), self.comm.world_size
        sources = [reducible(tensor.detach(), op) for tensor in inputs]
        outs = [reducible(tensor.detach(), op) for tensor in outputs]
        whole = torch.cat([source.reshape(world_size, -1) for source in sources], dim=1)
        target, copied = room(outs)
        finish = (lambda: unpack(target, outs)) if copied else None
        return self._run(opts, list(outputs), self.comm.reduce_scatter, whole, op, out=target, finish=finish)

    @named("all_to_all", inputs=1)
    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None, opts: Any = None,
    ) -> Any:  # fmt: skip
        source, out = movable(input.detach()), movable(output.detach())
        if not output_splits and not input_splits:
            _need(source.dim() > 0 and len(source) % self.comm.world_size == 0, "all_to_all_single",
                  f"dimension 0 of {tuple(source.shape)} does not divide by {self.comm.world_size}")  # fmt: skip
            return self._run(opts, [output], self.comm.all_to_all, source, out=out)
        sends = flat(source).split(self._blocks("input", source, input_splits))
        target = flat(out)
        finish = None if out.is_contiguous() else lambda: unpack(target, [out])
        return self._exchange(opts, [output], target.split(self._blocks("output", out, output_splits)), sends, finish)

    def _blocks(self, what: str, tensor: Tensor, splits: Sequence[int] | None) -> list[int]:
        """Elements of every rank's block of a tensor that is split along dimension 0."""
        n, rows = self.comm.world_size, len(tensor)
        splits = list(splits) if splits else [rows // n] * n
        _need(len(splits) == n and sum(splits) == rows, "all_to_all_single",
              f"{what} splits {splits} do not fit dimension 0 of {tuple(tensor.shape)} and {n} ranks")  # fmt: skip
        return [rows * math.prod(tensor.shape[1:]) for rows in splits]

    @named("all_to_all", inputs=1)
    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Any:
        n = self.comm.world_size
        _need(len(outputs) == n == len(inputs), "all_to_all", f"{len(outputs)} outputs, {len(inputs)} inputs")
        outs = [movable(tensor.detach()) for tensor in outputs]
        targets = [flat(out) for out in outs]
        strided = [(t, o) for t, o in zip(targets, outs, strict=True) if not o.is_contiguous()]

        def finish() -> None:
            for target, out in strided:
                unpack(target, [out])

        sends = [flat(movable(tensor.detach())) for tensor in inputs]
        return self._exchange(opts, list(outputs), targets, sends, finish if strided else None)

    def _exchange(
        self, opts: Any, value: list[Tensor], recvs: Tensors, sends: Tensors, finish: Callable[[], None] | None
    ) -> Any:
        """Blocks of any size to and from every rank. Each pair knows its own sizes, so no rank asks for the others';
        on a device all ranks' blocks are cut into as many pieces, and they have to."""
        if self._devices.has(sends[0]):
            return self._exchange_on_device(opts, value, recvs, sends, finish)
        work = Work(self._p2p.exchange(recvs, sends, self._limit(opts)), value, finish)
        if getattr(opts, "asyncOp", True):
            return work
        work.wait()
        return COMPLETED

    def _exchange_on_device(
        self, opts: Any, value: list[Tensor], recvs: Tensors, sends: Tensors, finish: Callable[[], None] | None
    ) -> Any:
        target, copied = room(recvs)

        def unpacked() -> None:
            if copied:
                unpack(target, recvs)
            if finish is not None:
                finish()

        send_rows, recv_rows = [len(block) for block in sends], [len(block) for block in recvs]
        return self._run(opts, value, self.comm.all_to_all_v, pack(sends), send_rows, recv_rows, out=target,
                         finish=unpacked)  # fmt: skip

    @named("barrier")
    def barrier(self, opts: Any = None) -> Any:
        """On a GPU too: what any stream of it holds is complete on every rank afterwards, as with NCCL."""
        self._devices.synchronize()
        return self._run(opts, [], self.comm.barrier)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Like barrier; rank 0 raises with the ranks that did not come in time. The group is of use afterwards."""
        self._monitored += 1
        limit_s = self.comm.timeout_s if timeout is None else timeout.total_seconds()
        monitored_barrier(self._store, self.comm, self._monitored, limit_s, wait_all_ranks)

    # --- from one, to one ---
    @named("broadcast")
    def broadcast(self, tensors: Tensors | Tensor, opts: Any = None) -> Any:
        if not isinstance(opts, dist.BroadcastOptions):  # the short form: broadcast(tensor, root)
            opts = _options(dist.BroadcastOptions, rootRank=opts)
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors
        return self._run(opts, list(tensors), self.comm.broadcast, movable(tensors[0].detach()), opts.rootRank)

    @named("reduce")
    def reduce(self, tensors: Tensors, opts: Any = None) -> Any:
        opts = opts or _options(dist.ReduceOptions)
        op = op_name(opts.reduceOp)
        source = reducible(tensors[0].detach(), op)
        return self._run(opts, list(tensors), self.comm.reduce, source, opts.rootRank, op)

    @named("gather", inputs=1)
    def gather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> Any:
        opts = opts or _options(dist.GatherOptions)
        source = movable(inputs[0].detach())
        if self.comm.rank != opts.rootRank:
            _need(not outputs, "gather", f"rank {self.comm.rank} is not the root {opts.rootRank} and has no outputs")
            return self._run(opts, [], self.comm.gather, source, opts.rootRank)
        _need(len(outputs) == 1 and len(outputs[0]) == self.comm.world_size, "gather", "one output for every rank")
        outs = [movable(out.detach()) for out in outputs[0]]
        _need(all(out.dtype == source.dtype and out.numel() == source.numel() for out in outs), "gather",
              "outputs differ from the input in dtype or size")  # fmt: skip
        target, copied = room(outs)
        finish = (lambda: unpack(target, outs)) if copied else None
        return self._run(opts, list(outputs[0]), self.comm.gather, source, opts.rootRank, out=target, finish=finish)

    @named("scatter", inputs=1)
    def scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any = None) -> Any:
        opts = opts or _options(dist.ScatterOptions)
        out = movable(outputs[0].detach())
        if self.comm.rank != opts.rootRank:
            _need(not inputs, "scatter", f"rank {self.comm.rank} is not the root {opts.rootRank} and has no inputs")
            return self._run(opts, list(outputs), self.comm.scatter, None, opts.rootRank, out=out)
        _need(len(inputs) == 1 and len(inputs[0]) == self.comm.world_size, "scatter", "one input for every rank")
        sources = [movable(tensor.detach()) for tensor in inputs[0]]
        _need(all(s.dtype == out.dtype and s.numel() == out.numel() for s in sources), "scatter",
              "inputs differ from the output in dtype or size")  # fmt: skip
        return self._run(opts, list(outputs), self.comm.scatter, pack(sources), opts.rootRank, out=out)

    # --- point to point ---
    @named("send")
    def send(self, tensors: Tensors, dst: int, tag: int = 0) -> Any:
        return self._p2p.send(tensors[0], dst, tag, self._timeout_s)

    @named("recv")
    def recv(self, tensors: Tensors, src: int, tag: int = 0) -> Any:
        return self._p2p.recv(tensors[0], src, tag, self._timeout_s)

    @named("recvAnySource")
    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> Any:
        return self._p2p.recv(tensors[0], None, tag, self._timeout_s)

    # --- smaller groups ---
    def split_group(
        self, ranks: Sequence[int], timeout: timedelta | None = None, opts: Any = None, group_name: str | None = None,
        group_desc: str | None = None, device_types: Any = None,
    ) -> ProcessGroup | None:  # fmt: skip
        """A group of `ranks` of this one; None on the others. Every rank of this group calls it, with its own list."""
        from paracomm.backend.create import connect_group

        self._splits += 1
        ranks = sorted(ranks)
        if self.comm.rank not in ranks:
            return None
        name = group_name or f"{self._name}:split:{self._splits}"
        store = dist.PrefixStore(f"split/{self._splits}/{'-'.join(map(str, ranks))}/", self._store)
        limit = timeout or timedelta(seconds=self._timeout_s or self.comm.timeout_s)
        group = connect_group(store, ranks.index(self.comm.rank), len(ranks), limit, self._settings, name)
        if group_desc is not None:
            group.setGroupDesc(group_desc)
        return group

    splitGroup = split_group

    # --- the names before torch 2.13 ---
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


# What torch knows of a process group (its name, its size), it takes into its graphs.
untraced(ProcessGroup, calls_too=False)


def _asked_by_reducer() -> bool:
    """Whether C++ called us inside a backward pass: DistributedDataParallel, which asks for the future at once. On one
    host that is waited for (see Work.get_future), and to run the operation right here saves two changes of thread."""
    try:
        return sys._getframe(2).f_code.co_name == "_engine_run_backward"
    except ValueError:  # a thread of C++, which runs a backward pass of distributed autograd or of a GPU
        return True


def op_name(op: Any) -> str:
    """ "sum" for ReduceOp.SUM. Raises InvalidArgument for what the core does not reduce by."""
    name = _BY_HASH.get(hash(op))
    if name is not None and type(op) is dist.ReduceOp:
        return name
    kind = getattr(op, "op", op)
    if kind not in OPS:
        raise InvalidArgument(f"reduction {kind} is not supported; there are {', '.join(OPS.values())}")
    return OPS[kind]


def _need(good: bool, what: str, why: str) -> None:
    if not good:
        raise InvalidArgument(f"{what}: {why}")


def _options(kind: Any, **values: Any) -> Any:
    options = kind()
    for name, value in values.items():
        if value is not None:
            setattr(options, name, value)
    return options
