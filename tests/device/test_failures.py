"""Ranks that die, stall, leave, or call something else: a named error on all others, soon; and devices that are not
there."""

from __future__ import annotations

import itertools
import os
import signal
import time
from typing import Any

import numpy as np
import pytest
import torch

from paracomm import InvalidArgument, Mismatch, PeerLost, Timeout
from tests.comm.test_failures import caught
from tests.comm.test_mismatch import MISMATCHES, PATIENCE_S, provoke
from tests.device.emulation import emulate, run_emulated
from tests.ranks import Rank, rank_outcomes, run_ranks

SOON_S = 5.0
"""For a machine that is busy: a tenth of it is the rule."""


def all_reduce_until_it_fails(comm: Any, count: int = 50_000) -> tuple[str, str]:
    start = time.monotonic()
    found = caught(lambda: [comm.all_reduce(torch.ones(count)) for _ in range(1000)])
    assert time.monotonic() - start < SOON_S, found
    assert caught(comm.barrier)[0] == found[0] == caught(comm.check)[0]
    return found


def dies_or_stalls(rank: Rank, how: int) -> tuple[str, str]:
    emulate()
    comm = rank.connect(timeout_s=1.0)
    comm.all_reduce(torch.ones(1000))
    rank.exchange(b"")
    if rank.rank == 1:
        os.kill(os.getpid(), how)
    found = all_reduce_until_it_fails(comm)
    comm.close()
    return found


@pytest.mark.parametrize(("how", "error"), [(signal.SIGKILL, PeerLost), (signal.SIGSTOP, Timeout)])
def test_a_rank_that_dies_or_stalls(how: signal.Signals, error: type) -> None:
    outcomes = rank_outcomes(4, dies_or_stalls, how, casualties=(1,), timeout_s=60)
    found = [outcome.value for outcome in outcomes if outcome.rank != 1]
    assert all(value and value[0] == error.__name__ for value in found), [o.failure or o.value for o in outcomes]
    assert all("rank 1 (" in text for _, text in found), found
    if error is Timeout:
        assert any("all_reduce[ordered] #" in text and "timed out after 1 s" in text for _, text in found), found


def stays_away(comm: Any, call: str) -> tuple[str, str]:
    x = np.ones(10_000)
    if comm.rank == 1:
        return caught(lambda: comm.recv(x, 0, timeout_s=20))  # nothing comes, but the news of the others' failure
    calls = {
        "communicator": lambda: comm.all_reduce(x),
        "call": lambda: comm.all_reduce(x, timeout_s=0.3),
        "wait": lambda: comm.all_reduce(x, timeout_s=100, async_op=True).wait(0.3),
    }
    return caught(calls[call])


@pytest.mark.parametrize("call", ["communicator", "call", "wait"])
def test_timeouts(call: str) -> None:
    found = run_emulated(3, _with_device, stays_away, call, timeout_s=0.5)
    assert [kind for kind, _ in found] == ["Timeout"] * 3, found
    assert any("timed out after 0." in text or "was not complete 0.3" in text for _, text in found), found


def _with_device(comm: Any, function: Any, *args: Any) -> Any:
    comm.use_device()
    return function(comm, *args)


def provoke_emulated(rank: Rank) -> dict[str, tuple[str, str]]:
    emulate()
    return provoke(rank, "shm")


def test_mismatches() -> None:
    found = run_ranks(3, provoke_emulated, timeout_s=2 * PATIENCE_S)
    wrong = [
        f"rank {r}: {name}: {got}" for r, of in enumerate(found) for name, got in of.items() if got[0] != "Mismatch"
    ]
    assert not wrong, "\n".join(wrong)
    for name, (_, _, words) in MISMATCHES.items():
        texts = [of_rank[name][1] for of_rank in found]
        assert any(all(word in text for word in words) for text in texts), f"{name}: {texts}"


def one_on_the_host(comm: Any) -> tuple[str, str]:
    comm.all_reduce(torch.ones(5))
    comm._emulates = comm.rank != 2
    return caught(lambda: [comm.all_reduce(torch.ones(100), algorithm="ring") for _ in range(2)])


def test_one_rank_on_the_host() -> None:
    found = run_emulated(3, one_on_the_host)
    assert [kind for kind, _ in found] == [Mismatch.__name__] * 3, found
    assert any("device" in text and "host" in text for _, text in found), found


def leaves(comm: Any) -> tuple[str, str]:
    comm.all_reduce(torch.ones(5))
    if comm.rank == 1:
        comm.close()
        return caught(lambda: comm.all_reduce(torch.ones(5)))
    return all_reduce_until_it_fails(comm)


def test_a_rank_that_leaves() -> None:
    found = run_emulated(3, leaves)
    assert [kind for kind, _ in found] == ["PeerLost", "Error", "PeerLost"], found
    assert "is closed" in found[1][1]
    assert all("rank 1" in text and "closed its communicator" in text for _, text in (found[0], found[2])), found


def aborts(comm: Any) -> tuple[str, str]:
    comm.use_device()
    if comm.rank == 1:
        time.sleep(0.2)
        comm.abort("enough")
    return caught(lambda: comm.all_reduce(torch.ones(5)))


def test_abort() -> None:
    found = run_emulated(3, aborts)
    assert [kind for kind, _ in found] == ["Error"] * 3, found
    assert all("enough" in text for _, text in found), found


def no_gpu(rank: Rank) -> list[str]:
    """A machine without GPUs (or a build without CUDA) says so on every rank, and goes on."""
    with rank.connect(timeout_s=30) as comm:
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        texts = [caught(comm.use_device) for _ in range(2)]
        assert [kind for kind, _ in texts] == [InvalidArgument.__name__] * 2
        assert comm.device is None and comm.all_reduce(torch.ones(3))[0] == comm.world_size
        return [text for _, text in texts]


def test_no_gpu() -> None:
    for text in itertools.chain(*run_ranks(2, no_gpu)):
        assert "rank 0 (" in text and "can use no GPU here: " in text
        assert "paracomm doctor" in text and "PARACOMM_DEVICE=host" in text


def one_without_devices(rank: Rank) -> tuple[str, str]:
    emulate()
    os.environ["PARACOMM_EMULATED_DEVICES"] = "0" if rank.rank == 1 else "8"
    with rank.connect(timeout_s=30) as comm:
        found = caught(lambda: comm.all_reduce(torch.ones(3)))
        assert comm.exchange(b"alive") == [b"alive"] * comm.world_size
        return found


def test_one_rank_without_devices() -> None:
    found = run_ranks(3, one_without_devices)
    assert len(set(found)) == 1 and found[0][0] == InvalidArgument.__name__, found
    assert "rank 1 (" in found[0][1] and "there is no emulated device 0" in found[0][1], found


def test_unknown_modes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARACOMM_DEVICE", "gpu")
    asked: list[bytes] = []
    with pytest.raises(InvalidArgument, match="PARACOMM_DEVICE is 'gpu', expected 'emulated' or 'host'"):
        Rank(0, 2, lambda blob: asked.append(blob) or [blob] * 2).connect()
    assert not asked  # nobody waits for this rank
