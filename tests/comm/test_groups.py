"""Groups of ranks: split, exchange, several communicators at once, and life beside forks."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import threading
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import paracomm
from paracomm.comm.agreement import outcomes, read_for_all
from paracomm.schedule import tune
from tests.comm.cases import connect, run_over
from tests.ranks import Rank, run_ranks

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


def open_descriptors() -> list[int]:
    def is_open(number: int) -> bool:
        with contextlib.suppress(OSError):
            return bool(os.fstat(number))
        return False  # that of this very list

    return sorted(number for number in map(int, os.listdir("/proc/self/fd")) if is_open(number))


def comes_and_goes(rank: Rank, transport: str) -> list[int]:
    """Descriptors before, and after each communicator that was closed while somebody still holds it."""
    kept: list[Any] = []
    counts: list[int] = []
    for _ in range(3):
        comm = connect(rank, transport)
        group = comm.split(0)
        work = group.all_reduce(np.ones(100_000), async_op=True)
        (comm.send if rank.rank == 0 else comm.recv)(np.ones(1000), 1 - rank.rank)
        assert work.wait()[0] == 2
        rank.exchange(b"")
        group.close()
        comm.close()
        kept += [comm, group, work]
        for counts_now in range(2):  # threads share a table
            rank.exchange(b"")
            if counts_now == rank.rank:
                counts.append(len(open_descriptors()))
        rank.exchange(b"")
    for comm in kept[::3]:
        with pytest.raises(paracomm.Error, match="closed"):
            comm.barrier()
        assert comm.bytes_sent(1 - rank.rank) >= 0 and comm.transport(1 - rank.rank)
        comm.abort()
    return counts


@transports
def test_a_closed_communicator_keeps_no_descriptor(transport: str) -> None:
    run = run_ranks if transport != "local" else lambda n, *rest: run_ranks(n, *rest, threads=True)
    for first, *later in run(2, comes_and_goes, transport):
        assert later == [first, first]  # the first one made what is the process's own


def with_room_for(rank: Rank, room: int) -> str:
    """A connect() in which rank 1 may open `room` more descriptors; whoever gives up early lets the other go on."""
    rounds = 0

    def exchange(blob: bytes) -> list[bytes]:
        nonlocal rounds
        rounds += 1
        return rank.exchange(blob)

    rank.exchange(b"")
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    if rank.rank == 1:
        free = (number for number in itertools.count() if number not in open_descriptors())
        resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(free, room, None)), usual[1]))
    found = ""
    try:
        paracomm.connect(rank.rank, 2, exchange, connect_timeout_s=2).close()
    except paracomm.Error as error:
        found = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_NOFILE, usual)
    for _ in range(rounds, 2):
        rank.exchange(b"")
    return found


def with_ever_more_room(rank: Rank) -> list[str]:
    rank.connect().close()
    return [with_room_for(rank, room) for room in range(8)]


def test_the_limit_of_descriptors_is_named() -> None:
    ours, theirs = run_ranks(2, with_ever_more_room)
    enough = theirs.index("")
    assert ours[-1] == theirs[-1] == "" and enough > 2 and not any(theirs[enough:])
    assert all(text.startswith("Error: ") and "(ulimit -n)" in text for text in theirs[:enough]), theirs
    assert all(ours[:enough]) and not any("SecurityError" in text for text in ours), ours


def only_rank_0_reads(comm: Any, folder: str, kind: str) -> list[str]:
    """A tuning table that cannot be used, and a job of rank 0 that fails otherwise."""
    os.environ["XDG_CACHE_HOME"] = folder
    path = tune.cache_path(comm.hosts[0], comm.host_indices)
    if comm.rank == 0:
        path.parent.mkdir(parents=True)
        if kind == "a folder":
            path.mkdir()
        else:
            path.write_bytes({"binary": b"\x80\xff", "nothing": b"{}", "deep": b"[" * 100_000}[kind])
    found = []
    for call in (
        comm.use_cached_table,
        lambda: outcomes(comm.exchange, lambda: 1 // (1 - comm.rank)),
        lambda: read_for_all(comm.rank, comm.exchange, lambda: b"is no JSON"),
        lambda: read_for_all(comm.rank, comm.exchange, comm.check if comm.rank else lambda: comm.transport(99)),
    ):
        with pytest.raises(paracomm.Error) as caught:
            call()
        found.append(f"{type(caught.value).__name__}: {caught.value}")
    assert outcomes(comm.exchange, lambda: (comm.rank, "x")) == [[rank, "x"] for rank in range(comm.world_size)]
    assert read_for_all(comm.rank, comm.exchange, lambda: {"a": None}) == {"a": None}
    assert comm.all_reduce(np.ones(3))[0] == comm.world_size
    return found


@pytest.mark.parametrize("kind", ["binary", "nothing", "deep", "a folder"])
def test_what_one_rank_reads_ends_the_same_way_on_all(kind: str, tmp_path: Path) -> None:
    first, *others = run_over("shm", 3, only_rank_0_reads, str(tmp_path), kind)
    assert all(other == first for other in others)
    cache, division, encoding, typed = first
    assert cache.startswith("InvalidArgument: rank 0: ") and "is no tuning table" in cache
    assert division.startswith("Error: rank 1: ZeroDivisionError") and encoding.startswith("Error: rank 0: TypeError")
    assert typed.startswith("InvalidArgument: rank 0: ")


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
