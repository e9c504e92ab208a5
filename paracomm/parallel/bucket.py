"""Gradient buckets that are reduced over the ranks while backward goes on.

A parameter's gradient is a view into a bucket, a flat tensor of one dtype. Buckets are filled in the reverse order of
the parameters, which is about the order in which backward yields gradients. When a bucket has all of its gradients it
is launched, but never before the bucket ahead of it: every rank launches the same buckets in the same order, whichever
parameters its own backward touched.

    backward   | block 3 | block 2 | block 1 | embedding |
    bucket 0   |         [ reduce ]
    bucket 1   |                   [ reduce ]
    bucket 2   |                                          [ reduce ]
    finish()                                             |.............| time blocked

The first bucket is small, so that the wire is in use early (Li et al., "PyTorch Distributed", VLDB 2020).
A rank moves each gradient once into its bucket, or not at all where backward accumulates into the view.

A rank owns the part of a bucket that its optimizer steps; the stages of ZeRO (Rajbhandari et al., SC 2020) differ in
that part, and in how long the bucket lives:

    zero   owned        reduction        the bucket's memory
    0      all of it    all_reduce       as long as the reducer
    1      its block    reduce_scatter   as long as the reducer
    2, 3   its block    reduce_scatter   from its first gradient until the block is reduced

    | parameter | gap | parameter | gap | ... | padding |         parameters begin at multiples of ALIGN elements,
    |   block of rank 0   |   block of rank 1  | ...    |         blocks are of a multiple of ALIGN elements

so that no vector loop over a block, or over some parameters of it, has a tail: an element's bits do not depend on where
blocks begin. Gaps hold zeros.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from paracomm.comm import Work
from paracomm.errors import Error, InvalidArgument
from paracomm.hooks import LocalSGDState, local_sgd_hook
from paracomm.hooks.lane import keeps_order, one_at_a_time, raised_by, wait_while_well
from paracomm.parallel.gradient import ReducedGradient
from paracomm.parallel.reduction import (
    GradientCommunicator,
    Pending,
    Recycler,
    new_flat,
    start_all_reduce,
    start_reduce_scatter,
)
from paracomm.parallel.shard import shard_of
from paracomm.timeline import span

MIB = 1 << 20
ALIGN = 64
"""Elements: no vector unit, and no unrolled loop over it, takes more at a time."""
CHUNK = 1 << 16
"""Elements that are compared at a time."""
IN_FLIGHT = 2
"""Under ZeRO 2 and 3, buckets that are being reduced at a time, beside the one that is being filled."""


@dataclass
class Bucket:
    """Gradients of one dtype, side by side in `data` [count]; `views[i]` has the shape of `members[i]`.

    Hooks see the interface of torch.distributed.GradBucket: index(), buffer(), gradients(), parameters(), is_last() and
    set_buffer(). Under ZeRO 2 and 3 `data` is None while no gradients are in it.
    """

    position: int
    names: list[str]
    members: list[nn.Parameter]
    dtype: torch.dtype
    comm: Any
    """Who reduces it."""
    stage: int = 0
    """Of ZeRO."""
    data: Tensor | None = None
    views: list[Tensor] = field(default_factory=list)
    gradient: Tensor | None = None
    """[owned.stop - owned.start], what the optimizer takes: reduced, in the parameters' own dtype."""
    last: bool = False
    arrived: list[bool] = field(default_factory=list)
    missing: int = 0
    work: Pending | None = None
    handles: list[ReducedGradient] = field(default_factory=list)
    """What each member's `grad` is after finish(); empty where it is the view."""
    takers: list[Callable[[], None]] = field(default_factory=list)
    """Called when `gradient` is there."""
    _buffer: Tensor | None = None

    def __post_init__(self) -> None:
        counts = [member.numel() for member in self.members]
        self.master_dtype = self.members[0].dtype
        self.offsets: list[int] = []
        end = 0
        for count in counts:
            self.offsets.append(end)
            end = _aligned(end + count, ALIGN)
        self.count = _aligned(end, ALIGN * self.comm.world_size)
        """Elements of `data`, gaps included."""
        size = self.count // self.comm.world_size
        self.block = slice(self.comm.rank * size, (self.comm.rank + 1) * size)
        """This rank's block of `data`."""
        self.owned = self.block if self.stage else slice(0, self.count)
        """What this rank's optimizer steps."""
        edges = [offset + count for offset, count in zip(self.offsets, counts, strict=True)]
        self._gaps = [slice(a, b) for a, b in zip(edges, [*self.offsets[1:], self.count], strict=True) if a < b]
        self.reset()

    def index(self) -> int:
        """Its place in the order in which buckets leave."""
        return self.position

    def buffer(self) -> Tensor:
        """The gradients [count], gaps included, or what set_buffer() put in their place."""
        whole = self.data if self._buffer is None else self._buffer
        assert whole is not None
        return whole

    def gradients(self) -> list[Tensor]:
        """buffer() as a view for each parameter, of its shape."""
        return list(self.views) if self._buffer is None else self.cut(self._buffer)

    def cut(self, flat: Tensor) -> list[Tensor]:
        """The part of `flat` [count] that belongs to each parameter, as views of its shape."""
        return [
            flat[offset : offset + member.numel()].view(member.shape)
            for offset, member in zip(self.offsets, self.members, strict=True)
        ]

    def parameters(self) -> list[Tensor]:
        """The parameters, in the order of the buffer."""
        return list(self.members)

    def holds_shards_and_others(self) -> bool:
        """Whether some parameters are shards of larger ones, and some are not."""
        return len({shard_of(member) is None for member in self.members}) > 1

    def is_last(self) -> bool:
        """Whether a hook is given no other bucket after this one in a step."""
        return self.last

    def set_buffer(self, buffer: Tensor) -> None:
        """Lets buffer() and gradients() give `buffer`, of as many elements and any dtype, until the step is over."""
        if buffer.numel() != self.count:
            raise InvalidArgument(f"set_buffer: {buffer.numel()} elements, expected {self.count}")
        self._buffer = buffer.flatten()

    def fill_in(self, data: Tensor) -> None:
        """Takes `data` [count] as its memory; the gaps become zeros."""
        self.data = data
        for gap in self._gaps:
            data[gap] = 0
        self.views = self.cut(data)

    def part(self, slot: int, flat: Tensor) -> Tensor:
        """What `flat` [owned] has of a member, flat."""
        offset = self.offsets[slot]
        start, stop = max(offset, self.owned.start), min(offset + self.members[slot].numel(), self.owned.stop)
        return flat[start - self.owned.start : max(start, stop) - self.owned.start]

    def reduced(self, slot: int) -> Tensor:
        """What this rank has of a member's reduced gradient, of its shape under ZeRO 0 and flat under the others."""
        assert self.gradient is not None
        found = self.part(slot, self.gradient)
        return found if self.stage else found.view(self.members[slot].shape)

    @torch.no_grad()
    def take_up(self) -> list[bool]:
        """Takes up what was done to the members' `grad` since finish(); whether each still has one.

        Raises Error if finish() has not followed the last backward pass.
        """
        if self.gradient is None or self.work is not None or any(self.arrived):
            raise Error(
                f"the gradients of '{self.names[0]}' are not reduced yet: call finish() after backward, and step() or "
                "clip_() after it"
            )
        left = self.handles or self.views
        for slot, (member, mine) in enumerate(zip(self.members, left, strict=True)):
            given = member.grad
            if given is None or given is mine:
                continue
            if isinstance(given, ReducedGradient):
                self.reduced(slot).copy_(given.part().view_as(self.reduced(slot)))
            elif self.stage:
                offset, part = self.offsets[slot], self.reduced(slot)
                start = max(self.owned.start - offset, 0)
                part.copy_(given.detach().flatten()[start : start + part.numel()])
            else:
                (self.reduced(slot) if self.handles else self.views[slot]).copy_(given)
            member.grad = mine
        if self.stage == 0 and not self.handles and self.dtype != self.master_dtype and self.data is not None:
            take_changes(self.data, self.gradient)
        return [member.grad is not None for member in self.members]

    def reset(self) -> None:
        """Await every gradient again."""
        self.arrived = [False] * len(self.members)
        self.missing = len(self.members)
        self.work = None
        self._buffer = None


