"""Timeouts, aborts and ranks that leave or die: the right error on every rank that is left."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import numpy as np
import pytest

import paracomm
from paracomm import _C, InvalidArgument, PeerLost, Timeout
from paracomm.errors import Error
from tests.comm.cases import connect, run_over
from tests.ranks import Rank, rank_outcomes, run_ranks

transports = pytest.mark.parametrize("transport", ["local", "shm", "tcp", "mixed"])


def caught(call: Any) -> tuple[str, str]:
    try:
        call()
    except Error as error:
        return type(error).__name__, str(error)
    return "none", ""


def one_stays_away(rank: Rank, transport: str, call: str) -> tuple[str, str]:
    with connect(rank, transport, timeout_s=0.3) as comm:
        x = np.ones(100_000)
        found = "none", ""
        if rank.rank == 1:
            rank.exchange(b"")
            found = caught(lambda: comm.recv(x, 0, timeout_s=20))  # nothing comes, but the news of the others' failure
        else:
            calls = {
                "all_reduce": lambda: comm.all_reduce(x),
                "timeout of the call": lambda: comm.all_reduce(x, timeout_s=0.2),
                "asynchronous": lambda: comm.all_reduce(x, async_op=True).wait(),
                "wait": lambda: comm.all_reduce(x, timeout_s=100, async_op=True).wait(0.2),
                "recv": lambda: comm.recv(x, 1),
            }
            found = caught(calls[call])
            rank.exchange(b"")
        rank.exchange(b"")
        return found


LONG = "\N{GRINNING FACE}" * 3000  # 4 bytes each: more than travels


def gives_up_in_many_words(comm: Any, why: str) -> tuple[str, str]:
    if comm.rank == 0:
        comm.abort(why)
    return caught(lambda: comm.recv(np.ones(1), 1 - comm.rank, timeout_s=20))


@pytest.mark.parametrize("transport", ["local", "shm", "tcp"])
@pytest.mark.parametrize("start", ["", "x", "xx", "xxx", "\udcff"])
def test_a_text_is_cut_between_characters(transport: str, start: str) -> None:
    ours, theirs = run_over(transport, 2, gives_up_in_many_words, start + LONG)
    written = start.replace("\udcff", "\\udcff")
    for kind, text in (ours, theirs):
        assert kind == "Error" and f"rank 0: {written}{LONG[:900]}" in text and "\ufffd" not in text


def renamed(rank: Rank) -> tuple[list[str], str]:
    """A peer's host has a name that is no UTF-8, as sethostname() takes any bytes."""
    own = os.uname().nodename.encode()

    def exchange(blob: bytes) -> list[bytes]:
        return [
            each if peer == rank.rank else each.replace(own, b"\xff" * len(own), 1)
            for peer, each in enumerate(rank.exchange(blob))
        ]

    with paracomm.connect(rank.rank, 2, exchange, host_id="a") as comm:
        text = "" if rank.rank == 0 else caught(lambda: comm.recv(np.ones(1), 0, timeout_s=0.2))[1]
        return comm.hosts, text


def test_host_names_of_any_bytes() -> None:
    (hosts, _), (_, text) = run_ranks(2, renamed)
    assert hosts[1] == "\ufffd" * len(os.uname().nodename.encode())
    assert "recv from rank 0 (\ufffd" in text


@transports
@pytest.mark.parametrize("call", ["all_reduce", "timeout of the call", "asynchronous", "wait", "recv"])
def test_timeout(transport: str, call: str) -> None:
    found = run_ranks(3, one_stays_away, transport, call, threads=transport == "local")
    assert [kind for kind, _ in found] == ["Timeout"] * 3, found
    assert issubclass(Timeout, TimeoutError)
    assert any("timed out after 0." in text or "was not complete 0.2" in text for _, text in found), found
    if call == "all_reduce":
        assert any("all_reduce[" in text and "#1 rank" in text and ": recv from rank " in text for _, text in found), (
            found
        )


