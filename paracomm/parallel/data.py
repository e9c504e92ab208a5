"""Data parallelism: every rank sees its share of the batch, and gradients are reduced over the ranks.

With ZeRO the ranks share what they would otherwise all hold: the state of the optimizer (1), the gradients too (2), the
parameters too (3). The numbers are the same, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paracomm.comm import Communicator as OurCommunicator
from paracomm.errors import InvalidArgument, Mismatch
from paracomm.hooks import HookState
from paracomm.parallel.average import Average
from paracomm.parallel.bucket import COMMUNICATOR, MIB, Hook, Reducer, all_reduce_hook
from paracomm.parallel.clip import global_norm, scale
from paracomm.parallel.gate import Gate, distinct, overlaps
from paracomm.parallel.mesh import Mesh
from paracomm.parallel.optimizer import Groups, Shards
from paracomm.parallel.reduction import GradientCommunicator
from paracomm.parallel.shard import shard_of
from paracomm.parallel.weights import Weights, gather_now
from paracomm.parallel.zero import Units, find_units, unit_of_parameters

PRECISIONS = {None: None, "bfloat16": torch.bfloat16}


class Communicator(GradientCommunicator, Protocol):
    """What DataParallel asks of a communicator; ZeRO asks for ours."""

    def broadcast(self, x: Tensor, root: int = ...) -> Any: ...

    def all_gather(self, x: Tensor) -> Any: ...


class DataParallel(nn.Module):
    """`module` on every rank of `comm`, with rank 0's parameters and buffers from the start.

    forward() is the module's own. After each backward call `finish()`: it returns when every gradient is the average
    over the ranks, bitwise equal on all of them. Where every rank's loss is the mean over an equal share of the batch,
    that is the gradient of the mean over the whole batch.

        parallel = DataParallel(model, mesh, zero=2)
        optimizer = parallel.optimizer(torch.optim.AdamW, lr=1e-3)
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss(parallel(inputs), targets).backward()
            parallel.finish()
            parallel.clip_(1.0)
            optimizer.step()

    Args:
        comm: a Mesh, whose axes dp and cp share the batch, or a communicator of all ranks. The gradient of a parameter
            that is marked `partial` is summed over those axes as well.
        zero: 0 to 3. From 1 on the optimizer must be optimizer()'s, and gradients are reached through it only.
        average: False: gradients are sums over the ranks, for losses that are divided by the global count, as they
            must be where ranks have unequal shares.
        precision: "bfloat16": parameters and gradients are bfloat16, sums over ranks accumulate in float32, and
            optimizer() has float32 weights. Floating-point arguments of forward() are cast.
        broadcast_buffers: finish() gives every rank the buffers that rank 0 has, such as the running statistics of
            BatchNorm, as torch's DistributedDataParallel does before the next forward.
        units: under ZeRO 3, names or patterns of the modules that are gathered and released as one; None: the children
            of every ModuleList.

    Raises Mismatch if the ranks' parameters differ in name, shape or dtype, and InvalidArgument for what cannot be
    combined. See Reducer for the other arguments.
    """

    def __init__(
        self,
        module: nn.Module,
        comm: Mesh | Communicator,
        *,
        bucket_bytes: int = 25 * MIB,
        first_bucket_bytes: int = MIB,
        hook: Hook = all_reduce_hook,
        state: Any = COMMUNICATOR,
        zero: int = 0,
        overlap: bool = True,
        average: bool = True,
        precision: str | None = None,
        units: Sequence[str] | None = None,
        broadcast_buffers: bool = True,
    ) -> None:
        super().__init__()
        self.module = module
        self.mesh = comm if isinstance(comm, Mesh) else None
        self.comm: Any = comm.group("dp", "cp") if isinstance(comm, Mesh) else comm
        self.zero = zero
        self.broadcast_buffers = broadcast_buffers
        self._everyone: Any = comm.comm if isinstance(comm, Mesh) else comm
        self._expect(precision, units)
        self.precision = PRECISIONS[precision]
        _expect_same_parameters(module, self.comm)
        names = find_units(module, units) if zero == 3 else []
        unit_of = unit_of_parameters(module, names)
        self.reducer = Reducer(
            module.named_parameters(),
            self.comm,
            bucket_bytes=bucket_bytes,
            first_bucket_bytes=first_bucket_bytes,
            hook=hook,
            state=state,
            zero=zero,
            overlap=overlap,
            average=average,
            precision=self.precision,
            comm_of=self._group,
            unit_of=unit_of.__getitem__,
            spread=self._spread,
        )
        if isinstance(state, HookState):
            state.bind(module)
        self.weights = [Weights(bucket) for bucket in self.reducer.buckets]
        """The parameters that require a gradient, a flat tensor for each bucket."""
        _broadcast([(name, p) for name, p in module.named_parameters() if not p.requires_grad], self.comm)
        _broadcast(list(module.named_buffers()), self.comm)
        self._units: Units | None = None
        if zero == 3:
            self._give_gathers_their_own_order()
            self._units = Units(module, names, self.weights, unit_of)
            self.reducer.on_arrived = self._units.gradients_arrived
        self._gate = Gate(module, self.weights)
        self._keep_states_whole()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise InvalidArgument(
            "copy.deepcopy: a DataParallel has communicators and hooks of its own; copy its .module where zero is "
            "below 3, and keep an average of the weights (EMA) with parallel.average(decay), in every layout"
        )

    def _expect(self, precision: str | None, units: Sequence[str] | None) -> None:
        if self.zero not in (0, 1, 2, 3):
            raise InvalidArgument(f"DataParallel: zero is {self.zero!r}, expected 0, 1, 2 or 3")
        if self.zero and not isinstance(self.comm, OurCommunicator):
            raise InvalidArgument(
                f"DataParallel: ZeRO {self.zero} needs a paracomm.Communicator, to scatter and gather with, not a "
                f"{type(self.comm).__name__}"
            )
        if precision not in PRECISIONS:
            raise InvalidArgument(f"DataParallel: precision is {precision!r}, expected None or 'bfloat16'")
        if units is not None and self.zero != 3:
            raise InvalidArgument(f"DataParallel: units are gathered under ZeRO 3 only, zero is {self.zero}")

    def _group(self, parameter: nn.Parameter) -> Any:
        """Who reduces a parameter's gradient."""
        partial = getattr(parameter, "partial", ())
        return self.comm if self.mesh is None or not partial else self.mesh.group("dp", "cp", *partial)

    def _spread(self, parameter: nn.Parameter) -> list[Any] | None:
        """Who else holds parts of its gradient, beside those who reduce it; None in a pipeline."""
        shard = shard_of(parameter)
        if self.mesh is None:
            return []
        if self.mesh.size("pp") > 1:
            return None
        return [] if shard is None or self.mesh.size(shard.axis) == 1 else [self.mesh.group(shard.axis)]

    def _give_gathers_their_own_order(self) -> None:
        """Which comes first, a gather or a reduction beside it, may differ between ranks."""
        twins: dict[int, Any] = {}
        for weights in self.weights:
            comm = weights.bucket.comm
            if id(comm) not in twins:
                twins[id(comm)] = comm.split(0)
            weights.comm = twins[id(comm)]

    @property
    def parts(self) -> list[DataParallel]:
        """What this rank holds of the model, one for each stage of a pipeline: here the whole."""
        return [self]

    @property
    def everyone(self) -> Any:
        """The communicator of the whole mesh."""
        return self._everyone

    @property
    def process_group(self) -> Any:
        """torch's default process group, which torch's hooks for ZeRO ask of a DistributedDataParallel."""
        import torch.distributed as dist

        return dist.group.WORLD

    _has_rebuilt_buckets = True
    """What they ask as well: these buckets are final from the start."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # finish() sees it then
            self._gate.before_forward()
        if self.precision is not None:
            args = tuple(self._cast(value) for value in args)
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        return self.module(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        return value.to(self.precision) if isinstance(value, Tensor) and value.is_floating_point() else value

    def finish(self) -> None:
        """Waits for the reductions; errors of the communication are raised here.

        Under ZeRO 1 to 3 it ends an accumulation: the next backward begins anew.

        Raises InvalidArgument, which names it, for a parameter that came, went, was frozen or unfrozen since the module
        was wrapped.
        """
        self._gate.before_reduction()
        self.reducer.finish()
        if self._units is not None:
            self._units.release_all()
        if self.broadcast_buffers:
            _broadcast(list(self.module.named_buffers()), self.comm)

    def settle(self) -> None:
        """Makes what was written to the module's parameters what the optimizer goes on from. finish(), step(), and all
        that saves or loads do so."""
        for weights in self.weights:
            weights.take_up_values()
        if self._units is not None:
            self._units.release_all()

    @property
    def blocked_s(self) -> float:
        """Seconds spent blocked on reductions, since the start."""
        return self.reducer.blocked_s

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A backward pass inside only accumulates; the first one outside ends the sum.

        Under ZeRO 0 and 1 each rank adds up its own gradients, and any number of passes may be in one block. Under
        ZeRO 2 and 3 there is no room for that: what a pass gives is reduced at once and added to this rank's block, one
        pass a block.
        """
        before = self.reducer.enabled
        self.reducer.enabled = False
        try:
            yield
            if self.zero > 1:
                self.reducer.end_pass()
        finally:
            self.reducer.enabled = before

    def optimizer(
        self,
        kind: type[torch.optim.Optimizer],
        groups: Groups = None,
        *,
        elementwise: bool = False,
        **options: Any,
    ) -> torch.optim.Optimizer:
        """A torch optimizer over what this rank owns; step() brings the parameters of all ranks up to date.

        Its state_dict() and load_state_dict() are collective, hold whole tensors by the parameters' names, and fit any
        layout. Options of `groups` go to the group's parameters.

        Args:
            kind: of torch.optim, one that treats each element by itself, or any that does with `elementwise`.
            groups: as torch takes them, or rule(name, parameter) -> options; None: one group.

        Raises InvalidArgument for another kind, and for groups that do not hold each parameter once.
        """
        named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        return Shards(
            kind, self.weights, groups, named, self.publish, options, self.settle, self._everyone, elementwise
        ).optimizer  # fmt: skip

    def average(self, decay: float | None = 0.999) -> Average:
        """An average of the weights (EMA; None: the mean, SWA) that is right in every layout; see Average."""
        return Average(self.weights, self.settle, self.publish, decay)

    def publish(self) -> None:
        """The parameters become what the owners have made of them. Collective."""
        if self._units is not None:
            self._units.release_all()
        else:
            gather_now(self.weights)

    def clip_(self, max_norm: float) -> float:
        """Scales the gradients so that their norm over the whole mesh is at most `max_norm`; returns the norm before.

        Call it after finish(), on every rank. The norm has the same bits in every layout that has the same gradients.
        Raises Error on every rank if a gradient is not finite, naming the parameter, and InvalidArgument for a
        `max_norm` that is not positive.
        """
        norm = global_norm(self.reducer.buckets, self._everyone, self._first_of)
        scale(self.reducer.buckets, norm, max_norm)
        return norm

    def _first_of(self, axis: str) -> bool:
        return self.mesh is None or self.mesh.index(axis) == 0

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Every parameter is whole inside, under ZeRO 3 as well; what is written to it, on every rank alike, is what
        training goes on from. Collective."""
        try:
            with nullcontext() if self._units is None else self._units.gathered():
                yield
        finally:
            for weights in self.weights:
                weights.take_up_values()

    def bytes_held(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
        """Bytes of this rank's memory that parameters, gradients and the optimizer's state lie in at this moment.

        docs/memory.md has the formula. Memory that two of them share counts for the first.
        """
        parameters = [tensor for each in self.weights for tensor in (each.full, each.master) if tensor is not None]
        states = [] if optimizer is None else [value for state in optimizer.state.values() for value in state.values()]
        kinds = {
            "parameters": parameters + ([] if self._units is None else self._units.held()),
            "gradients": self.reducer.held(),
            "optimizer": [value for value in states if isinstance(value, Tensor)],
        }
        seen: set[int] = set()
        found = dict.fromkeys(kinds, 0)
        for kind, tensors in kinds.items():
            for storage in (tensor.untyped_storage() for tensor in tensors):
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    found[kind] += storage.nbytes()
        return found

    def _keep_states_whole(self) -> None:
        """state_dict() and load_state_dict() of the module see whole parameters, and the optimizer what was loaded."""
        units, module = self._units, self.module

        def before(given: nn.Module, *_: Any) -> None:
            if given is module and units is not None:
                units.gather_all()

        def copied(given: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
            if given is module and units is not None:
                for name, value in state.items():
                    if isinstance(value, Tensor) and name.startswith(prefix):
                        state[name] = value.clone()
                units.release_all()

        def loaded(given: nn.Module, *_: Any) -> None:
            if given is not module:  # a copy of it, which has the hooks too
                return
            self._gate.take_back()
            for weights in self.weights:
                weights.store()
            if units is not None:
                units.release_all()

        self.module.register_state_dict_pre_hook(before)
        self.module.register_state_dict_post_hook(copied)
        self.module.register_load_state_dict_pre_hook(before)
        self.module.register_load_state_dict_post_hook(loaded)


@torch.no_grad()
def _broadcast(named: Sequence[tuple[str, Tensor]], comm: Any) -> None:
    for name, tensor in named if comm.world_size > 1 else ():
        own = distinct(tensor.detach()) if tensor.layout == torch.strided else None
        if own is None or overlaps(own):
            raise InvalidArgument(
                f"DataParallel: '{name}' has elements that share memory, or is {tensor.layout}; expected a strided "
                "tensor whose elements are its own, or that is expanded: make it contiguous()"
            )
        if own.numel() == 0:
            continue
        whole = own.resolve_conj().resolve_neg().contiguous()
        comm.broadcast(whole.view(-1).view(torch.uint8), root=0)
        if whole.data_ptr() != own.data_ptr():
            own.copy_(whole)


def _expect_same_parameters(module: nn.Module, comm: Communicator) -> None:
    described = [
        f"{name} {tuple(parameter.shape)} {parameter.dtype} requires_grad={parameter.requires_grad}"
        for name, parameter in module.named_parameters()
    ]
    counts = comm.all_gather(torch.tensor([len(described)])).flatten().tolist()
    if len(set(counts)) > 1:
        raise Mismatch(f"DataParallel rank {comm.rank}: the ranks have {counts} parameters, expected the same number")
    if not described:
        return
    digests = torch.tensor([_digest(line) for line in described], dtype=torch.int64)
    everyone = comm.all_gather(digests).view(comm.world_size, -1)
    for rank, theirs in enumerate(everyone):
        differs = (theirs != digests).nonzero()
        if len(differs):
            index = int(differs[0])
            raise Mismatch(
                f"DataParallel rank {comm.rank}: rank {rank}'s parameter {index} is not '{described[index]}'"
            )


def _digest(line: str) -> int:
    return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little", signed=True)