def take_changes(source: Tensor, target: Tensor) -> None:
    """Copies to `target` those elements of `source` that are not its elements rounded to the dtype of `source`."""
    for mine, theirs in zip(source.split(CHUNK), target.split(CHUNK), strict=True):
        differs = mine != theirs.to(mine.dtype)
        if differs.any():
            theirs.copy_(torch.where(differs, mine.to(theirs.dtype), theirs))


Hook = Callable[[Any, Any], Any]
"""hook(state, bucket), as torch's DDP calls it: starts the averaging of `bucket.buffer()` over the ranks and returns a
torch Future, or anything with wait(). What wait() gives is the averaged buffer, None where it is in place."""


@keeps_order
def all_reduce_hook(state: GradientCommunicator, bucket: Bucket) -> Pending:
    """The default hook: an average by one all_reduce; `state` is the communicator."""
    return start_all_reduce(state, bucket.buffer(), "avg")


COMMUNICATOR = object()
"""As a hook's state: the reducer's communicator."""


class Reducer:
    """Averages the gradients of `named_parameters` over the ranks of `comm`, overlapped with backward.

    One step is any number of backward passes with `enabled = False`, one with `enabled = True`, then `finish()`; under
    ZeRO 2 and 3 `end_pass()` follows each of the former. All ranks give the same parameters in the same order.
    `bucket_bytes` bounds all buckets but the first, which `first_bucket_bytes` bounds; a single larger parameter has a
    bucket of its own.

    `hook` is called with `state` for each bucket, in their order; it may be any of torch's or of paracomm.hooks. What
    it raises is raised here, and aborts `comm`, so that every other rank raises as well.

    Args:
        zero: the stage of ZeRO: who owns which gradients afterwards, see the head of this file.
        overlap: False: nothing is launched before finish(). The results are the same, bit for bit.
        average: False: the sum, for losses that are divided by the global count already.
        precision: dtype of the gradients of floating-point parameters, which are about to be cast to it.
        comm_of: the communicator that reduces a parameter's gradient, where it is not `comm`; hooks are not asked then.
        unit_of: parameters that `unit_of(name)` tells apart are in different buckets.
        spread: spread(parameter) is the communicators beside `comm_of` over which a gradient is spread; None: nobody on
            this rank can tell.

    Raises InvalidArgument for no parameters, sizes below 1, and a hook that cannot be used (see set_hook), and Error
    where the order of calls is wrong.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        comm: GradientCommunicator,
        *,
        bucket_bytes: int = 25 * MIB,
        first_bucket_bytes: int = MIB,
        hook: Hook = all_reduce_hook,
        state: Any = COMMUNICATOR,
        zero: int = 0,
        overlap: bool = True,
        average: bool = True,
        precision: torch.dtype | None = None,
        comm_of: Callable[[nn.Parameter], Any] | None = None,
        unit_of: Callable[[str], Hashable] | None = None,
        spread: Callable[[nn.Parameter], Sequence[Any] | None] = lambda parameter: (),
    ) -> None:
        if min(bucket_bytes, first_bucket_bytes) < 1:
            raise InvalidArgument(f"Reducer: bucket sizes {bucket_bytes}, {first_bucket_bytes}, expected at least 1")
        named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        if not named:
            raise InvalidArgument("Reducer: no parameter requires a gradient")
        self.comm = comm
        self.zero = zero
        self.overlap = overlap
        self.average = average
        self.enabled = True
        self.blocked_s = 0.0
        """Seconds that backward and finish() spent blocked, since the start."""
        self.on_arrived: Callable[[Bucket], None] | None = None
        """Called when all gradients of a bucket are there."""
        self.buckets: list[Bucket] = []
        self._mixed = precision is not None
        self.set_hook(hook, state)
        groups = {id(p): comm if comm_of is None else comm_of(p) for _, p in named}

        def apart(name: str, parameter: nn.Parameter) -> Hashable:
            # A hook errs by the whole bucket. What all ranks of tp hold must err alike on them, away from their shards.
            alike = hook is not all_reduce_hook and shard_of(parameter) is None
            # A weight that several stages have (tied) lies in its bucket as it does in theirs: by itself.
            tied = getattr(parameter, "tied", None)
            return id(groups[id(parameter)]), None if unit_of is None else unit_of(name), alike, tied

        for index, members in enumerate(plan_buckets(named, bucket_bytes, first_bucket_bytes, apart, precision)):
            first = members[0][1]
            dtype = precision if precision is not None and first.is_floating_point() else first.dtype
            names, parameters = [name for name, _ in members], [parameter for _, parameter in members]
            bucket = Bucket(index, names, parameters, dtype, groups[id(first)], zero)
            if zero < 2:
                bucket.fill_in(new_flat(bucket.comm, bucket.count, first, dtype))
            self._stand_in(bucket, [spread(parameter) for parameter in parameters])
            self.buckets.append(bucket)
        for bucket in [bucket for bucket in self.buckets if bucket.comm is comm][-1:]:
            bucket.last = True
        self._launched = 0
        self._completed = 0
        self._adds = False
        self._memory = Recycler()
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._on_gradient(bucket, slot))
            for bucket in self.buckets
            for slot, parameter in enumerate(bucket.members)
        ]

    @staticmethod
    def _stand_in(bucket: Bucket, spread: Sequence[Sequence[Any] | None]) -> None:
        """Makes what `grad` is where the view does not say all."""
        if not bucket.stage and all(groups is not None and not groups for groups in spread):
            return
        own = [bucket.comm] if bucket.stage else []
        bucket.handles = [
            ReducedGradient(
                member, bucket.names[slot], partial(bucket.reduced, slot), [*own, *(groups or ())], dtype=bucket.dtype,
                whole=not bucket.stage, alone=groups is not None,
            )
            for slot, (member, groups) in enumerate(zip(bucket.members, spread, strict=True))
        ]  # fmt: skip

    def set_hook(self, hook: Hook, state: Any = COMMUNICATOR) -> None:
        """Averages by `hook(state, bucket)` from the next step on; without a state it is given the communicator.

        A hook that is not ours is called on a thread, for one bucket after the other (paracomm.hooks.lane). Raises
        InvalidArgument under ZeRO 2 and 3, for local SGD under ZeRO 1 and under mixed precision, for a state of ours
        over another number of ranks, and where tensor parallelism needs to know of a hook from the start.
        """
        if hook is not all_reduce_hook and self.zero > 1:
            raise InvalidArgument(
                f"ZeRO {self.zero} takes no gradient hook: a hook averages whole buckets on every rank, and under ZeRO "
                f"{self.zero} a rank receives its own block only; use ZeRO 0 or 1"
            )
        if (hook is local_sgd_hook or isinstance(state, LocalSGDState)) and (self.zero or self._mixed):
            raise InvalidArgument(
                "local SGD takes no ZeRO 1, under which ranks whose gradients differ would step parts of one model"
                if self.zero
                else "local SGD takes no mixed precision: it averages parameters, which follow from float32 weights"
            )
        if hook is not all_reduce_hook and any(bucket.holds_shards_and_others() for bucket in self.buckets):
            raise InvalidArgument(
                "this hook comes too late: under tensor parallelism buckets of shards are apart from others only where "
                "the hook is known from the start; give it to DataParallel(hook=...)"
            )
        ranks = getattr(getattr(state, "wire", None), "world_size", self.comm.world_size)
        if ranks != self.comm.world_size:
            raise InvalidArgument(
                f"the hook's state averages over {ranks} ranks, gradients are to be averaged over "
                f"{self.comm.world_size}: make the state with the communicator of this DataParallel"
            )
        self._exact = hook is all_reduce_hook
        self._hook = one_at_a_time(hook)
        self._state = self.comm if state is COMMUNICATOR else state

    @property
    def state(self) -> Any:
        """What the hook is called with."""
        return self._state

    def _on_gradient(self, bucket: Bucket, slot: int) -> Callable[[Tensor], None]:
        def arrive(parameter: Tensor) -> None:
            if bucket.work is not None or bucket.arrived[slot]:
                raise Error(
                    f"Reducer rank {self.comm.rank}: a second gradient of '{bucket.names[slot]}' came before finish(); "
                    "accumulate under no_sync(), a block for each backward, and call finish() after the last one"
                )
            if bucket.data is None or parameter.grad is not bucket.views[slot]:
                self._place(bucket, slot)
            if not self.enabled and self.zero < 2:
                return
            bucket.arrived[slot] = True
            bucket.missing -= 1
            if self.overlap:
                self._launch_ready()
            if bucket.missing == 0 and self.on_arrived is not None:
                self.on_arrived(bucket)

        return arrive

    @torch.no_grad()
    def _place(self, bucket: Bucket, slot: int) -> None:
        """Moves a gradient into its bucket: copied if backward made its own tensor, zeros if there is none."""
        if bucket.data is None:
            self._open(bucket)
        parameter, view = bucket.members[slot], bucket.views[slot]
        gradient = parameter.grad
        if isinstance(gradient, ReducedGradient):
            gradient = gradient.taken()
            if gradient is not None and not bucket.stage:
                parameter.grad = gradient = view
        if gradient is view:
            return
        if gradient is None:
            view.zero_()
        elif gradient.layout != torch.strided:
            raise InvalidArgument(
                f"Reducer: the gradient of '{bucket.names[slot]}' is {gradient.layout}, expected strided"
            )
        else:
            view.copy_(gradient)
        parameter.grad = view if self.zero < 2 else None

    def _open(self, bucket: Bucket) -> None:
        """Memory for a bucket under ZeRO 2 and 3."""
        while self._launched - self._completed > IN_FLIGHT:
            self._complete_next()
        bucket.fill_in(self._memory.take(bucket.comm, bucket.count, bucket.members[0], bucket.dtype))

    def _launch_ready(self) -> None:
        while self._launched < len(self.buckets) and self.buckets[self._launched].missing == 0:
            bucket = self.buckets[self._launched]
            try:
                bucket.work = self._start(bucket)
            except BaseException as error:
                self._tell_everyone(bucket, error)
                raise
            self._launched += 1

    def _start(self, bucket: Bucket) -> Pending:
        assert bucket.data is not None
        if not self._exact and bucket.comm is self.comm:
            pending: Pending = self._hook(self._state, bucket)
            return pending
        op = "avg" if self.average and bucket.comm.world_size == self.comm.world_size else "sum"
        return (start_reduce_scatter if bucket.stage else start_all_reduce)(bucket.comm, bucket.data, op)

    def finish(self) -> None:
        """Waits until every owned gradient is the average over the ranks.

        A parameter without a gradient on this rank takes part with zeros, or with what it had accumulated before, and
        has the average afterwards. Errors of the communication are raised here.

        Under ZeRO 0 each parameter's `grad` is the average. Under ZeRO 1 to 3 it stands for it (ReducedGradient), the
        optimizer has what it needs, and the first backward afterwards begins anew.
        """
        self.end_pass()
        self._adds = False
        for bucket in self.buckets:
            for parameter, handle in zip(bucket.members, bucket.handles, strict=False):
                parameter.grad = handle
            for take in bucket.takers:
                take()

    def end_pass(self) -> None:
        """Reduces everything that this backward pass left, and adds what the next one gives to it (ZeRO 2 and 3)."""
        try:
            for bucket in self.buckets[self._launched :]:
                for slot, arrived in enumerate(bucket.arrived):
                    if not arrived:
                        self._place(bucket, slot)
                bucket.missing = 0
                self._launch_ready()
            while self._completed < len(self.buckets):
                self._complete_next()
            self._adds = True
        finally:
            for bucket in self.buckets:
                bucket.reset()
            self._launched = self._completed = 0

    def _complete_next(self) -> None:
        start = time.perf_counter()
        bucket = self.buckets[self._completed]
        assert bucket.work is not None
        self._complete(bucket, bucket.work)
        self._completed += 1
        self.blocked_s += time.perf_counter() - start

    @torch.no_grad()
    def _complete(self, bucket: Bucket, work: Pending) -> None:
        comm: Any = self.comm
        data = bucket.data
        assert data is not None
        try:
            with _blocked(bucket, work):
                if isinstance(work, torch._C.Future) and hasattr(comm, "check"):
                    wait_while_well(work, comm)
                result = work.wait()
        except BaseException as error:
            # A torch Future keeps the text of an error only; its lane and a state of ours keep the error.
            cause = raised_by(work) or getattr(self._state, "failure", None) or error
            self._tell_everyone(bucket, cause)
            raise cause from (error if cause is not error else None)
        hooked = not self._exact and bucket.comm is self.comm
        if hooked:
            result = result[0] if isinstance(result, (list, tuple)) else result
            if isinstance(result, Tensor) and result.data_ptr() != data.data_ptr():
                data.copy_(result.view_as(data))
        owned = data[bucket.owned]
        if hooked and not self.average:
            owned.mul_(comm.world_size)
        elif self.average and not hooked and bucket.comm.world_size != comm.world_size:
            owned.div_(comm.world_size)
        if self.zero < 2 and bucket.dtype == bucket.master_dtype:
            bucket.gradient = owned
        elif self._adds and bucket.gradient is not None and self.zero > 1:
            bucket.gradient.add_(owned)
        elif bucket.gradient is None:
            bucket.gradient = owned.to(bucket.master_dtype, copy=True)
        else:
            bucket.gradient.copy_(owned)
        if self.zero > 1:
            bucket.data, bucket.views = None, []
            self._memory.give_back(data)

    def _tell_everyone(self, bucket: Bucket, error: BaseException) -> None:
        abort = getattr(self.comm, "abort", None)
        if abort is not None:
            abort(f"the hook of bucket {bucket.position} raised {type(error).__name__}: {error}")

    def held(self) -> list[Tensor]:
        """The tensors that gradients lie in, spare ones too."""
        kept = [tensor for bucket in self.buckets for tensor in (bucket.data, bucket.gradient) if tensor is not None]
        return kept + self._memory.held()

    def remove(self) -> None:
        """Takes the hooks off the parameters; their gradients stay where they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _blocked(bucket: Bucket, work: Pending) -> AbstractContextManager[None]:
    """In the timeline; a Work of ours says so itself."""
    axis, name = getattr(bucket.comm, "name", ""), f"bucket {bucket.position}"
    return nullcontext() if isinstance(work, Work) else span("wait", name, axis=axis, operation="hook")


