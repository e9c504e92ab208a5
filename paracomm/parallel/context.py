"""Context parallelism: the positions of a sequence are spread over the ranks of a group.

Shapes: see attention.py; T and S are this rank's positions, of n ranks.

Every rank holds two chunks of a sequence that is cut into 2n, r and 2n - 1 - r ("zigzag"), so that causal attention is
as much work for each. What rank 1 of 3 sees while keys and values go round (chunks 0..5, # all, \\ up to the diagonal):

    source          1 (its own)    0              2
    keys            1   4          0   5          2   3
    queries 1       \\   .          #   .          .   .
    queries 4       #   \\          #   .          #   #

Each step after the first is half of a full block, on every rank: all queries see a source's first chunk, or the second
half of the queries sees all of it. Ring attention (Liu et al., 2023; striped by Brandon et al., 2023): at each step a
rank sends the keys and values that it has to its right and receives the next from its left while it works on these.

    forward    n - 1 steps    bytes sent per rank: (n - 1) (k + v)
    backward   as many with k and v, and n in which dk and dv go along, one behind: (n - 1) (k + v) + n (dk + dv)

Ulysses (Jacobs et al., 2023) exchanges positions for heads: an all_to_all gives each rank all positions of its share of
heads, another one brings the result back. (n - 1) / n of q, k, v and out are sent, and the same in backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from paracomm.comm import Communicator
from paracomm.errors import InvalidArgument
from paracomm.kernels.autocast import as_autocast, autocast_off
from paracomm.kernels.derivatives import once
from paracomm.parallel import rng
from paracomm.parallel.attention import (
    Attention,
    Rule,
    attention,
    block_backward,
    block_forward,
    check_shapes,
    finite,
)

Method = Literal["ring", "ulysses"]
# Messages of one pair and tag keep their order; keys and gradients have tags of their own where left is right, too.
KEYS_TAG, GRADIENTS_TAG = 1, 2


def context_positions(T: int, n: int, r: int) -> Tensor:
    """The positions of a sequence of `T` that rank `r` of `n` holds: chunks r and 2n - 1 - r of 2n, int64 [T / n].

    Raises InvalidArgument if T is not a multiple of 2n (n > 1), or r is not a rank.
    """
    if not 0 <= r < n:
        raise InvalidArgument(f"context_positions: rank {r} of {n}")
    if n == 1:
        return torch.arange(T)
    if T % (2 * n):
        raise InvalidArgument(
            f"context_positions: a sequence of {T} positions is not cut into {2 * n} equal chunks, two for each of the "
            f"{n} ranks; expected a multiple of {2 * n}"
        )
    chunks = torch.arange(T).view(2 * n, -1)
    return torch.cat([chunks[r], chunks[2 * n - 1 - r]])


class ContextAttention(Attention):
    """Takes the place of `core` where q, k and v hold this rank's positions, context_positions(), of the sequence.

    Args:
        group: the ranks that share a sequence; all of them call it together.
        method: "ring", or "ulysses", whose group must divide the heads and the key-value heads.

    Forward and backward give what `core` gives for the whole sequence, up to rounding, and the same bits from run to
    run; dropout drops the same elements. For cross-attention the encoder's positions are spread by the same rule.

    Raises InvalidArgument for an unknown method; on each call for heads that the group does not divide (ulysses), for
    positions that are not context_positions(), and for `causal` where q and k have different lengths.
    """

    def __init__(self, core: Attention, group: Communicator, method: Method = "ring") -> None:
        super().__init__(core.p)
        if method not in get_args(Method):
            raise InvalidArgument(f"ContextAttention: method {method!r}, expected one of {get_args(Method)}")
        self.stream, self.head_part = core.stream, core.head_part
        self.train(core.training)
        self.group = group
        self.method = method
        self.whole = False
        """Whether every rank has the whole sequence for now, see plan.whole_sequences."""

    def forward(
        self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, *, causal: bool = True, key_mask: Tensor | None = None
    ) -> Tensor:
        """out_BHTK of this rank's queries. `key_mask`: bool [B, S] of this rank's keys, on all ranks or on none."""
        if self.group.world_size == 1 or self.whole:
            return super().forward(q_BHTK, k_BGSK, v_BGSK, causal=causal, key_mask=key_mask)
        q_BHTK, k_BGSK, v_BGSK = as_autocast(q_BHTK, k_BGSK, v_BGSK)
        T, S = q_BHTK.shape[2], k_BGSK.shape[2]
        q_positions, k_positions = self._positions(T, S, causal)
        check_shapes(q_BHTK, k_BGSK, v_BGSK, q_positions[0], k_positions[0], key_mask)
        key_masks = None if key_mask is None else list(self.group.all_gather(key_mask.contiguous()))
        dropout = self.head_dropout(q_BHTK.shape[1])
        rule = Rule(causal, q_BHTK.shape[-1] ** -0.5, dropout, None if dropout is None else rng.current())
        if self.method == "ulysses":
            return _ulysses(q_BHTK, k_BGSK, v_BGSK, rule, self.group, q_positions, k_positions, key_masks)
        ring = Ring(self.group, rule, q_positions[self.group.rank], k_positions, key_masks)
        with autocast_off(q_BHTK):
            out: Tensor = _RingAttention.apply(q_BHTK, k_BGSK, v_BGSK, ring)
        return out

    def _positions(self, T: int, S: int, causal: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Of every rank's queries and keys."""
        n, me = self.group.world_size, self.group.rank
        if causal and T != S:
            raise InvalidArgument(f"ContextAttention: causal attention of {T} queries to {S} keys, expected as many")
        q_positions = [context_positions(n * T, n, rank) for rank in range(n)]
        if rng.placed() is not None and not torch.equal(rng.positions(T), q_positions[me]):
            raise InvalidArgument(
                f"ContextAttention rank {me} of {n}: the Place's positions are not context_positions({n * T}, {n}, "
                f"{me})"
            )
        return q_positions, [context_positions(n * S, n, rank) for rank in range(n)]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.method} over {self.group.world_size} ranks"


