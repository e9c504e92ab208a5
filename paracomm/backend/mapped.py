"""DDP's buckets, moved into memory that the local peers have mapped, so that an all_reduce of one copies nothing.

DistributedDataParallel allocates its buckets in C++, by torch's allocator, and asks for the same ones every step. One
that came by `SIGHTINGS` times is moved: its contents go to the arena, and its storage points there from now on. Every
view of it, the gradients of `gradient_as_bucket_view` among them, shares that storage and sees the same values as
before. When torch frees the storage, the arena's pages go too.

torch has no call for that short of linking against it, which would bind a wheel to one torch. A storage is known by its
layout instead: a c10::StorageImpl begins with the data pointer and, after it, the context that its deleter is given,
and where torch's own CPU allocator made the block, both are its address. Only the first is changed, so that the block
itself is freed as ever. A bucket stays where it is, and works as before, if its storage does not look like that, if
torch does not read the new address back, or if the arena is full.

Like all memory of the arena, moved buckets are shared with a forked child: one that runs backward itself under the
parent's DDP would write to the parent's gradients.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch

from paracomm.comm import Communicator
from paracomm.errors import Error

SIGHTINGS = 3
"""DDP regroups its buckets after the first step; a moved one has outlived that."""
LEAST_BYTES = 1 << 18
"""Smaller ones stay in the cache as they are staged: the copy costs nothing that can be measured."""
_WORDS = 8
"""Of a StorageImpl: a table of functions, reference counts, the pointer, a deleter and its context, and the size."""


class BucketMapper:
    """Moves what is reduced again and again; `notice` is told of each all_reduce that DDP asks for."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._seen: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self.enabled = len(comm.local_ranks) > 1

    def notice(self, tensor: torch.Tensor) -> None:
        """Counts, and moves the whole storage of a contiguous CPU tensor at its third sighting."""
        if (
            not self.enabled
            or tensor.device.type != "cpu"
            or tensor.layout is not torch.strided
            or tensor.nbytes < LEAST_BYTES
        ):
            return
        storage = tensor.untyped_storage()
        seen = self._seen.get(storage, 0) + 1
        self._seen[storage] = seen
        if seen == SIGHTINGS and not move(tensor, self._comm):
            self.enabled = False


def move(tensor: torch.Tensor, comm: Communicator) -> bool:
    """Moves the storage of `tensor` into the arena, in place; False where it has to stay."""
    storage = tensor.untyped_storage()
    old, nbytes = storage.data_ptr(), storage.nbytes()
    words = (ctypes.c_size_t * _WORDS).from_address(storage._cdata)
    found = [i for i, word in enumerate(words) if word == old]
    if len(found) != 2:
        return False
    try:
        pages = comm.empty(nbytes, torch.uint8)
    except Error:
        return False
    ctypes.memmove(pages.data_ptr(), old, nbytes)
    words[found[0]] = pages.data_ptr()
    if storage.data_ptr() != pages.data_ptr() or tensor.untyped_storage().data_ptr() != pages.data_ptr():
        words[found[0]] = old
        return False
    # The storage's Python object lives as long as the storage does, whoever holds it.
    weakref.finalize(storage, _let_go, pages).atexit = False
    return True


def _let_go(pages: Any) -> None:
    """The last reference to the arena's pages ends here."""
