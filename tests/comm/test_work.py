"""Asynchronous operations: order, waiting, errors."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest

from paracomm import Timeout
from tests.comm.cases import run_over


def several_in_flight(comm: Any) -> None:
    n = comm.world_size
    works = [comm.all_reduce(np.full(1000 * k, k), async_op=True) for k in range(20)]
    for k, work in reversed(list(enumerate(works))):
        assert (work.wait() == n * k).all()
        assert work.done() and work.exception() is None
        assert work.wait() is work.wait()


def in_order_with_others(comm: Any) -> None:
    """A call without async_op runs after what is queued."""
    n, x = comm.world_size, np.ones(50_000)
    first = comm.all_reduce(x, async_op=True)
    comm.all_reduce(x)
    assert (x == n * n).all() and first.done()
    out = np.empty(50_000)
    works = [
        comm.all_reduce(x, "max", async_op=True),
        comm.reduce(x, 0, out=out, async_op=True),
        comm.barrier(async_op=True),
    ]
    comm.broadcast(x, 0)
    assert all(work.done() for work in works)
    if comm.rank == 0:
        assert (out == n * n * n).all()


def nobody_waits(comm: Any) -> None:
    """The progress thread runs it."""
    x = np.ones(10_000)
    work = comm.all_reduce(x, async_op=True)
    finished = threading.Event()
    while not work.done():
        finished.wait(0.001)
    assert (x == comm.world_size).all()
    assert work.test()


def waited_for_by_other_threads(comm: Any) -> None:
    works = [comm.all_reduce(np.full(3000, k), async_op=True) for k in range(24)]
    wrong: list[int] = []

    def wait(some: list[int]) -> None:
        wrong.extend(k for k in some if not (works[k].wait() == comm.world_size * k).all())

    # Every work is waited for twice.
    threads = [threading.Thread(target=wait, args=(list(range(24))[:: 1 if i % 2 else -1],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def failed(comm: Any) -> None:
    """Every wait raises what the operation failed with, and so does whatever comes after it."""
    x = np.ones(3)
    if comm.rank > 0:
        with pytest.raises(Timeout):
            comm.recv(x, 0)  # nothing comes, but the news of rank 0's failure
        return
    works = [comm.all_reduce(x, timeout_s=0.2, async_op=True), comm.barrier(async_op=True)]
    assert not works[0].done() and works[0].exception() is None
    for work in works * 2:
        with pytest.raises(Timeout):
            work.wait()
        assert isinstance(work.exception(), Timeout) and work.done()
    for call in (lambda: comm.barrier(async_op=True), comm.barrier, lambda: comm.send(x, 1)):
        with pytest.raises(Timeout):
            call()


def dropped(comm: Any) -> None:
    """A Work that nobody keeps: the memory lives until the operation is complete, and not longer than it is needed."""
    peer, before = (comm.rank + 1) % comm.world_size, (comm.rank - 1) % comm.world_size
    watched = []
    for turn in range(40):
        if comm.rank == 0:
            time.sleep(0.001)  # the others have dropped theirs by then
        arrays = [np.full(20_000, 1.0) for _ in range(3)]
        watched += [weakref.ref(array) for array in arrays]
        comm.all_reduce(arrays[0], async_op=True)
        comm.recv(arrays[1], before, async_op=True)
        comm.send(arrays[2], peer, async_op=True)
        del arrays
        others = [np.full(20_000, -1.0) for _ in range(3)]  # what freed memory would be given to
        comm.all_reduce(np.zeros(1))
        assert all((other == -1).all() for other in others), turn
    work = comm.all_reduce(array := np.ones(20_000), async_op=True)
    watched.append(weakref.ref(array))
    work.wait()
    comm.barrier()
    del work, array
    assert watched[-1]() is None
    assert sum(ref() is not None for ref in watched) < len(watched) / 2


@pytest.mark.parametrize("transport", ["local", "shm", "tcp"])
@pytest.mark.parametrize(
    "check", [several_in_flight, in_order_with_others, nobody_waits, waited_for_by_other_threads, failed, dropped]
)
def test_work(transport: str, check: Any) -> None:
    run_over(transport, 3, check)