# --- ring ---
@dataclass(frozen=True)
class Ring:
    """One attention over the ranks of `group`: what does not depend on q, k and v."""

    group: Communicator
    rule: Rule
    q_positions: Tensor
    k_positions: list[Tensor]
    key_masks: list[Tensor] | None

    def seen(self, source: int) -> tuple[slice, slice]:
        """(queries of this rank, keys of `source`) outside of which nothing is seen."""
        me, everything = self.group.rank, slice(None)
        if not self.rule.causal or source == me:
            return everything, everything
        half = len(self.q_positions) // 2
        return (everything, slice(half)) if source < me else (slice(half, None), everything)

    def block(self, source: int, queries: slice, keys: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """The last three arguments of block_forward() and block_backward()."""
        mask = None if self.key_masks is None else self.key_masks[source][:, keys]
        return self.q_positions[queries], self.k_positions[source][keys], mask

    def rotate(self, packed: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(source, its `packed`) of every rank, this one first, then leftwards. The next one travels while the caller
        works, so a tensor is good until the caller asks for the next; `packed` itself is overwritten."""
        n, me = self.group.world_size, self.group.rank
        spare = torch.empty_like(packed)
        for step in range(n):
            works = self.shift(packed, spare, KEYS_TAG) if step < n - 1 else []
            yield (me - step) % n, packed
            for work in works:
                work.wait()
            packed, spare = spare, packed

    def shift(self, packed: Tensor, spare: Tensor, tag: int) -> list[Any]:
        """Starts sending `packed` to the right and receiving `spare` from the left."""
        n, me = self.group.world_size, self.group.rank
        return [
            self.group.recv(spare, (me - 1) % n, tag=tag, async_op=True),
            self.group.send(packed, (me + 1) % n, tag=tag, async_op=True),
        ]


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> Tensor:
        total: Tensor | None = None
        for source, (k_s, v_s) in ring.rotate(torch.stack([k, v])):
            queries, keys = ring.seen(source)
            rest = ring.block(source, queries, keys)
            out, lse = block_forward(ring.rule, q[:, :, queries], k_s[:, :, keys], v_s[:, :, keys], *rest)
            if total is None:
                total, total_lse = out.to(lse.dtype), lse.contiguous()
            else:
                merge_(total[:, :, queries], total_lse[:, :, queries], out, lse)
        assert total is not None
        total = total.to(q.dtype)
        ctx.save_for_backward(q, k, v, total, total_lse)
        ctx.ring = ring
        return total

    @staticmethod
    @once("ring attention")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with autocast_off(grad):
            return _RingAttention.gradients(ctx.ring, grad, *ctx.saved_tensors)

    @staticmethod
    def gradients(
        ring: Ring, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor | None, ...]:
        dq = torch.zeros(q.shape, dtype=lse.dtype)
        # dk and dv of the keys at hand, summed in the order in which these visit the ranks, starting at their own.
        carried, spare = torch.zeros(2, *k.shape, dtype=lse.dtype), torch.empty(2, *k.shape, dtype=lse.dtype)
        works: list[Any] = []
        for source, (k_s, v_s) in ring.rotate(torch.stack([k, v])):
            queries, keys = ring.seen(source)
            rest = ring.block(source, queries, keys)
            part_q, part_k, part_v = block_backward(
                ring.rule, grad[:, :, queries], q[:, :, queries], k_s[:, :, keys], v_s[:, :, keys],
                out[:, :, queries], lse[:, :, queries], *rest,
            )  # fmt: skip
            dq[:, :, queries] += part_q
            for work in works:
                work.wait()
            if works:
                carried, spare = spare, carried
            carried[0][:, :, keys] += part_k
            carried[1][:, :, keys] += part_v
            works = ring.shift(carried, spare, GRADIENTS_TAG)
        for work in works:
            work.wait()
        dk, dv = spare
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def merge_(total_BHTK: Tensor, total_lse_BHT: Tensor, out_BHTK: Tensor, lse_BHT: Tensor) -> None:
    """Adds a block's out and lse to those of the blocks before it, in place."""
    both = torch.logaddexp(total_lse_BHT, lse_BHT)
    shift = finite(both)
    total_BHTK.mul_((total_lse_BHT - shift).exp().unsqueeze(-1)).add_(out_BHTK * (lse_BHT - shift).exp().unsqueeze(-1))
    total_lse_BHT.copy_(both)


# --- all-to-all over heads ---
def _ulysses(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, group: Communicator, q_positions: list[Tensor],
    k_positions: list[Tensor], key_masks: list[Tensor] | None,
) -> Tensor:  # fmt: skip
    n, me = group.world_size, group.rank
    for heads, what in ((q.shape[1], "heads"), (k.shape[1], "key-value heads")):
        if heads % n:
            raise InvalidArgument(
                f"ContextAttention: ulysses over {n} ranks does not divide the {heads} {what}; use ring"
            )
    # Whole sequences are put into their order, so that the causal block is a plain triangle.
    q_order, k_order = (torch.cat(positions).argsort() for positions in (q_positions, k_positions))
    dropout = rule.dropout
    if dropout is not None:
        dropout = dropout._replace(head_offset=dropout.head_offset + me * (q.shape[1] // n))
    key_mask = None if key_masks is None else torch.cat(key_masks, 1)[:, k_order]
    out, _ = attention(
        _to_heads(q, group).index_select(2, q_order),
        _to_heads(k, group).index_select(2, k_order),
        _to_heads(v, group).index_select(2, k_order),
        q_positions=torch.arange(len(q_order)), k_positions=torch.arange(len(k_order)), causal=rule.causal,
        scale=rule.scale, dropout=dropout, key_mask=key_mask,
    )  # fmt: skip
    return _to_positions(out.index_select(2, q_order.argsort()), group)


def _to_heads(x_BHTK: Tensor, group: Communicator) -> Tensor:
    """Of all heads at this rank's positions: this rank's heads [B, H / n, n T, K], positions in rank order."""
    received = _AllToAll.apply(x_BHTK.unflatten(1, (group.world_size, -1)).movedim(1, 0), group)  # n B H/n T K
    whole: Tensor = received.permute(1, 2, 0, 3, 4).flatten(2, 3)
    return whole


def _to_positions(x_BHTK: Tensor, group: Communicator) -> Tensor:
    """The inverse: [B, H / n, n T, K] becomes [B, H, T, K]."""
    received = _AllToAll.apply(x_BHTK.unflatten(2, (group.world_size, -1)).movedim(2, 0), group)  # n B H/n T K
    whole: Tensor = received.movedim(0, 1).flatten(1, 2)
    return whole


class _AllToAll(torch.autograd.Function):
    """x[r] goes to rank r; what came from rank r is in [r]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Communicator) -> Tensor:
        ctx.group = group
        received: Tensor = group.all_to_all(x.contiguous())
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad, ctx.group), None
