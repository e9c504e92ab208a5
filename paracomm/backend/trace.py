"""Ranges of the profiler's trace, one a call, named `paracomm:all_reduce` and so on, with the shapes of its inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import _profiler_enabled


def named(name: str, inputs: int = 0) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a method its range, while a profiler is on; `inputs` is the position of the argument that holds them.

    The range of an asynchronous call is that of its launch. (torch's own backends end theirs in the thread that
    completes the operation; from Python such an end is lost, because the profiler's state belongs to a thread.)
    """
    label = f"paracomm:{name}"

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not _profiler_enabled():
                return method(self, *args, **kwargs)
            with _RecordFunctionFast(label, list(_tensors(args[inputs] if len(args) > inputs else None)), {}):
                return method(self, *args, **kwargs)

        return call

    return decorate


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for each in argument:
            yield from _tensors(each)