def aborted(comm: Any) -> tuple[str, str]:
    if comm.rank == 1:
        comm.abort("enough")
        return caught(comm.barrier)
    # If rank 1 was faster, even a submission raises.
    found = [caught(lambda: comm.all_reduce(np.ones(10), async_op=True).wait()) for _ in range(3)]
    found.append(caught(lambda: comm.recv(np.ones(3), 1, async_op=True).wait()))
    assert len({kind for kind, _ in found}) == 1
    return found[0]


@transports
def test_abort_frees_everybody(transport: str) -> None:
    found = run_over(transport, 3, aborted)
    assert [kind for kind, _ in found] == ["Error"] * 3
    assert all("rank 1: enough" in text for _, text in found), found


def abort_from_a_thread(comm: Any) -> tuple[str, str]:
    """Waiters of this very rank are freed as well."""
    if comm.rank == 1:
        return caught(lambda: comm.recv(np.ones(1), 0))
    timer = threading.Timer(0.2, comm.abort)
    timer.start()
    found = caught(comm.barrier)
    timer.join()
    return found


@transports
def test_abort_from_another_thread(transport: str) -> None:
    found = run_over(transport, 2, abort_from_a_thread)
    assert [kind for kind, _ in found] == ["Error"] * 2, found
    assert all("abort() was called" in text for _, text in found), found


def leaves(rank: Rank, transport: str, call: str) -> tuple[str, str]:
    comm = connect(rank, transport)
    comm.barrier()
    rank.exchange(b"")
    if rank.rank == 1:
        comm.close()
        comm.close()
        found = caught(comm.barrier)
    else:
        found = caught(lambda: comm.recv(np.ones(3), 1) if call == "recv" else comm.all_reduce(np.ones(100_000)))
    rank.exchange(b"")
    comm.close()
    return found


@transports
@pytest.mark.parametrize("call", ["recv", "all_reduce"])
def test_a_rank_that_left(transport: str, call: str) -> None:
    found = run_ranks(3, leaves, transport, call, threads=transport == "local")
    assert [kind for kind, _ in found] == ["PeerLost", "Error", "PeerLost"], found
    assert "is closed" in found[1][1]
    assert any("rank 1" in text and "closed its communicator" in text for _, text in found), found


def finishes_first(comm: Any) -> None:
    """Leaving after one's last part is no fault, though others still take their messages."""
    x = np.full(2_000_000, comm.rank)
    comm.broadcast(x, 0)
    assert (x == 0).all()


@transports
def test_leaving_early_is_no_fault(transport: str) -> None:
    run_over(transport, 3, finishes_first)


def dies(rank: Rank, transport: str) -> tuple[str, str]:
    comm = connect(rank, transport)
    comm.barrier()
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    found = caught(lambda: [comm.all_reduce(np.ones(100_000)) for _ in range(1000)])
    assert found == caught(comm.barrier) or found[0] == caught(comm.barrier)[0]
    comm.close()
    return found


@pytest.mark.parametrize("transport", ["shm", "tcp", "mixed"])
def test_a_rank_that_died(transport: str) -> None:
    outcomes = rank_outcomes(3, dies, transport)
    assert [outcome.exit_code for outcome in outcomes] == [0, -signal.SIGKILL, 0]
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.value is not None, outcome.failure
        kind, text = outcome.value
        assert kind == PeerLost.__name__ and "rank 1" in text, text


def test_arguments_of_connect() -> None:
    def check(rank: Rank) -> None:
        with pytest.raises(InvalidArgument, match="transport must be"):
            rank.connect(transport="pigeon")
        with pytest.raises(InvalidArgument, match="rank must be in"):
            Rank(3, 2, rank.exchange).connect()

    run_ranks(1, check)


def test_ranks_that_do_not_come() -> None:
    """connect() does not wait for ever, and names who is missing."""

    def check(rank: Rank) -> tuple[str, str]:
        if rank.rank == 1:
            rank.exchange(_C.Listener().publish())
            rank.exchange(b"")
            rank.exchange(b"")
            return "none", ""
        found = caught(lambda: rank.connect(connect_timeout_s=0.5))
        rank.exchange(b"")
        return found

    kind, text = run_ranks(2, check)[0]
    assert kind == "Timeout" and "rank 1" in text, (kind, text)
