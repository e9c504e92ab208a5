"""Calls that torch's dispatcher has to see: under a TorchDispatchMode, and on tensors that answer for themselves.

torch.distributed calls the methods of a process group in Python directly, past the dispatcher. Modes (CommDebugMode,
FakeTensorMode) and subclasses with a __torch_dispatch__ (FakeTensor, AsyncCollectiveTensor) would not be asked:

    dist.all_reduce(x) -> ProcessGroup.allreduce (ours) -> twin.allreduce -> torch.ops.c10d.allreduce_
        -> modes, subclasses -> a kernel of ours -> ProcessGroup.allreduce (ours), with plain tensors

The twin is a bare c10d::ProcessGroup, which calls the operators. (To call what an override overrides is to be called
again: torch's C++ looks for overrides under two names.)

The kernel is registered when it is first needed, under the key below those of modes and subclasses, and hands on what
belongs to groups of other backends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from paracomm.errors import InvalidArgument

_KEY = "BackendSelect"
_BELOW = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_NO_DISPATCH = torch.Tensor.__torch_dispatch__
_OPERATIONS = (
    "_allgather_base_", "_reduce_scatter_base_", "allgather_", "allgather_coalesced_",
    "allgather_into_tensor_coalesced_", "allreduce_", "allreduce_coalesced_", "alltoall_", "alltoall_base_", "barrier",
    "broadcast_", "gather_", "recv_", "recv_any_source_", "reduce_", "reduce_scatter_",
    "reduce_scatter_tensor_coalesced_", "scatter_", "send",
)  # fmt: skip


@dataclass
class Call:
    """A call on its way through the dispatcher, whose tensors come out at its end."""

    group: Any
    method: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    work: Any = None
    """What the method returned, if the call came to it: a mode may have kept it."""


_calls = threading.local()
_library: Any = None
_registering = threading.Lock()


def is_seen(args: tuple[Any, ...]) -> bool:
    """Whether the dispatcher has to see a call with these arguments.

    Raises:
        InvalidArgument: a tensor is a DTensor, of which no collective knows what to send.
    """
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    if all(type(arg) in _PLAIN or (type(arg) is list and all(type(each) in _PLAIN for each in arg)) for arg in args):
        return False  # as nearly always
    if not any(answers_for_itself(tensor) for tensor in tensors_of(args)):
        return False
    _need_alike(args)
    return True


def _need_alike(args: tuple[Any, ...]) -> None:
    """Raises InvalidArgument where some tensors have values and others none."""
    if len({_has_values(tensor) for tensor in tensors_of(args)}) > 1:
        raise InvalidArgument("some tensors have values, others are fake or on device meta: expected one kind")


def _has_values(tensor: torch.Tensor) -> bool:
    return not tensor.is_meta and type(tensor).__name__ != "FakeTensor"


def answers_for_itself(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a __torch_dispatch__. Raises InvalidArgument for a DTensor."""
    kind = type(tensor)
    if kind in _PLAIN:
        return False
    if kind.__name__ == "DTensor":
        raise InvalidArgument("a DTensor, of which a collective knows no memory: pass x.to_local()")
    return kind.__torch_dispatch__ is not _NO_DISPATCH


def tensors_of(argument: Any) -> Iterator[torch.Tensor]:
    """The tensors of a call's arguments."""
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for each in argument:
            yield from tensors_of(each)


def send(group: Any, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Sends a call of the group through the dispatcher, to come to `method`. `name`: of c10d::ProcessGroup's."""
    _register()
    call = Call(group, method, args, kwargs)
    stack = _calls.__dict__.setdefault("stack", [])
    stack.append(call)
    try:
        work = getattr(group.twin, name)(*args, **kwargs)
    except NotImplementedError as error:
        if not any(answers_for_itself(tensor) for tensor in tensors_of(args)):
            raise  # a mode's
        kinds = sorted({type(tensor).__name__ for tensor in tensors_of(args) if answers_for_itself(tensor)})
        raise InvalidArgument(
            f"{name} of {' and '.join(kinds)}: pass the plain tensors that they wrap ({error})"
        ) from error
    finally:
        stack.pop()
    return work if call.work is None else call.work


def _register() -> None:
    global _library
    with _registering:
        if _library is None:
            _library = torch.library.Library("c10d", "IMPL")
            for name in _OPERATIONS:
                packet = getattr(torch.ops.c10d, name, None)
                if packet is not None:
                    _library.impl(name, _kernel_of(packet.default), _KEY, with_keyset=True)


def _kernel_of(operation: Any) -> Callable[..., Any]:
    group_at = next(i for i, a in enumerate(operation._schema.arguments) if a.name == "process_group")
    pair = len(operation._schema.returns) == 2

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        group = dist.ProcessGroup.unbox(args[group_at])
        stack = _calls.__dict__.get("stack")
        if not stack or stack[-1].group.twin is not group:
            return operation.redispatch(keys & _BELOW, *args, **kwargs)
        call = stack[-1]
        tensors = args[:group_at]
        _need_alike(tensors)
        if not all(_has_values(tensor) for tensor in tensors_of(tensors)):
            # There is nothing to send, as in torch's own backends, whose kernels for meta tensors say so.
            return operation.redispatch(keys & _BELOW, *args, **kwargs)
        own = 0 if operation.__name__.startswith("barrier") else group_at  # torch gives it a tensor that we do not need
        call.work = call.method(call.group, *args[:own], *call.args[own:], **call.kwargs)
        boxed = call.work.boxed()
        return (args[0], boxed) if pair else boxed

    return kernel
