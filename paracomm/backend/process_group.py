"""The process group: torch.distributed's calls, under the old and the new name of each, as calls of a Communicator.

Synchronous calls run in the caller's thread. Asynchronous ones are queued, and run by whoever waits for them first or,
if nobody does, by the core's progress thread. Those of a GPU's tensors are on streams, and nobody runs them: a
synchronous call returns when the current stream waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _len_torch_dispatch_stack
from torch.autograd import _profiler_enabled

from paracomm.backend import dispatch, sparse
from paracomm.backend.devices import Devices, device_types
from paracomm.backend.mapped import BucketMapper
from paracomm.backend.monitor import monitored_barrier
from paracomm.backend.point_to_point import PointToPoint
from paracomm.backend.tensors import Several, alike
from paracomm.backend.trace import named
from paracomm.backend.work import (
    COMPLETED,
    Backward,
    DeviceWork,
    Past,
    Publisher,
    Work,
    called_from_python,
    seconds,
)  # fmt: skip
from paracomm.comm import Communicator, device
from paracomm.comm.arguments import block_rows, rank_of
from paracomm.comm.arrays import known, native, view, writable_view
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
        self.twin = dist.ProcessGroup(comm.rank, comm.world_size)  # type: ignore[call-arg]
        """What the dispatcher sees in place of this one, see dispatch.py."""
        self.comm = comm
        self._store, self._settings = store, settings
        self._name, self._desc = name, "undefined"
        self._fast: Any = comm.fast_all_reduce
        self._timeout_s: float | None = None
        self._publisher, self._backward = Publisher(), Backward(comm.kick)
        self._mapper = BucketMapper(comm)
        self._devices = Devices(comm)
        self._later = len(set(comm.host_indices)) == 1 and device.mode() is None
        self._p2p = PointToPoint(comm)
        self._exchanged: list[Any] = []  # parts of exchanges that may be under way
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
        limit_s = seconds(timeout)
        if limit_s is None:
            raise InvalidArgument(f"set_timeout: {timeout} is no time")
        self._timeout_s = limit_s
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
        self, opts: Any, value: Callable[[], list[Tensor]] | list[Tensor], calls: Sequence[Callable[..., Any]]
    ) -> Any:
        """Calls of the communicator as `opts` say: at once, or as a Work whose future holds `value`."""
        timeout_s = self._limit(opts)
        if not getattr(opts, "asyncOp", True):
            for call in calls:
                call(timeout_s=timeout_s)
            return COMPLETED
        parts = [call(timeout_s=timeout_s, async_op=True) for call in calls]
        if parts[-1].joins:
            return DeviceWork(parts, value, self._devices.side_of((value() if callable(value) else value)[0]))
        return Work(parts, value, self._publisher, self._backward)

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
        # torch 2.6 does not say that a call is synchronous: it waits for the Work itself.
        if not getattr(opts, "asyncOp", True) and len(tensors) == 1 and not opts.timeout > _NO_TIME:
            watched = _profiler_enabled() or record.current is not None or _len_torch_dispatch_stack()
            if not watched and self._fast(tensors[0], op_name(opts.reduceOp), None):
                return COMPLETED
        if dispatch.is_seen((tensors,)):
            return dispatch.send(self, "allreduce", type(self)._all_reduce, tensors, opts)
        if not called_from_python("allreduce"):  # DistributedDataParallel's reducer did
            self._mapper.notice(tensors[0])
            dense = len(tensors) == 1 and tensors[0].layout == torch.strided and tensors[0].device.type == "cpu"
            if self._later and dense and getattr(opts, "asyncOp", True):
                return self._reduce_later(tensors, opts)
        return self._all_reduce(tensors, opts)

    @named("all_reduce")
    def _reduce_later(self, tensors: Tensors, opts: Any) -> Any:
        """What the reducer asks for, to be begun at the end of the backward pass (see Backward): 8 buckets of 4 MiB on
        2 ranks and cores take 48 ms a step instead of 60 on the progress thread, 20 of 16 KiB 1.65 instead of 1.95."""
        part = self.comm.all_reduce_later(tensors[0], op_name(opts.reduceOp), timeout_s=self._limit(opts))
        self._backward.called()
        return Work([part], list(tensors), self._publisher, self._backward)

    @named("all_reduce")
    def _all_reduce(self, tensors: Tensors, opts: Any) -> Any:
        if len(tensors) == 1 and tensors[0].layout != torch.strided:
            sparse.all_reduce(self.comm, tensors[0], op_name(opts.reduceOp), self._limit(opts))
            return self._run(opts, list(tensors), [_over])
        return self._all_reduce_coalesced(tensors, opts)

    @named("all_reduce_coalesced")
    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> Any:
        return self._all_reduce_coalesced(tensors, opts or _options(dist.AllreduceCoalescedOptions))

    def _all_reduce_coalesced(self, tensors: Tensors, opts: Any) -> Any:
        op = op_name(opts.reduceOp)
        if len(tensors) == 1:
            return self._run(opts, list(tensors), [partial(self._devices.all_reducer(tensors[0]), tensors[0], op)])
        calls = [
            partial(self._devices.all_reducer(same.arrays[0]), same.one(), op)
            for (same,) in alike("all_reduce", tensors)
        ]
        return self._run(opts, list(tensors), calls)

    @named("all_gather", inputs=1)
    def allgather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> Any:
        """The future is NCCL's, which torch's quantisation hooks take apart: [all outputs, one after the other]; where
        they differ in size, a list of them."""
        source, outs = inputs[0], list(outputs[0])
        _need(len(outs) == self.comm.world_size, "all_gather", f"{len(outs)} outputs for {self.comm.world_size} ranks")
        _need(all(out.dtype == source.dtype for out in outs), "all_gather", "input and outputs differ in dtype")
        rows = [out.numel() for out in outs]
        target = Several(outs)
        if len(set(rows)) == 1 and rows[0] == source.numel():
            return self._run(opts, lambda: [_stacked(target, outs)],
                             [partial(self.comm.all_gather, source, out=target)])  # fmt: skip
        call = partial(self.comm.all_gather_v, source.detach().reshape(-1), out=target, rows=rows)
        return self._run(opts, outs, [call])

    @named("all_gather_single", inputs=1)
    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        return self._run(opts, [output], [partial(self.comm.all_gather, input, out=output)])

    @named("all_gather_coalesced", inputs=1)
    def allgather_coalesced(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> Any:
        """outputs[rank][i] becomes rank's inputs[i]."""
        what = "all_gather_coalesced"
        _need(len(outputs) == self.comm.world_size, what, "one list for every rank")
        _need(all(len(row) == len(inputs) for row in outputs), what, f"{len(inputs)} outputs for every rank")
        calls = []
        for sources, *rows in alike(what, inputs, *outputs):
            target = Several([out for row in rows for out in row.arrays])
            calls.append(partial(self.comm.all_gather, sources.one(), out=target))
        return self._run(opts, [tensor for row in outputs for tensor in row], calls)

    @named("all_gather_single_coalesced", inputs=1)
    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Any:
        """outputs[i] becomes every rank's inputs[i], one after the other."""
        what = "all_gather_single_coalesced"
        _need(len(outputs) == len(inputs), what, f"{len(outputs)} outputs for {len(inputs)} inputs")
        calls = []
        for sources, outs in alike(what, inputs, outputs):
            target = outs.by_rank(what, self.comm.world_size, written=True)
            calls.append(partial(self.comm.all_gather, sources.one(), out=target))
        return self._run(opts, list(outputs), calls)

    @named("reduce_scatter", inputs=1)
    def reduce_scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any = None) -> Any:
        opts = opts or _options(dist.ReduceScatterOptions)
        op = op_name(opts.reduceOp)
        _need(len(inputs[0]) == self.comm.world_size, "reduce_scatter", f"{len(inputs[0])} inputs")
        source, out = Several(inputs[0]), outputs[0]
        rows = [tensor.numel() for tensor in inputs[0]]
        if len(set(rows)) == 1:
            return self._run(opts, list(outputs), [partial(self.comm.reduce_scatter, source, op, out=out)])
        return self._run(opts, list(outputs), [partial(self.comm.reduce_scatter_v, source, rows, op, out=out)])

    @named("reduce_scatter_single", inputs=1)
    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        opts = opts or _options(dist.ReduceScatterOptions)
        call = partial(self.comm.reduce_scatter, input, op_name(opts.reduceOp), out=output)
        return self._run(opts, [output], [call])

    @named("reduce_scatter_single_coalesced", inputs=1)
    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Any:
        """outputs[i] becomes this rank's block of the reduction of inputs[i]."""
        what, opts = "reduce_scatter_single_coalesced", opts or _options(dist.ReduceScatterOptions)
        _need(len(outputs) == len(inputs), what, f"{len(outputs)} outputs for {len(inputs)} inputs")
        op, calls = op_name(opts.reduceOp), []
        for sources, outs in alike(what, inputs, outputs):
            source = sources.by_rank(what, self.comm.world_size)
            calls.append(partial(self.comm.reduce_scatter, source, op, out=outs.one()))
        return self._run(opts, list(outputs), calls)

    @named("all_to_all", inputs=1)
    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None, opts: Any = None,
    ) -> Any:  # fmt: skip
        what = "all_to_all_single"
        view(known(native(input)))
        writable_view(what, native(output))
        for tensor in (input, output):
            # torch has made a pair of numbers of it, whose halves would go to different ranks.
            base = tensor._base
            _need(base is None or not base.is_complex() or tensor.shape != (2,) or tensor.stride() != (1,), what,
                  "a complex tensor without dimensions cannot be split")  # fmt: skip
        output_splits, input_splits = _splits(output_splits), _splits(input_splits)
        if output_splits is None and input_splits is None:
            _need(input.dim() > 0 and len(input) % self.comm.world_size == 0, what,
                  f"dimension 0 of {tuple(input.shape)} does not divide by {self.comm.world_size}")  # fmt: skip
            return self._run(opts, [output], [partial(self.comm.all_to_all, input, out=output)])
        sends, recvs = self._blocks("input", input, input_splits), self._blocks("output", output, output_splits)
        return self._exchange(what, opts, [output], recvs, sends)

    def _blocks(self, what: str, tensor: Tensor, splits: Sequence[int] | None) -> list[Tensor]:
        """Every rank's block of a tensor that is split along dimension 0."""
        _need(tensor.dim() > 0, "all_to_all_single", f"the {what} has no dimension to split")
        n, rows = self.comm.world_size, len(tensor)
        splits = (
            block_rows(f"all_to_all_single: {what}_split_sizes", splits, n) if splits is not None else [rows // n] * n
        )
        _need(sum(splits) == rows, "all_to_all_single",
              f"{what} splits {splits} do not fit dimension 0 of {tuple(tensor.shape)} and {n} ranks")  # fmt: skip
        return list(tensor.detach().split(splits))

    @named("all_to_all", inputs=1)
    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Any:
        n = self.comm.world_size
        _need(len(outputs) == n == len(inputs), "all_to_all", f"{len(outputs)} outputs, {len(inputs)} inputs")
        return self._exchange("all_to_all", opts, list(outputs), outputs, inputs)

    def _exchange(self, what: str, opts: Any, value: list[Tensor], recvs: Tensors, sends: Tensors) -> Any:
        """Blocks of any size to and from every rank. Each pair knows its own sizes, so no rank asks for the others';
        on a device all ranks' blocks are cut into as many pieces, and they have to."""
        dtypes = {tensor.dtype for tensor in (*recvs, *sends)}
        _need(len(dtypes) == 1, what, f"blocks of {', '.join(sorted(map(str, dtypes)))}, expected one dtype")
        if self._devices.has(sends[0]):
            rows = [block.numel() for block in sends], [block.numel() for block in recvs]
            return self._run(opts, value, [partial(self.comm.all_to_all_v, Several(sends), *rows, out=Several(recvs))])
        parts = self._p2p.exchange(what, list(recvs), list(sends), self._limit(opts))
        work = Work(parts, value, self._publisher, self._backward)
        if getattr(opts, "asyncOp", True):
            self._exchanged = [part for part in (*self._exchanged, *parts) if not part.done()]
            return work
        work.wait()
        return COMPLETED

    @named("barrier")
    def barrier(self, opts: Any = None) -> Any:
        """All collectives before it are complete afterwards, those that nobody waited for and exchanges of blocks too.
        On a GPU as well: what any stream of it holds is complete on every rank, as with NCCL."""
        self._devices.synchronize()
        exchanged, self._exchanged = self._exchanged, []
        return self._run(opts, [], [self.comm.barrier, *(partial(_waited, part) for part in exchanged)])

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Like barrier; rank 0 raises with the ranks that did not come in time. The group is of use afterwards."""
        self._monitored += 1
        limit_s = seconds(timeout) or (0.0 if timeout == _NO_TIME else self.comm.timeout_s)  # here 0 is a time
        monitored_barrier(self._store, self.comm, self._monitored, limit_s, wait_all_ranks)

    # --- from one, to one ---
    @named("broadcast")
    def broadcast(self, tensors: Tensors | Tensor, opts: Any = None) -> Any:
        if not isinstance(opts, dist.BroadcastOptions):  # the short form: broadcast(tensor, root)
            opts = _options(dist.BroadcastOptions, rootRank=opts)
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors
        return self._run(opts, list(tensors), [partial(self.comm.broadcast, tensors[0], opts.rootRank)])

    @named("reduce")
    def reduce(self, tensors: Tensors, opts: Any = None) -> Any:
        opts = opts or _options(dist.ReduceOptions)
        call = partial(self.comm.reduce, tensors[0], opts.rootRank, op_name(opts.reduceOp))
        return self._run(opts, list(tensors), [call])

    @named("gather", inputs=1)
    def gather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> Any:
        opts = opts or _options(dist.GatherOptions)
        source = inputs[0]
        if self.comm.rank != opts.rootRank:
            _need(not outputs, "gather", f"rank {self.comm.rank} is not the root {opts.rootRank} and has no outputs")
            return self._run(opts, [], [partial(self.comm.gather, source, opts.rootRank)])
        _need(len(outputs) == 1 and len(outputs[0]) == self.comm.world_size, "gather", "one output for every rank")
        outs = list(outputs[0])
        _need(all(out.dtype == source.dtype and out.numel() == source.numel() for out in outs), "gather",
              "outputs differ from the input in dtype or size")  # fmt: skip
        return self._run(opts, outs, [partial(self.comm.gather, source, opts.rootRank, out=Several(outs))])

    @named("scatter", inputs=1)
    def scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any = None) -> Any:
        opts = opts or _options(dist.ScatterOptions)
        out = outputs[0]
        if self.comm.rank != opts.rootRank:
            _need(not inputs, "scatter", f"rank {self.comm.rank} is not the root {opts.rootRank} and has no inputs")
            return self._run(opts, list(outputs), [partial(self.comm.scatter, None, opts.rootRank, out=out)])
        _need(len(inputs) == 1 and len(inputs[0]) == self.comm.world_size, "scatter", "one input for every rank")
        sources = list(inputs[0])
        _need(all(s.dtype == out.dtype and s.numel() == out.numel() for s in sources), "scatter",
              "inputs differ from the output in dtype or size")  # fmt: skip
        return self._run(opts, list(outputs), [partial(self.comm.scatter, Several(sources), opts.rootRank, out=out)])

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

        ranks = _ranks(ranks, self.comm.world_size)
        seconds(timeout)
        self._splits += 1
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


def op_name(op: Any) -> str:
    """ "sum" for ReduceOp.SUM. Raises InvalidArgument for what the core does not reduce by."""
    name = _BY_HASH.get(hash(op))
    if name is not None and type(op) is dist.ReduceOp:
        return name
    kind = getattr(op, "op", op)
    if kind not in OPS:
        raise InvalidArgument(f"reduction {kind} is not supported; there are {', '.join(OPS.values())}")
    return OPS[kind]


def _ranks(ranks: Any, world_size: int) -> list[int]:
    try:
        found = sorted(rank_of("split_group: a rank", rank, world_size) for rank in ranks)
    except TypeError:
        raise InvalidArgument(f"split_group: ranks must be a list of ranks, got {ranks!r}") from None
    _need(len(found) == len(set(found)) > 0, "split_group", f"ranks {found} are none, or one comes twice")
    return found


def _splits(given: Any) -> Any:
    """None for none: torch gives an empty list."""
    try:
        return None if given is None or len(given) == 0 else given
    except TypeError:
        return given  # no list: refused where it is used


def _over(**_: Any) -> Past:
    return Past()


def _waited(part: Any, *, timeout_s: float | None, async_op: bool = False) -> Any:
    """What is under way already, in the place of a call."""
    if not async_op:
        part.wait(timeout_s)
    return part


def _stacked(target: Several, outs: list[Tensor]) -> Tensor:
    """The outputs of an all_gather as one tensor: over their memory, if they lie so."""
    whole = target.joined()
    return torch.stack(outs) if whole is None else whole.view(len(outs), *outs[0].shape)


def _need(good: bool, what: str, why: str) -> None:
    if not good:
        raise InvalidArgument(f"{what}: {why}")


def _options(kind: Any, **values: Any) -> Any:
    options = kind()
    for name, value in values.items():
        if value is not None:
            setattr(options, name, value)
    return options
