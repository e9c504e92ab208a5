"""All-reduce as it is, or in 16 bits; and the same casts around any other hook.

bytes a rank sends, n ranks, S bytes of gradients: 2 S (n-1)/n for allreduce, half of that in 16 bits
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paracomm.hooks.lane import keeps_order, one_at_a_time
from paracomm.hooks.state import Bucket, Finish, HookState, ddp_hook, state_for

Hook = Callable[[Any, Bucket], Any]


class AllReduceState(HookState):
    """The mean by one all-reduce; nothing is lost."""

    def __init__(self, where: Any = None, *, model: nn.Module | None = None) -> None:
        super().__init__(where, model=model, feedback=False)

    def start(self, bucket: Bucket) -> Finish:
        return self.start_exact(bucket)


class CastState(HookState):
    """The mean by one all-reduce in `dtype`, torch.float16 or torch.bfloat16.

    |result - mean| <= (n + 1) u x the mean magnitude of what the n ranks put in, u = 2^-11 or 2^-8, on engines that
    round every addition as Gloo does, and 2 u x it on ours, while no float16 leaves +-65504. What the cast of this
    rank's gradient loses comes back in the next step.
    """

    def __init__(self, where: Any = None, *, dtype: torch.dtype, model: nn.Module | None = None, feedback: bool = True):
        super().__init__(where, model=model, feedback=feedback)
        self.dtype = dtype

    def start(self, bucket: Bucket) -> Finish:
        buffer = bucket.buffer()
        if self.memory is None:
            small = buffer.to(self.dtype, copy=True)
        else:
            residual = self.memory.flat(bucket)
            residual += buffer
            small = residual.to(self.dtype)
            residual -= small
            torch.nan_to_num_(residual, 0.0, 0.0, 0.0)  # an overflow must not stay
        work = self.wire.average(small)

        def finish() -> Tensor:
            work.wait()
            return buffer.copy_(small)

        return finish


@ddp_hook
def allreduce_hook(state: Any, bucket: Bucket) -> Any:
    """The mean, as it is. `state`: an AllReduceState, or a process group (None: the default), or a Communicator."""
    return state_for(AllReduceState, state).run(bucket)


@ddp_hook
def fp16_hook(state: Any, bucket: Bucket) -> Any:
    """The mean in float16, with error feedback. `state`: a CastState, a process group or None, or a Communicator."""
    return state_for(CastState, state, dtype=torch.float16).run(bucket)


@ddp_hook
def bf16_hook(state: Any, bucket: Bucket) -> Any:
    """The mean in bfloat16, with error feedback, on any device. `state`: as fp16_hook's."""
    return state_for(CastState, state, dtype=torch.bfloat16).run(bucket)


def cast_wrapper(hook: Hook, dtype: torch.dtype) -> Hook:
    """`hook` on the gradients rounded to `dtype`; the result comes back in the bucket's own dtype."""

    def wrapped(state: Any, bucket: Any) -> Any:
        wide = bucket.buffer()
        bucket.set_buffer(wide.to(dtype))

        def widen(done: Any) -> Tensor:
            wide.copy_(first_tensor(done.value()))
            bucket.set_buffer(wide)
            return wide

        return hook(state, bucket).then(widen)

    wrapped.__qualname__ = f"cast_wrapper({getattr(hook, '__qualname__', type(hook).__name__)}, {dtype})"
    wrapped.__annotations__ = {}  # DDP refuses strings
    return keeps_order(wrapped) if one_at_a_time(hook) is hook else wrapped


def fp16_wrapper(hook: Hook) -> Hook:
    """`hook` on gradients rounded to float16."""
    return cast_wrapper(hook, torch.float16)


def bf16_wrapper(hook: Hook) -> Hook:
    """`hook` on gradients rounded to bfloat16."""
    return cast_wrapper(hook, torch.bfloat16)


def first_tensor(result: Any) -> Tensor:
    """A hook's result: a tensor, or a list of one as torch's collectives give it."""
    return result[0] if isinstance(result, (list, tuple)) else result


__all__ = [
    "AllReduceState",
    "CastState",
    "Hook",
    "allreduce_hook",
    "bf16_hook",
    "bf16_wrapper",
    "cast_wrapper",
    "first_tensor",
    "fp16_hook",
    "fp16_wrapper",
]
