"""Post-local SGD: after a warm-up the ranks of a host train on their own, and all models are averaged now and then.

steps before start_step      gradients are averaged over all ranks, as without a hook
after                        over the ranks of one host only; average(model), called after each optimizer step,
                             averages the parameters over all ranks every `period` steps

bytes between hosts: those of one all-reduce every `period` steps (Lin et al., "Don't use large mini-batches, use
local SGD", ICLR 2020)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paracomm.errors import InvalidArgument
from paracomm.hooks.state import Bucket, Finish, HookState, ddp_hook, state_for
from paracomm.hooks.wire import Wire, wire_of


class LocalSGDState(HookState):
    """Averages over all ranks for `start_step` steps, then over `inside`.

    Args:
        inside: a process group or Communicator of some ranks, this one included; None: those of this host. With
            "alone" every rank keeps its own gradients.
        period: steps between two averages of the parameters.

    The result is the exact mean over the group in question. Raises InvalidArgument for a period below 1.
    """

    def __init__(
        self,
        where: Any = None,
        *,
        start_step: int = 100,
        period: int = 4,
        inside: Any = None,
        model: nn.Module | None = None,
    ) -> None:
        if period < 1 or start_step < 0:
            raise InvalidArgument(f"LocalSGDState: period {period}, start_step {start_step}, expected from 1 and 0 on")
        super().__init__(where, model=model, feedback=False)
        self.start_step, self.period = start_step, period
        self._owns_inside = inside is None
        self.inside: Wire | None = None
        if inside is None:
            self.inside = self.wire.split(self.wire.hosts()[self.wire.rank])
        elif inside != "alone":
            self.inside = wire_of(inside)

    @property
    def is_local(self) -> bool:
        """Whether the next step's gradients stay inside."""
        return self.steps >= self.start_step

    def start(self, bucket: Bucket) -> Finish:
        buffer = bucket.buffer()
        wire = self.inside if self.is_local else self.wire
        work = None if wire is None else wire.average(buffer)

        def finish() -> Tensor:
            if work is not None:
                work.wait()
            return buffer

        return finish

    @torch.no_grad()
    def average(self, model: nn.Module) -> bool:
        """Averages the parameters over all ranks if it is time, after the optimizer's step. True if it did."""
        if self.steps < self.start_step or (self.steps - self.start_step) % self.period:
            return False
        for parameter in model.parameters():
            whole = parameter.detach().contiguous()
            self.wire.average(whole).wait()
            if whole.data_ptr() != parameter.data_ptr():
                parameter.copy_(whole)
        return True

    def wires(self) -> list[Wire]:
        return [*super().wires(), *([] if self.inside is None else [self.inside])]

    def close(self) -> None:
        super().close()
        if self.inside is not None and self._owns_inside:
            self.inside.close()


@ddp_hook
def local_sgd_hook(state: Any, bucket: Bucket) -> Any:
    """Post-local SGD. `state`: a LocalSGDState, a process group (None: the default), a Communicator."""
    return state_for(LocalSGDState, state).run(bucket)
