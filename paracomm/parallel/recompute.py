"""Activation recomputation: forward keeps a part's inputs only, backward runs it again, with the same dropout.

    mode        kept of each block                         computed twice
    none        everything                                 nothing
    selective   everything but what is inside attention    the attention core
    full        the block's input                          the block

Chen, Xu, Zhang, Guestrin, "Training deep nets with sublinear memory cost", 2016; the selective mode is Korthikanti et
al., "Reducing activation recomputation in large Transformer models", 2022. Every mode gives the same bits: masks follow
from the place (paracomm.parallel.rng), which is put back for the second run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from paracomm.errors import InvalidArgument
from paracomm.parallel import rng
from paracomm.parallel.attention import Attention

Mode = Literal["none", "selective", "full"]


_plain: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def plain() -> Iterator[None]:
    """Inside, checkpoint() keeps everything, as if it were not there."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), of whose work backward keeps the arguments alone and runs it again.

    `function` draws random numbers through paracomm.parallel.rng only; what it sends, all ranks send again.
    """
    if _plain.get() or not torch.is_grad_enabled():
        return function(*args, **kwargs)
    place = rng.placed()

    def run(*args: Any, **kwargs: Any) -> Any:
        with rng.at(place):
            return function(*args, **kwargs)

    return torch_checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def recompute(model: nn.Module, mode: Mode) -> None:
    """Makes `model` recompute: the items of every nn.ModuleList (full), or every attention core (selective).

    Call it once, after a plan has replaced modules. Raises InvalidArgument for another mode, and where there is nothing
    of the kind.
    """
    if mode not in get_args(Mode):
        raise InvalidArgument(f"recompute: mode is '{mode}', expected one of {', '.join(get_args(Mode))}")
    if mode == "none":
        return
    parts: list[nn.Module] = []
    for module in model.modules():
        if mode == "selective" and isinstance(module, Attention):
            parts.append(module)
        elif mode == "full" and isinstance(module, nn.ModuleList):
            parts.extend(module)
    if not parts:
        what = "attention core" if mode == "selective" else "nn.ModuleList of blocks"
        raise InvalidArgument(f"recompute: '{mode}' found no {what} in {type(model).__name__}")
    for part in parts:
        part.forward = partial(checkpoint, part.forward)
