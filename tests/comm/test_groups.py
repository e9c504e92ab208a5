"""Groups of ranks: split, exchange, several communicators at once, and life beside forks."""

from __future__ import annotations

import os
import threading
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch

import paracomm
from tests.comm.cases import run_over

transports = pytest.mark.parametrize("transport", ["local", "shm", "tcp", "mixed"])


def colors_and_keys(comm: Any) -> None:
    n, r = comm.world_size, comm.rank
    with comm.split(r % 2, key=-r) as half:
        members = [k for k in reversed(range(n)) if k % 2 == r % 2]
        assert half.world_size == len(members) and members[half.rank] == r
        assert half.all_gather(np.array([r])).ravel().tolist() == members
        assert [half.transport(k) == "self" for k in range(half.world_size)] == [k == r for k in members]
        with half.split(0) as again:  # nested
            assert again.all_reduce(np.ones(5000))[0] == len(members)
    few = comm.split(7 if r in (0, n - 1) else None)
    assert (few is None) == (r not in (0, n - 1))
    if few is not None:
        assert few.all_reduce(np.array([r]))[0] == n - 1
        few.close()
    assert comm.all_reduce(np.ones(3))[0] == n
    with comm.split(r) as alone:
        assert alone.world_size == 1 and alone.all_reduce(np.array([r]))[0] == r


def many_at_once(comm: Any) -> None:
    """A communicator a thread, with collectives of their own sizes; and the parent's."""
    n = comm.world_size
    groups = [comm.split(0, key=comm.rank * (-1) ** k) for k in range(3)]
    wrong: list[str] = []

    def work(k: int, group: Any) -> None:
        for step in range(30):
            x = np.full(100 * (k + 1) + 1000 * (step % 3), k + step)
            if not (group.all_reduce(x) == n * (k + step)).all():
                wrong.append(f"{k} {step}")

    threads = [threading.Thread(target=work, args=(k, group)) for k, group in enumerate([*groups, comm])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for group in groups:
        group.close()


def failing_group(comm: Any) -> None:
    """What happens to one group is no business of another's."""
    group = comm.split(0)
    with pytest.raises(paracomm.Error):
        if group.rank == 0:
            group.abort()
        group.barrier()
    assert comm.all_reduce(np.ones(3))[0] == comm.world_size


@transports
@pytest.mark.parametrize("check", [colors_and_keys, many_at_once, failing_group])
def test_groups(transport: str, check: Any) -> None:
    run_over(transport, 4, check)


def facts(comm: Any, transport: str) -> None:
    n, r = comm.world_size, comm.rank
    kinds = {comm.transport(peer) for peer in range(n) if peer != r}
    assert kinds == (
        {"shm", "tcp"} if transport == "mixed" and r < 2 else {"tcp" if transport == "mixed" else transport}
    )
    assert len(comm.hosts) == n
    hosts = {"tcp": [0, 1, 2], "mixed": [0, 0, 1]}.get(transport, [0, 0, 0])
    assert comm.host_indices == hosts
    assert comm.local_ranks == [k for k in range(n) if hosts[k] == hosts[r]]
    assert f"rank={r}, world_size={n}" in repr(comm)
    with pytest.raises(paracomm.InvalidArgument):
        comm.transport(n)
    before = sum(comm.bytes_sent(peer) for peer in range(n))
    comm.all_reduce(np.ones(3000, np.float32), algorithm="ring")
    sent = sum(comm.bytes_sent(peer) for peer in range(n)) - before
    assert comm.all_reduce(np.array([sent]))[0] == 2 * (n - 1) * 12000  # of all ranks together
    assert comm.seconds_waiting() >= 0


@transports
def test_facts(transport: str) -> None:
    run_over(transport, 3, facts, transport)


def child_of_a_fork(comm: Any) -> None:
    """As a data loader's worker does, while the communicator is busy."""
    arena = comm.empty(1000)
    arena[:] = 1
    work = comm.all_reduce(np.ones(100_000), async_op=True)

    def child(results: Any) -> None:
        found = []
        for call in (lambda: comm.all_reduce(np.ones(3)), comm.barrier, lambda: comm.send(np.ones(3), 1 - comm.rank)):
            try:
                call()
                found.append("")
            except paracomm.Error as error:
                found.append(str(error))
        comm.close()
        fresh = comm.empty(10)  # from an arena of its own
        fresh[:] = 5
        results.send((found, float(arena[0])))
        os._exit(0)

    ours, theirs = get_context("fork").Pipe()
    process = get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    assert (work.wait() == comm.world_size).all()
    found, inherited = ours.recv()
    process.join()
    assert process.exitcode == 0 and inherited == 1
    assert all("forked child cannot use it" in text for text in found), found
    assert (comm.all_reduce(arena) == comm.world_size).all()


def loader(comm: Any) -> None:
    dataset = torch.utils.data.TensorDataset(torch.arange(64.0))
    total = torch.zeros(())
    for (batch,) in torch.utils.data.DataLoader(dataset, batch_size=8, num_workers=2):
        total += comm.all_reduce(batch.clone()).sum()
    assert total == comm.world_size * 64 * 63 / 2


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("check", [child_of_a_fork, loader])
def test_forks(transport: str, check: Any) -> None:
    run_over(transport, 2, check)
