"""The largest gradients only: every rank sends its k largest magnitudes of each bucket, with where they are.

    bytes a rank sends, n ranks, N elements: (n-1) x 8 k, with k = ratio x N

The mean of what was sent is the result; all else stays in the residual (Stich et al., "Sparsified SGD with memory",
NeurIPS 2018). The bytes grow with n, so that it suits small ratios and few ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paracomm.errors import InvalidArgument
from paracomm.hooks.state import Bucket, Finish, HookState, ddp_hook, state_for


class TopKState(HookState):
    """`ratio` of each bucket's elements (at least one) are sent, 0 < ratio <= 1.

    With the gradient g and the residual e of each rank: |result - mean(g + e)| <= the mean over the ranks of their k-th
    largest magnitude. A NaN or an infinity counts as largest and is sent.

    Raises InvalidArgument for other ratios.
    """

    def __init__(
        self, where: Any = None, *, ratio: float = 0.01, model: nn.Module | None = None, feedback: bool = True
    ) -> None:
        if not 0 < ratio <= 1:
            raise InvalidArgument(f"TopKState: ratio is {ratio}, expected more than 0 and at most 1")
        self.ratio = ratio
        super().__init__(where, model=model, feedback=feedback)

    def kept(self, count: int) -> int:
        """How many of `count` elements are sent."""
        return min(count, max(1, round(self.ratio * count)))

    def start(self, bucket: Bucket) -> Finish:
        buffer, n = bucket.buffer(), self.wire.world_size
        if self.memory is None:
            y = buffer.float()
        else:
            y = self.memory.flat(bucket)
            y += buffer
        k = self.kept(y.numel())
        places = y.abs().topk(k, sorted=False).indices
        sent = torch.cat([y[places].view(torch.int32), places.to(torch.int32)])
        if self.memory is not None:
            y[places] = 0.0
        received = torch.empty(n * 2 * k, dtype=torch.int32, device=y.device)
        work = self.wire.all_gather(received, sent)

        def finish() -> Tensor:
            work.wait()
            result = torch.zeros(buffer.numel(), dtype=torch.float32, device=buffer.device)
            for values, where in received.view(n, 2, k):
                # One rank's places differ from each other, so that the order of the sum is the ranks' on every rank.
                result.index_add_(0, where, values.view(torch.float32))
            return buffer.copy_(result.div_(n))

        return finish


@ddp_hook
def topk_hook(state: Any, bucket: Bucket) -> Any:
    """The mean of the largest gradients. `state`: a TopKState, a process group (None: the default), a Communicator."""
    return state_for(TopKState, state).run(bucket)
