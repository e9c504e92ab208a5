"""What every hook of ours stands on: a state that starts, finishes, remembers and fails.

A bucket's averaging is two functions: `start` runs where torch calls the hook and begins the first operation; what it
returns runs on the state's own thread once its turn comes (of a GPU's bucket: at once, on a stream of its own), waits,
sends a second message on the twin wire if there is one, and gives the averaged bucket. Both run in the order of the
buckets, which is the same on every rank.

    backward thread   | start 0 | ... | start 1 | ... | start 2 |
    first wire        |  [ message 0 ]  [ message 1 ]   [ message 2 ]
    own thread        |              finish 0 [second 0]  finish 1 [second 1]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paracomm.comm.streams import SideStreams
from paracomm.errors import InvalidArgument
from paracomm.hooks.lane import Function, Lane, because_of, keeps_order
from paracomm.hooks.wire import Wire, default_group, wire_of

Finish = Callable[[], Tensor]


class Bucket(Protocol):
    """What torch.distributed.GradBucket offers, and paracomm.parallel.Bucket too."""

    def buffer(self) -> Tensor: ...
    def index(self) -> int: ...
    def gradients(self) -> list[Tensor]: ...
    def parameters(self) -> list[Tensor]: ...
    def is_last(self) -> bool: ...
    def set_buffer(self, buffer: Tensor) -> None: ...


class Names:
    """The name of every parameter: the model's own where it is known, else "#0", "#1", ... as they are first seen."""

    def __init__(self) -> None:
        self._names: dict[Tensor, str] = {}
        self._unnamed = 0

    def bind(self, model: nn.Module) -> None:
        """Takes the names of `model`, which may be wrapped in DistributedDataParallel or DataParallel."""
        wrapped = hasattr(model, "reducer") and isinstance(getattr(model, "module", None), nn.Module)
        for name, parameter in (model.module if wrapped else model).named_parameters():  # type: ignore[union-attr]
            self._names[parameter] = name

    def of(self, bucket: Bucket) -> tuple[str, ...]:
        """The names of a bucket's parameters, in the order of its buffer."""
        return tuple(self._name(parameter) for parameter in bucket.parameters())

    def _name(self, parameter: Tensor) -> str:
        if parameter not in self._names:
            self._names[parameter] = f"#{self._unnamed}"
            self._unnamed += 1
        return self._names[parameter]


