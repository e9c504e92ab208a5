"""All-reduce of gradients quantised in blocks: a reduce-scatter and an all-gather whose messages are int8 or int4.

    rank 0             rank 1             rank 2              what happens
    A0 | B0 | C0       A1 | B1 | C1       A2 | B2 | C2        gradient + residual, in three shards of whole blocks
    -- | b0 | c0       a1 | -- | c1       a2 | b2 | --        each quantises what it sends, and keeps the loss
    A0+a1+a2           B1+b0+b2           C2+c0+c1            all_to_all; the owner adds in float32, its own as it is
    a                  b                  c                   the mean, quantised again; the owner keeps the loss x n
    a | b | c          a | b | c          a | b | c           all_gather; all ranks decode the same bytes

Bytes a rank sends: 2 (n-1)/n x count x (bits/8 + 4/block), scales included; float32 sends 2 (n-1)/n x count x 4. The
two shuffles are those of 1-bit Adam (Tang et al., ICML 2021), the blocks those of Dettmers (ICLR 2016). Both losses
return to the residual of the rank that caused them, so that nothing is lost over time:

    sum over steps of result = sum over steps of mean - (1/n) sum over ranks of their residuals now

A bucket with fewer blocks than ranks is all-reduced in float32.

The first steps of training set where it goes, and gradients are largest there: int4 sends int8 during them, as 1-bit
Adam sends float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paracomm.comm.codec import BlockCodec
from paracomm.errors import InvalidArgument
from paracomm.hooks.blocks import TorchCodec
from paracomm.hooks.state import Bucket, Finish, HookState, ddp_hook, state_for
from paracomm.hooks.wire import as_float

BLOCKS = {8: 256, 4: 64}
"""Elements a block: int8 sends 3.94 times fewer bytes than float32, int4 7.11 times."""
WARM_UP = {8: 0, 4: 50}
"""Steps that are sent in int8 before `bits` begin."""


class QuantizedState(HookState):
    """Quantisation to `bits` (8 or 4) in blocks of `block` elements (None: 256 or 64), after `warm_up` steps in int8
    (None: 50 with 4 bits, which costs 8 % more bytes over 500 steps and 0.8 % over 5000).

    With the gradient g and the residual e of each rank: |result - mean(g + e)| <= mean over the other ranks of what
    their messages are off, plus what the mean's own message is off; a message is off by 1/254 (int8) or 13/98 (int4) of
    the largest magnitude of the element's block, and by 1/98 of it (int4) where the element is next to zero. An
    infinity or a NaN makes its block NaN on every rank, and leaves the residuals finite.

    Raises InvalidArgument for other bits or blocks, or a negative `warm_up`.
    """

    two_messages = True

    def __init__(
        self,
        where: Any = None,
        *,
        bits: int = 8,
        block: int | None = None,
        warm_up: int | None = None,
        model: nn.Module | None = None,
        feedback: bool = True,
    ) -> None:
        if bits not in BLOCKS:
            raise InvalidArgument(f"QuantizedState: bits is {bits}, expected 8 or 4")
        self.warm_up = WARM_UP[bits] if warm_up is None else warm_up
        if self.warm_up < 0:
            raise InvalidArgument(f"QuantizedState: warm_up is {warm_up}, expected at least 0 steps")
        self._early = BlockCodec(8, BLOCKS[8])
        self._late = BlockCodec(bits, BLOCKS[bits] if block is None else block)
        super().__init__(where, model=model, feedback=feedback)

    @property
    def codec(self) -> BlockCodec:
        """Of this step."""
        return self._early if self.steps < self.warm_up else self._late

    def codec_for(self, x: Tensor) -> BlockCodec | TorchCodec:
        """The core's loops on a CPU, torch's own operations elsewhere; the same bytes from both."""
        return self.codec if x.device.type == "cpu" else TorchCodec(self.codec.bits, self.codec.block)

    def start(self, bucket: Bucket) -> Finish:
        buffer, n = bucket.buffer(), self.wire.world_size
        count, block = buffer.numel(), self.codec.block
        shard_blocks = -(-self.codec.blocks(count) // n)
        if n == 1 or self.codec.blocks(count) < n:
            return self.start_exact(bucket)
        x = as_float(buffer)
        residual = None if self.memory is None else self.memory.flat(bucket)
        # This rank's own shard stays as it is: it meets the others' in float32.
        shard = shard_blocks * block
        low, high = min(count, self.wire.rank * shard), min(count, (self.wire.rank + 1) * shard)
        mine = x[low:high].clone()
        if residual is not None:
            mine += residual[low:high]
        codec, nbytes = self.codec_for(x), self.codec.nbytes(shard_blocks)
        sent = torch.empty(n * nbytes, dtype=torch.uint8, device=x.device)
        for part, message in (
            (slice(0, low), sent[: self.wire.rank * nbytes]),
            (slice(high, count), sent[(self.wire.rank + 1) * nbytes :]),
        ):
            kept = None if residual is None else residual[part]
            codec.encode(x[part], message, residual=kept, kept=kept)
        received = torch.empty_like(sent)
        work = self.wire.all_to_all(received, sent)

        def finish() -> Tensor:
            work.wait()
            for rank, message in enumerate(received.split(nbytes)):
                if rank != self.wire.rank:
                    codec.decode(message, mine, add=True)
            mean = sent[:nbytes]  # the first message has left: its memory serves the second
            codec.encode(mine, mean, kept=None if residual is None else residual[low:high], divisor=float(n))
            self.second.all_gather(received, mean).wait()
            codec.decode(received, x)
            return buffer if x is buffer else buffer.copy_(x)

        return finish


@ddp_hook
def int8_hook(state: Any, bucket: Bucket) -> Any:
    """The mean through int8 blocks. `state`: a QuantizedState, a process group (None: the default), a Communicator."""
    return state_for(QuantizedState, state, bits=8).run(bucket)


@ddp_hook
def int4_hook(state: Any, bucket: Bucket) -> Any:
    """The mean through int4 blocks. `state`: as int8_hook's; a QuantizedState decides the bits itself."""
    return state_for(QuantizedState, state, bits=4).run(bucket)