def plan_buckets(
    named: Sequence[tuple[str, nn.Parameter]],
    bucket_bytes: int,
    first_bucket_bytes: int,
    apart: Callable[[str, nn.Parameter], Hashable] = lambda name, parameter: None,
    precision: torch.dtype | None = None,
) -> list[list[tuple[str, nn.Parameter]]]:
    """Splits parameters, last first, into groups of one dtype and device, ordered by when backward fills them.

    Where what is `apart` is cut depends on nothing else: ranks of tp, whose shards have other sizes, share some groups.
    """
    opened: dict[Hashable, list[tuple[str, nn.Parameter]]] = {}
    closed: list[list[tuple[str, nn.Parameter]]] = []
    small: Hashable = None
    for index, (name, parameter) in enumerate(reversed(named)):
        key = (parameter.dtype, parameter.device, apart(name, parameter))
        small = key if index == 0 else small
        group = opened.setdefault(key, [])
        limit = first_bucket_bytes if key == small else bucket_bytes
        if group and sum(_nbytes(p, precision) for _, p in group) + _nbytes(parameter, precision) > limit:
            closed.append(group)
            group = opened[key] = []
            small = None if key == small else small
        group.append((name, parameter))
    place = {id(parameter): index for index, (_, parameter) in enumerate(reversed(named))}
    return sorted([*closed, *opened.values()], key=lambda group: place[id(group[-1][1])])


def _nbytes(parameter: Tensor, precision: torch.dtype | None) -> int:
    dtype = precision if precision is not None and parameter.is_floating_point() else parameter.dtype
    return parameter.numel() * dtype.itemsize


def _aligned(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
