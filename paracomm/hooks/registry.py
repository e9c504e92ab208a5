"""Our hooks by name, as the benches, the tests and the command line walk them. One more is one more line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from paracomm.hooks.hierarchical import HierarchicalState, hierarchical_hook
from paracomm.hooks.local_sgd import LocalSGDState, local_sgd_hook
from paracomm.hooks.plain import AllReduceState, CastState, Hook, allreduce_hook, bf16_hook, fp16_hook, fp16_wrapper
from paracomm.hooks.powersgd import PowerSGDState, batched_powersgd_hook, powersgd_hook
from paracomm.hooks.quantized import WARM_UP, QuantizedState, int4_hook, int8_hook
from paracomm.hooks.state import HookState
from paracomm.hooks.topk import TopKState, topk_hook


@dataclass(frozen=True)
class HookKind:
    """`make(where, **options)` gives the state that `hook` takes; `summary` is for people, and true of the steps after
    the first `warm_up`."""

    hook: Hook
    make: Callable[..., HookState]
    summary: str
    warm_up: int = 0


HOOKS: dict[str, HookKind] = {
    "allreduce": HookKind(allreduce_hook, AllReduceState, "as it is"),
    "fp16": HookKind(fp16_hook, partial(CastState, dtype=torch.float16), "float16, half the bytes"),
    "bf16": HookKind(bf16_hook, partial(CastState, dtype=torch.bfloat16), "bfloat16, half the bytes"),
    "int8": HookKind(int8_hook, partial(QuantizedState, bits=8), "int8 blocks, 3.9 times fewer bytes"),
    "int4": HookKind(int4_hook, partial(QuantizedState, bits=4), "int4 blocks, 7.1 times fewer bytes", WARM_UP[4]),
    "topk": HookKind(topk_hook, TopKState, "the largest hundredth of each bucket"),
    "powersgd": HookKind(powersgd_hook, PowerSGDState, "rank-4 matrices, a parameter each"),
    "batched_powersgd": HookKind(batched_powersgd_hook, partial(PowerSGDState, batched=True), "a bucket each"),
    "fp16+powersgd": HookKind(fp16_wrapper(powersgd_hook), PowerSGDState, "PowerSGD of gradients rounded to float16"),
    "local_sgd": HookKind(local_sgd_hook, LocalSGDState, "inside a host, models averaged now and then"),
    "hierarchical": HookKind(hierarchical_hook, HierarchicalState, "float32 inside a host, another hook between"),
    "hierarchical+int8": HookKind(
        hierarchical_hook,
        partial(HierarchicalState, outer=partial(QuantizedState, bits=8)),
        "float32 inside a host, int8 blocks between",
    ),
}


def make_hook(name: str, where: Any = None, **options: Any) -> tuple[Any, Hook]:
    """(state, hook) of the name, over the group of ranks `where`; collective. Raises KeyError for no such name."""
    kind = HOOKS[name]
    return kind.make(where, **options), kind.hook
