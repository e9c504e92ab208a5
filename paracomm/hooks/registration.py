"""Giving a hook to a model: whatever can be called, on DistributedDataParallel or on our DataParallel.

DDP looks at a hook's signature and name: it refuses partials and callable objects (they have no __name__), annotations
that are strings, and, by its name, bf16_compress_hook on a CPU. What is registered here is a plain function around the
hook, without annotations, that also tells all ranks when the hook raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from paracomm.errors import InvalidArgument
from paracomm.hooks.lane import because_of, one_at_a_time, raised_in_backward
from paracomm.hooks.plain import Hook
from paracomm.hooks.state import Bucket, HookState, ddp_hook
from paracomm.hooks.wire import Wire, wire_of


def register(model: nn.Module, hook: Hook, state: Any = None) -> None:
    """Makes `hook(state, bucket)` the communication hook of `model`, DistributedDataParallel or DataParallel.

    Partials, callable objects and annotations of any kind are welcome. A state of ours learns the names of the model's
    parameters. What the hook raises is raised on this rank, and ends the communication of the group on all others. A
    hook that is not ours is called for one bucket at a time (see lane.py).

    Raises InvalidArgument for another kind of model, or a hook that cannot be called.
    """
    if not callable(hook):
        raise InvalidArgument(f"a hook must be callable, not {type(hook)}")
    if isinstance(state, HookState):
        state.bind(model)
    reducer: Any = getattr(model, "reducer", None)
    if hasattr(reducer, "set_hook"):
        reducer.set_hook(hook, state)
    elif hasattr(model, "register_comm_hook"):
        ddp: Any = model
        ddp.register_comm_hook(state, plain_function(hook, wire_of(ddp.process_group)))
    else:
        raise InvalidArgument(
            f"{type(model).__name__} takes no hook: wrap it in DistributedDataParallel or DataParallel"
        )


def plain_function(hook: Hook, wire: Wire | None = None) -> Hook:
    """A function that DDP takes for `hook`. What the hook or its future raises aborts `wire` first."""
    in_order = one_at_a_time(hook, wire)

    def registered_hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP accepts no string annotation
        try:
            return raised_in_backward(in_order(state, bucket))
        except BaseException as error:
            if wire is not None:
                wire.abort(because_of(error))
            raise

    registered_hook.__qualname__ = describe(hook)
    return registered_hook


def describe(hook: Hook) -> str:
    """What a hook is called in logs and messages."""
    named = getattr(hook, "func", hook)  # a partial's function
    return getattr(named, "__qualname__", type(hook).__qualname__)


@ddp_hook
def noop_hook(state: Any, bucket: Bucket) -> Any:
    """Leaves every rank its own gradients: how long does a step take without communication?"""
    done: torch.futures.Future[Any] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