class Memory:
    """A float32 residual for every parameter, by name, side by side in the order of the bucket that holds them.

    DDP rebuilds its buckets after the first step: the residuals move along, parameter by parameter.
    """

    def __init__(self, names: Names) -> None:
        self._names = names
        self._flats: dict[tuple[str, ...], Tensor] = {}
        self._pieces: dict[str, Tensor] = {}

    def flat(self, bucket: Bucket) -> Tensor:
        """The residuals of a bucket, float32 [numel of its buffer]; zeros at first."""
        names = self._names.of(bucket)
        if names in self._flats:
            return self._flats[names]
        buffer = bucket.buffer()
        flat = torch.zeros(buffer.numel(), dtype=torch.float32, device=buffer.device)
        for name, gradient in zip(names, bucket.gradients(), strict=True):
            # Our own buckets have gaps between gradients.
            place = gradient.storage_offset() - buffer.storage_offset()
            piece = flat[place : place + gradient.numel()]
            before = self._pieces.get(name)
            if before is not None:
                if before.numel() != piece.numel():
                    raise InvalidArgument(
                        f"the residual of '{name}' has {before.numel()} elements, not {piece.numel()}"
                    )
                piece.copy_(before)
            self._pieces[name] = piece
        moved = set(names)
        self._flats = {key: kept for key, kept in self._flats.items() if moved.isdisjoint(key)}
        self._flats[names] = flat
        return flat

    def settle(self, bucket: Bucket) -> None:
        """Adds to the buffer of a bucket that is sent exactly what its parameters still have here."""
        if not self._pieces.keys().isdisjoint(self._names.of(bucket)):
            flat = self.flat(bucket)
            bucket.buffer().add_(flat)
            flat.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        return {name: piece.clone() for name, piece in self._pieces.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._flats.clear()
        self._pieces = {name: piece.detach().clone().float().flatten() for name, piece in state.items()}


class HookState(ABC):
    """The state of one of our hooks, over one group of ranks. Making one is collective.

    Args:
        where: a torch process group (None: the default one), a paracomm.Communicator, an mpi4py communicator or a Wire.
        model: its parameter names become the keys of `state_dict()`; a number each without it. `bind` gives it later.
        feedback: whether what a step loses is added to the next one (Seide et al., 2014; Karimireddy et al., 2019).
    """

    two_messages = False
    """Whether `start` and what it returns both send."""

    def __init__(self, where: Any = None, *, model: nn.Module | None = None, feedback: bool = True) -> None:
        self.wire = wire_of(where)
        self.second: Wire = self.wire.twin() if self.two_messages and self.wire.world_size > 1 else self.wire
        self.names = Names()
        self.memory: Memory | None = Memory(self.names) if feedback else None
        self.steps = 0
        """Steps begun with this state."""
        self.failure: BaseException | None = None
        """What the hook raised first, on this rank."""
        self._lane = Lane(f"paracomm {type(self).__name__}")
        self._sides = SideStreams()
        if model is not None:
            self.bind(model)

    def bind(self, model: nn.Module) -> None:
        """Names the parameters as `model` does."""
        self.names.bind(model)

    def share_names(self, names: Names) -> None:
        """Knows the parameters by the names of another state, which this one is a part of."""
        self.names = names
        if self.memory is not None:
            self.memory = Memory(names)

    @abstractmethod
    def start(self, bucket: Bucket) -> Finish:
        """Begins the averaging of `bucket`; what it returns ends it and gives the result, which may lie anywhere."""

    def start_exact(self, bucket: Bucket) -> Finish:
        """Begins the exact mean of a bucket, with what its parameters have left over from before."""
        buffer = bucket.buffer()
        if self.memory is not None:
            self.memory.settle(bucket)
        work = self.wire.average(buffer)

        def finish() -> Tensor:
            work.wait()
            return buffer

        return finish

    def run(self, bucket: Bucket) -> Any:
        """The hook itself: a Future of the averaged buffer. Should it fail here, every rank learns of it."""
        try:
            finish = self.start(bucket)
            if bucket.is_last():
                self.steps += 1
        except BaseException as error:
            raise self.fail(error) from None
        buffer = bucket.buffer()
        if buffer.is_cuda:
            return self._finish_on_stream(buffer, finish)
        return self._lane.submit(lambda: self._finish(finish))

    def _finish_on_stream(self, buffer: Tensor, finish: Finish) -> Any:
        """A side stream keeps the order of the buckets and waits, while the current one goes on with backward."""
        side = self._sides.of(buffer.device)
        done: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device])
        with torch.no_grad(), side.after(side.now(), buffer, finish):
            done.set_result(self._finish(finish))
        return done

    def _finish(self, finish: Finish) -> Tensor:
        try:
            if self.failure is not None:
                raise self.failure
            return finish()
        except BaseException as error:
            raise self.fail(error) from None

    def fail(self, error: BaseException) -> BaseException:
        """Gives up on every rank, with this cause; returns the first cause: the others follow from it."""
        if self.failure is None:
            self.failure = error
            self.abort(because_of(error))
        return self.failure

    def abort(self, why: str) -> None:
        """Ends the communication of all ranks."""
        for wire in self.wires():
            wire.abort(why)

    def bytes_sent(self) -> int | None:
        """Payload bytes that this rank sent on the wires of this state so far; None where the engine does not count."""
        counts = [wire.bytes_sent() for wire in self.wires()]
        return None if None in counts else sum(count for count in counts if count is not None)

    def wires(self) -> list[Wire]:
        """Every wire that this state sends on."""
        return [self.wire] if self.second is self.wire else [self.wire, self.second]

    def state_dict(self) -> dict[str, Any]:
        """What this rank must keep to go on: tensors and numbers, of no process group."""
        memory = {} if self.memory is None else self.memory.state_dict()
        return {"kind": type(self).__name__, "steps": self.steps, "memory": memory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`, whatever group of ranks it came from.

        Raises InvalidArgument for the state of another kind of hook.
        """
        if state.get("kind") != type(self).__name__:
            raise InvalidArgument(f"this is the state of a {state.get('kind')}, expected {type(self).__name__}")
        self.steps = int(state["steps"])
        if self.memory is not None:
            self.memory.load_state_dict(state["memory"])

    def close(self) -> None:
        """Ends the thread, and what belongs to this state alone."""
        self._lane.close()
        if self.second is not self.wire:
            self.second.close()


def ddp_hook(hook: Function) -> Function:
    """Marks a hook of ours, and hides its annotations, which are strings in these files: DDP refuses such a hook."""
    hook.__annotations__ = {}
    return keeps_order(hook)


_implied: dict[tuple[Any, ...], tuple[Any, HookState]] = {}


def state_for(kind: type[HookState], given: Any, **options: Any) -> HookState:
    """`given` itself if it is a state; else the one state of `kind` over that process group or communicator.

    Raises InvalidArgument for the state of another kind.
    """
    if isinstance(given, HookState):
        if not isinstance(given, kind):
            raise InvalidArgument(f"this hook needs a {kind.__name__}, it was given a {type(given).__name__}")
        return given
    if given is None:
        given = default_group()
    key = (kind, id(given), *sorted(options.items()))
    if key not in _implied:
        _implied[key] = (given, kind(given, **options))
    return _implied[key][1]
