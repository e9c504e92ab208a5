"""Gradient hooks: what DDP or our reducer sends instead of the gradients.

state = hooks.QuantizedState(bits=8, model=model)
ddp.register_comm_hook(state, hooks.int8_hook)                  # torch DDP, on any backend
DataParallel(model, comm, hook=hooks.int8_hook, state=hooks.QuantizedState(comm, bits=8))   # our own reducer
"""

from paracomm.hooks.hierarchical import HierarchicalState, hierarchical_hook
from paracomm.hooks.local_sgd import LocalSGDState, local_sgd_hook
from paracomm.hooks.plain import (
    AllReduceState,
    CastState,
    Hook,
    allreduce_hook,
    bf16_hook,
    bf16_wrapper,
    cast_wrapper,
    fp16_hook,
    fp16_wrapper,
)
from paracomm.hooks.powersgd import PowerSGDState, batched_powersgd_hook, powersgd_hook
from paracomm.hooks.quantized import QuantizedState, int4_hook, int8_hook
from paracomm.hooks.registration import noop_hook, register
from paracomm.hooks.registry import HOOKS, make_hook
from paracomm.hooks.state import Bucket, HookState
from paracomm.hooks.topk import TopKState, topk_hook
from paracomm.hooks.wire import CommWire, Wire, wire_of

__all__ = [
    "HOOKS",
    "AllReduceState",
    "Bucket",
    "CastState",
    "CommWire",
    "HierarchicalState",
    "Hook",
    "HookState",
    "LocalSGDState",
    "PowerSGDState",
    "QuantizedState",
    "TopKState",
    "Wire",
    "allreduce_hook",
    "batched_powersgd_hook",
    "bf16_hook",
    "bf16_wrapper",
    "cast_wrapper",
    "fp16_hook",
    "fp16_wrapper",
    "hierarchical_hook",
    "int4_hook",
    "int8_hook",
    "local_sgd_hook",
    "make_hook",
    "noop_hook",
    "powersgd_hook",
    "register",
    "topk_hook",
    "wire_of",
]
