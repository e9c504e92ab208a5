"""Gradient buckets that are averaged over the ranks while backward goes on.

A parameter's gradient is a view into a bucket, a flat tensor of one dtype. Buckets are filled in the reverse order of
the parameters, which is about the order in which backward yields gradients. When a bucket has all of its gradients it
is launched, but never before the bucket ahead of it: every rank launches the same buckets in the same order, whichever
parameters its own backward touched.

    backward   | block 3 | block 2 | block 1 | embedding |
    bucket 0   |         [ all_reduce ]
    bucket 1   |                   [ all_reduce ]
    bucket 2   |                                          [ all_reduce ]
    finish()                                             |.............| time blocked

The first bucket is small, so that the wire is in use early (Li et al., "PyTorch Distributed", VLDB 2020).
A rank moves each gradient once into its bucket, or not at all where backward accumulates into the view.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paracomm.errors import Error, InvalidArgument
from paracomm.hooks.lane import keeps_order, one_at_a_time, raised_by, wait_while_well

MIB = 1 << 20


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


@dataclass
class Bucket:
    """Gradients of one dtype, side by side in `data` [sum of counts]; `views[i]` has the shape of `members[i]`.

    Hooks see the interface of torch.distributed.GradBucket: index(), buffer(), gradients(), parameters(), is_last() and
    set_buffer().
    """

    position: int
    data: Tensor
    names: list[str]
    members: list[nn.Parameter]
    views: list[Tensor]
    last: bool = False
    arrived: list[bool] = field(default_factory=list)
    missing: int = 0
    work: Pending | None = None
    _buffer: Tensor | None = None

    def index(self) -> int:
        """Its place in the order in which buckets leave."""
        return self.position

    def buffer(self) -> Tensor:
        """The gradients [sum of counts], or what set_buffer() put in their place."""
        return self.data if self._buffer is None else self._buffer

    def gradients(self) -> list[Tensor]:
        """buffer() as a view for each parameter, of its shape."""
        if self._buffer is None:
            return list(self.views)
        parts = self._buffer.split([member.numel() for member in self.members])
        return [part.view(member.shape) for part, member in zip(parts, self.members, strict=True)]

    def parameters(self) -> list[Tensor]:
        """The parameters, in the order of the buffer."""
        return list(self.members)

    def is_last(self) -> bool:
        """Whether no other bucket leaves after this one in a step."""
        return self.last

    def set_buffer(self, buffer: Tensor) -> None:
        """Lets buffer() and gradients() give `buffer`, of as many elements and any dtype, until the step is over."""
        if buffer.numel() != self.data.numel():
            raise InvalidArgument(f"set_buffer: {buffer.numel()} elements, expected {self.data.numel()}")
        self._buffer = buffer.flatten()

    def reset(self) -> None:
        """Await every gradient again."""
        self.arrived = [False] * len(self.members)
        self.missing = len(self.members)
        self.work = None
        self._buffer = None


Hook = Callable[[Any, Any], Any]
"""hook(state, bucket), as torch's DDP calls it: starts the averaging of `bucket.buffer()` over the ranks and returns a
torch Future, or anything with wait(). What wait() gives is the averaged buffer, None where it is in place."""


@keeps_order
def all_reduce_hook(state: GradientCommunicator, bucket: Bucket) -> Pending:
    """The default hook: an average by one all_reduce; `state` is the communicator."""
    pending: Pending = state.all_reduce(bucket.buffer(), op="avg", async_op=True)
    return pending


COMMUNICATOR = object()
"""As a hook's state: the reducer's communicator."""


class Reducer:
    """Averages the gradients of `named_parameters` over the ranks of `comm`, overlapped with backward.

    One step is any number of backward passes with `enabled = False`, one with `enabled = True`, then `finish()`.
    All ranks give the same parameters in the same order. `bucket_bytes` bounds all buckets but the first, which
    `first_bucket_bytes` bounds; a single larger parameter has a bucket of its own.

    `hook` is called with `state` for each bucket, in their order; it may be any of torch's or of paracomm.hooks. What
    it raises is raised here, and aborts `comm`, so that every other rank raises as well.

    Raises InvalidArgument for no parameters or sizes below 1, and Error where the order of calls is wrong.
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
    ) -> None:
        if min(bucket_bytes, first_bucket_bytes) < 1:
            raise InvalidArgument(f"Reducer: bucket sizes {bucket_bytes}, {first_bucket_bytes}, expected at least 1")
        named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        if not named:
            raise InvalidArgument("Reducer: no parameter requires a gradient")
        self.comm = comm
        self.enabled = True
        self.blocked_s = 0.0
        """Seconds that finish() spent blocked, since the start."""
        self.set_hook(hook, state)
        self.buckets = [
            _allocate(index, members, comm)
            for index, members in enumerate(plan_buckets(named, bucket_bytes, first_bucket_bytes))
        ]
        self.buckets[-1].last = True
        self._launched = 0
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._on_gradient(bucket, slot))
            for bucket in self.buckets
            for slot, parameter in enumerate(bucket.members)
        ]

    def set_hook(self, hook: Hook, state: Any = COMMUNICATOR) -> None:
        """Averages by `hook(state, bucket)` from the next step on; without a state it is given the communicator.

        A hook that is not ours is called on a thread, for one bucket after the other (paracomm.hooks.lane).
        """
        self._hook = one_at_a_time(hook)
        self._state = self.comm if state is COMMUNICATOR else state

    def _on_gradient(self, bucket: Bucket, slot: int) -> Callable[[Tensor], None]:
        def arrive(parameter: Tensor) -> None:
            _place(bucket, slot)
            if not self.enabled:
                return
            if bucket.work is not None or bucket.arrived[slot]:
                raise Error(
                    f"Reducer rank {self.comm.rank}: a second gradient of '{bucket.names[slot]}' came before finish(); "
                    "accumulate under no_sync(), and call finish() after the backward that follows it"
                )
            bucket.arrived[slot] = True
            bucket.missing -= 1
            self._launch_ready()

        return arrive

    def _launch_ready(self) -> None:
        while self._launched < len(self.buckets) and self.buckets[self._launched].missing == 0:
            bucket = self.buckets[self._launched]
            try:
                bucket.work = self._hook(self._state, bucket)
            except BaseException as error:
                self._tell_everyone(bucket, error)
                raise
            self._launched += 1

    def finish(self) -> None:
        """Waits until every gradient is the average over the ranks.

        A parameter without a gradient on this rank takes part with zeros, or with what it had accumulated before, and
        has the average afterwards. Errors of the communication are raised here.
        """
        for bucket in self.buckets[self._launched :]:
            for slot, arrived in enumerate(bucket.arrived):
                if not arrived:
                    _place(bucket, slot)
            bucket.missing = 0
        try:
            self._launch_ready()
            start = time.perf_counter()
            for bucket in self.buckets:
                if bucket.work is not None:
                    self._complete(bucket, bucket.work)
            self.blocked_s += time.perf_counter() - start
        finally:
            for bucket in self.buckets:
                bucket.reset()
            self._launched = 0

    @torch.no_grad()
    def _complete(self, bucket: Bucket, work: Pending) -> None:
        comm: Any = self.comm
        try:
            if isinstance(work, torch._C.Future) and hasattr(comm, "check"):
                wait_while_well(work, comm)
            result = work.wait()
        except BaseException as error:
            # A torch Future keeps the text of an error only; its lane and a state of ours keep the error.
            cause = raised_by(work) or getattr(self._state, "failure", None) or error
            self._tell_everyone(bucket, cause)
            raise cause from (error if cause is not error else None)
        result = result[0] if isinstance(result, (list, tuple)) else result
        if isinstance(result, Tensor) and result.data_ptr() != bucket.data.data_ptr():
            bucket.data.copy_(result.view_as(bucket.data))

    def _tell_everyone(self, bucket: Bucket, error: BaseException) -> None:
        abort = getattr(self.comm, "abort", None)
        if abort is not None:
            abort(f"the hook of bucket {bucket.position} raised {type(error).__name__}: {error}")

    def remove(self) -> None:
        """Takes the hooks off the parameters; their gradients stay where they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def plan_buckets(
    named: Sequence[tuple[str, nn.Parameter]], bucket_bytes: int, first_bucket_bytes: int
) -> list[list[tuple[str, nn.Parameter]]]:
    """Splits parameters, last first, into groups of one dtype and device, ordered by when backward fills them."""
    opened: dict[tuple[torch.dtype, torch.device], list[tuple[str, nn.Parameter]]] = {}
    closed: list[list[tuple[str, nn.Parameter]]] = []
    for name, parameter in reversed(named):
        key = (parameter.dtype, parameter.device)
        group = opened.setdefault(key, [])
        limit = bucket_bytes if closed else first_bucket_bytes
        if group and sum(_nbytes(p) for _, p in group) + _nbytes(parameter) > limit:
            closed.append(group)
            group = opened[key] = []
        group.append((name, parameter))
    return closed + list(opened.values())


def _nbytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def _allocate(index: int, members: list[tuple[str, nn.Parameter]], comm: GradientCommunicator) -> Bucket:
    names = [name for name, _ in members]
    parameters = [parameter for _, parameter in members]
    counts = [parameter.numel() for parameter in parameters]
    dtype, device = parameters[0].dtype, parameters[0].device
    empty = getattr(comm, "empty", None)
    if empty is not None and device.type == "cpu":
        data = empty((sum(counts),), dtype)
    else:
        data = torch.empty(sum(counts), dtype=dtype, device=device)
    data.zero_()
    views = [part.view(p.shape) for part, p in zip(data.split(counts), parameters, strict=True)]
    bucket = Bucket(index, data, names, parameters, views)
    bucket.reset()
    return bucket


@torch.no_grad()
def _place(bucket: Bucket, slot: int) -> None:
    """Makes the gradient a view into its bucket: copied if backward made its own tensor, zeros if there is none."""
    parameter, view = bucket.members[slot], bucket.views[slot]
    gradient = parameter.grad
    if gradient is view:
        return
    if gradient is None:
        view.zero_()
    elif gradient.layout != torch.strided:
        raise InvalidArgument(f"Reducer: the gradient of '{bucket.names[slot]}' is {gradient.layout}, expected strided")
    else:
        view.copy_(gradient)
    parameter.grad = view
