"""Parameters side by side in one flat tensor for each bucket, in the bucket's order, and the part that a rank owns.

full     [count]   what forward and backward read; every parameter of the bucket is a view into it
master   [owned]   what the optimizer steps: a part of `full` itself, or float32 beside a bfloat16 `full`

zero   full              master                      after the optimizer's step
0      always there      all of it                   cast, under mixed precision
1, 2   always there      this rank's block           cast, all_gather
3      while a unit is   this rank's block, in       nothing: the next use gathers
       in use            memory of its own
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paracomm.errors import Error, InvalidArgument
from paracomm.parallel.bucket import Bucket, take_changes
from paracomm.parallel.reduction import Pending, new_flat


class Weights:
    """The parameters of `bucket`, with the values that its first rank has. Collective on the bucket's ranks."""

    @torch.no_grad()
    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.comm: Any = bucket.comm
        """Who gathers."""
        self._like = bucket.members[0].detach()
        self._nothing: list[Tensor] = []
        self._nans: list[Tensor] = []
        self._views: list[Tensor] = []
        """What the parameters are views of, or hold instead."""
        self._places: list[tuple[Any, ...]] = []
        self._mixed = bucket.dtype != bucket.master_dtype
        whole = self._new(bucket.count, bucket.master_dtype, shared=bucket.stage in (1, 2) and not self._mixed)
        self.full: Tensor | None = whole
        self.master = whole[bucket.owned]
        for member, part in zip(bucket.members, bucket.cut(whole), strict=True):
            part.copy_(member.detach())
        if bucket.comm.world_size > 1:
            bucket.comm.broadcast(whole, root=0)
        if bucket.stage == 3:
            self.master = self._new(self.master.numel(), bucket.master_dtype).copy_(self.master)
            self._let_go()
        elif self._mixed:
            self.master = self.master.clone()
            self.full = self._new(bucket.count, bucket.dtype, shared=bucket.stage > 0).copy_(whole)
        if self.full is not None:
            self._bind(self.full)
        self._like = self._like.new_empty(0)

    def _new(self, count: int, dtype: torch.dtype, shared: bool = True) -> Tensor:
        return new_flat(self.bucket.comm if shared else None, count, self._like, dtype)

    def _bind(self, full: Tensor) -> None:
        self._hold(self.bucket.cut(full))

    def _hold(self, views: list[Tensor]) -> None:
        self._views = views
        self._places = [_lies(view) for view in views]
        for member, part in zip(self.bucket.members, views, strict=True):
            member.data = part

    @torch.no_grad()
    def take_up(self) -> None:
        """Takes up the values of parameters that were given other memory.

        Raises InvalidArgument, which names the parameter, for another shape, dtype or device, and Error for one that
        was written to while ZeRO 3 had released it.
        """
        changed = [slot for slot, member in enumerate(self.bucket.members) if _lies(member) != self._places[slot]]
        for slot, member, part in ((slot, self.bucket.members[slot], self._views[slot]) for slot in changed):
            name = self.bucket.names[slot]
            if (member.shape, member.dtype, member.device) != (part.shape, part.dtype, part.device):
                raise InvalidArgument(
                    f"parameter '{name}' is {member.dtype} {list(member.shape)} on {member.device} now, expected "
                    f"{part.dtype} {list(part.shape)} on {part.device}: convert the model before it is wrapped"
                )
            if self.full is None:
                raise _while_released(name)
            part.copy_(member.detach().clone())  # it may be another view of the same memory
            member.data = part
        if self.full is None and not torch.stack(self._nans).isnan().all():
            written = next(slot for slot, nan in enumerate(self._nans) if not nan.isnan())
            raise _while_released(self.bucket.names[written])

    @torch.no_grad()
    def take_up_values(self) -> None:
        """Makes what was written to parameters the values that the optimizer goes on from: element by element, so that
        what was left alone keeps its float32 weight under mixed precision."""
        self.take_up()
        if self.full is None:
            return
        source = self.full[self.bucket.owned]
        if self._mixed:
            take_changes(source, self.master)
        elif source.data_ptr() != self.master.data_ptr():
            self.master.copy_(source)

    @torch.no_grad()
    def start_gather(self, into: Tensor | None = None) -> Pending | None:
        """Begins to fill `full` from what every rank owns; None where nothing has to be waited for.

        Args:
            into: memory for `full`, [count], of the bucket's dtype, where it was released.
        """
        bucket = self.bucket
        if into is not None:
            self.full = into
        assert self.full is not None
        source = self.full[bucket.owned]
        if source.data_ptr() != self.master.data_ptr():
            if self._mixed or bucket.stage == 0:
                source.copy_(self.master)
            else:
                source = self.master
        if into is not None:
            self._bind(into)
        if bucket.stage == 0 or self.comm.world_size == 1:
            if source is self.master:
                self.full[bucket.owned] = source
            return None
        pending: Pending = self.comm.all_gather(source, out=self.full, async_op=True)
        return pending

    def release(self) -> Tensor | None:
        """Takes the parameters off `full`, takes up what was written to it, and returns its memory. Until they are
        gathered again they keep their shape, hold NaN, and need no memory."""
        self.take_up_values()
        return self._let_go()

    def _let_go(self) -> Tensor | None:
        full, self.full = self.full, None
        if not self._nothing:
            nan = torch.full((), torch.nan, dtype=self.bucket.dtype, device=self.master.device)
            self._nans = [nan.clone() for _ in self.bucket.members]
            self._nothing = [
                nan.expand(member.shape) for nan, member in zip(self._nans, self.bucket.members, strict=True)
            ]
        self._hold(self._nothing)
        return full

    @torch.no_grad()
    def store(self) -> None:
        """Makes what `full` holds the values that the optimizer goes on from."""
        self.take_up()
        assert self.full is not None
        source = self.full[self.bucket.owned]
        if source.data_ptr() != self.master.data_ptr():
            self.master.copy_(source)

    def owned_parts(self, within: slice | None = None) -> list[tuple[int, slice, slice]]:
        """(member, place in the flattened parameter, place in `master`) of each parameter that this rank owns some
        of, or has some of `within`, a part of what it owns."""
        bucket, found = self.bucket, []
        edges = bucket.owned if within is None else within
        for slot, (offset, member) in enumerate(zip(bucket.offsets, bucket.members, strict=True)):
            start, stop = max(offset, edges.start), min(offset + member.numel(), edges.stop)
            if start < stop:
                base = bucket.owned.start
                found.append((slot, slice(start - offset, stop - offset), slice(start - base, stop - base)))
        return found


def _lies(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _while_released(name: str) -> Error:
    return Error(
        f"parameter '{name}' was written to while ZeRO 3 had released it, and its values lie on all ranks: change it "
        "inside of parallel.gathered(), on every rank"
    )


def gather_now(weights: list[Weights]) -> None:
    """Fills `full` of all of them, and returns when it is done."""
    works: list[Any] = [each.start_gather() for each in weights]
    for work in works:
        if work is not None:
            work.wait()
