"""What every call of the process group passes first: torch's dispatcher where it has to see the call, and the
profiler's trace, in which a call is a range named `paracomm:all_reduce` and so on, with the shapes of its inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import _profiler_enabled

from paracomm.backend import dispatch


def named(name: str, inputs: int = 0) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a method its range, while a profiler is on; `inputs` is the position of the argument that holds them.

    The range of an asynchronous call is that of its launch. (torch's own backends end theirs in the thread that
    completes the operation; from Python such an end is lost, because the profiler's state belongs to a thread.)
    """
    label = f"paracomm:{name}"

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not _profiler_enabled():
                return method(self, *args, **kwargs)
            shown = list(dispatch.tensors_of(args[inputs] if len(args) > inputs else None))
            with _RecordFunctionFast(label, shown, {}):
                return method(self, *args, **kwargs)

        return seen(functools.wraps(method)(traced))

    return decorate


def seen(method: Callable[..., Any]) -> Callable[..., Any]:
    """Lets torch's dispatcher see the calls of a method that it has to see."""
    name = method.__name__

    # The peer of a message is no tensor, whatever it is.
    tensors = 1 if name in ("send", "recv", "recv_anysource") else 2

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if dispatch.is_seen(args[:tensors]):
            return dispatch.send(self, name, method, *args, **kwargs)
        return method(self, *args, **kwargs)

    return call if hasattr(dist.ProcessGroup, name) else method
