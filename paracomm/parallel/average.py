"""An average of the weights, each rank of what it owns: an exponential moving average (EMA), or the mean (SWA).

torch.optim.swa_utils.AveragedModel copies a module and reads its parameters. Under ZeRO 3 they are not there; under
mixed precision they are bfloat16. This one averages what the optimizer steps, so that it is right in every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from paracomm.errors import InvalidArgument
from paracomm.parallel.weights import Weights


class Average:
    """The average of the weights that update() was called after. parallel.average(decay) makes it.

        ema = parallel.average(decay=0.999)
        for ...:
            optimizer.step()
            ema.update()
        with ema.applied():
            evaluate(parallel)

    The first update() takes the weights as they are. A later one makes the average decay * average + (1 - decay) *
    weight, as torch.optim.swa_utils.get_ema_avg_fn does, or the mean over all updates where `decay` is None. Buffers
    are the model's.
    """

    def __init__(
        self, weights: Sequence[Weights], settle: Callable[[], None], publish: Callable[[], None], decay: float | None
    ) -> None:
        if decay is not None and not 0.0 <= decay <= 1.0:
            raise InvalidArgument(f"average: decay is {decay}, expected 0 to 1, or None for the mean")
        self._weights, self._settle, self._publish = list(weights), settle, publish
        self.decay = decay
        self.updates = 0
        self._averages = [each.master.detach().clone() for each in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights as they are now into the average. Call it on every rank."""
        self._settle()
        for average, each in zip(self._averages, self._weights, strict=True):
            weight = 1 / (self.updates + 1) if self.decay is None else 1 - self.decay
            average.copy_(each.master) if self.updates == 0 else average.lerp_(each.master, weight)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module's parameters are the averages; evaluate or save it, and do not train it. Collective."""
        self._settle()
        self._swap()
        try:
            yield
        finally:
            self._settle()
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, each in zip(self._averages, self._weights, strict=True):
            kept = each.master.clone()
            each.master.copy_(average)
            average.copy_(kept)
        self._publish()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """{"updates": ..., "average": {name: whole tensor}}, in a tp group each rank's shards. Collective."""
        found: dict[str, Tensor] = {}
        for average, each in zip(self._averages, self._weights, strict=True):
            bucket = each.bucket
            flat = average if bucket.stage == 0 else bucket.comm.all_gather(average).flatten()
            found |= {name: part.clone() for name, part in zip(bucket.names, bucket.cut(flat), strict=True)}
        return {"updates": self.updates, "average": found}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what another layout saved. Raises InvalidArgument for other names or shapes."""
        saved = state["average"]
        for average, each in zip(self._averages, self._weights, strict=True):
            bucket = each.bucket
            for slot, source, target in each.owned_parts():
                name, shape = bucket.names[slot], bucket.members[slot].shape
                if name not in saved or saved[name].shape != shape:
                    came = list(saved[name].shape) if name in saved else "nothing"
                    raise InvalidArgument(f"average: '{name}' of {list(shape)} was saved as {came}")
                average[target] = saved[name].flatten()[source].to(average.dtype)
        self.updates = int(state["updates"])
