"""send and recv: whatever is posted moves, in order, and blocks nobody."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from paracomm import InvalidArgument, Mismatch, PeerLost
from tests.comm.cases import run_over

transports = pytest.mark.parametrize("transport", ["local", "shm", "tcp"])


def both_send_first(comm: Any) -> None:
    peer = 1 - comm.rank
    for count in (0, 1, 9, 1000, 3_000_000):
        mine, theirs = np.full(count, comm.rank, np.int32), np.empty(count, np.int32)
        send = comm.send(mine, peer, async_op=True)
        comm.recv(theirs, peer)
        send.wait()
        assert (theirs == peer).all()


def many_small(comm: Any) -> None:
    """More than any queue holds, of lengths that do and do not fit into a queue's own lines."""
    peer = 1 - comm.rank
    for count in (1, 3, 10, 100):
        sends = [comm.send(np.full(count, k), peer, async_op=True) for k in range(500)]
        x = np.empty(count, np.int64)
        for k in range(500):
            comm.recv(x, peer)
            assert (x == k).all()
        for work in sends:
            work.wait()


def beside_one_who_does_not_listen(comm: Any, count: int, times: int) -> None:
    """What rank 2 does not take yet must not hold up what goes to rank 1."""
    x = np.empty(count)
    if comm.rank == 0:
        waiting = [comm.send(np.full(count, float(k)), 2, async_op=True) for k in range(times)]
        for k in range(times):
            comm.send(np.full(count, float(k)), 1)
        for work in waiting:
            work.wait()
        return
    if comm.rank == 2:
        comm.recv(x, 1)
    for k in range(times):
        comm.recv(x, 0)
        assert (x == k).all()
    if comm.rank == 1:
        comm.send(x, 2)


def beside_collectives(comm: Any) -> None:
    right, left = (comm.rank + 1) % comm.world_size, (comm.rank - 1) % comm.world_size
    for step in range(20):
        theirs = torch.empty(5000)
        work = comm.recv(theirs, left, async_op=True)
        reduced = comm.all_reduce(torch.ones(5000), async_op=True)
        comm.send(torch.full((5000,), float(step + comm.rank)), right)
        assert (work.wait() == step + left).all()
        assert (reduced.wait() == comm.world_size).all()


def arena_and_strides(comm: Any) -> None:
    peer = 1 - comm.rank
    mine = comm.empty((300, 400), np.float64)
    mine[...] = comm.rank
    theirs = np.full((400, 600), -1.0)
    work = comm.recv(theirs[:, ::2], peer, async_op=True)
    comm.send(mine.T, peer)
    work.wait()
    assert (theirs[:, ::2] == peer).all() and (theirs[:, 1::2] == -1).all()


def refused(comm: Any) -> None:
    for peer, name in ((comm.rank, comm.rank), (comm.world_size, comm.world_size), (-1, -1)):
        with pytest.raises(InvalidArgument, match=f"send to rank {name} on rank {comm.rank} of {comm.world_size}"):
            comm.send(np.ones(3), peer)
        with pytest.raises(InvalidArgument, match=f"recv from rank {name}"):
            comm.recv(np.ones(3), peer)
    locked = np.ones(3)
    locked.flags.writeable = False
    with pytest.raises(InvalidArgument, match="read-only"):
        comm.recv(locked, 1 - comm.rank)


def tags(comm: Any) -> None:
    """A receive takes the next message of its tag, whatever the order of the tags and however long the others are."""
    lengths = {0: 3, 5: 400_000, -1: 0, 7: 30}
    peer = 1 - comm.rank
    sends = [
        comm.send(np.full(count, 10.0 * tag + turn), peer, tag=tag, async_op=True)
        for turn in range(2)
        for tag, count in lengths.items()
    ]
    for tag, count in reversed(lengths.items()):
        for turn in range(2):
            x = np.empty(count)
            comm.recv(x, peer, tag=tag)
            assert (x == 10 * tag + turn).all()
    for work in sends:
        work.wait()


def from_any(comm: Any) -> None:
    """Rank 0 hears everyone, once each, and is told whom; tags and receives from a certain rank are kept apart."""
    if comm.rank > 0:
        comm.send(np.array([-float(comm.rank)]), 0, tag=9)
        comm.send(np.array([float(comm.rank)]), 0, tag=4)
        return
    others = list(range(1, comm.world_size))
    heard = []
    for _ in others:
        x = np.zeros(1)
        work = comm.recv(x, None, tag=4, async_op=True)
        work.wait()
        assert x[0] == work.source
        heard.append(work.source)
    assert sorted(heard) == others
    for rank in others:
        x = np.zeros(1)
        comm.recv(x, rank, tag=9)
        assert x[0] == -rank


def nobody_is_left(comm: Any) -> None:
    if comm.rank == 0:
        with pytest.raises(PeerLost, match=r"recv from any rank, and all of them have closed|closed|left"):
            comm.recv(np.zeros(1), None)
    comm.close()


def unequal_aside(comm: Any) -> None:
    """The same for a message that came before its receive was posted."""
    with pytest.raises(Mismatch, match="dtype"):
        if comm.rank == 0:
            comm.send(np.ones(3), 1, tag=1)
            comm.send(np.ones(3), 1, tag=2)
            comm.recv(np.ones(3), 1)
        else:
            comm.recv(np.ones(3), 0, tag=2)
            comm.recv(np.ones(3, np.float32), 0, tag=1)
            comm.recv(np.ones(3), 0)


def unequal(comm: Any) -> None:
    with pytest.raises(Mismatch, match="count"):
        if comm.rank == 0:
            comm.send(np.ones(3), 1)
            comm.recv(np.ones(3), 1)
        else:
            comm.recv(np.ones(4), 0)


@transports
@pytest.mark.parametrize("check", [both_send_first, many_small, arena_and_strides, refused, tags, unequal])
def test_two(transport: str, check: Any) -> None:
    run_over(transport, 2, check)


@transports
@pytest.mark.parametrize(("count", "times"), [(100, 300), (100_000, 10)])
def test_one_who_does_not_listen(transport: str, count: int, times: int) -> None:
    run_over(transport, 3, beside_one_who_does_not_listen, count, times)


@transports
@pytest.mark.parametrize("check", [from_any, nobody_is_left])
def test_any_source(transport: str, check: Any) -> None:
    run_over(transport, 3, check)


@transports
def test_unequal_aside(transport: str) -> None:
    run_over(transport, 2, unequal_aside)


@transports
def test_beside_collectives(transport: str) -> None:
    run_over(transport, 3, beside_collectives)
