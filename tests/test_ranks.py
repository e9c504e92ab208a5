"""The harness itself: a harness that loses a failure would make every other test worthless."""

import os
import signal
import time
from pathlib import Path

import pytest
from ranks import Rank, RanksFailed, rank_outcomes, run_ranks

both = pytest.mark.parametrize("threads", [False, True], ids=["processes", "threads"])


@both
def test_results_and_exchange_in_rank_order(threads: bool) -> None:
    def function(rank: Rank, base: int) -> tuple[int, list[bytes], list[bytes]]:
        first = rank.exchange(f"a{rank.rank}".encode())
        return base + rank.rank, first, rank.exchange(f"b{rank.rank}".encode())

    results = run_ranks(3, function, 10, threads=threads)
    assert results == [(10 + r, [b"a0", b"a1", b"a2"], [b"b0", b"b1", b"b2"]) for r in range(3)]


@both
def test_a_failing_rank_is_reported_with_its_traceback(threads: bool) -> None:
    def function(rank: Rank) -> None:
        if rank.rank == 1:
            raise ValueError("seven is not a rank")

    with pytest.raises(RanksFailed, match=r"1 of 2 ranks failed[^$]*rank 1 raised[^$]*seven is not a rank"):
        run_ranks(2, function, threads=threads)


@both
def test_a_hanging_rank_is_named(threads: bool) -> None:
    def function(rank: Rank) -> None:
        if rank.rank == 0:
            time.sleep(3)

    with pytest.raises(RanksFailed, match=r"rank 0 had not ended after"):
        run_ranks(2, function, threads=threads, timeout_s=0.5)


def test_environment_is_that_of_torchrun() -> None:
    def function(rank: Rank) -> bool:
        return (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]) == (
            str(rank.rank),
            "2",
            "127.0.0.1",
        )

    assert run_ranks(2, function) == [True, True]
    assert "RANK" not in os.environ


def test_deaths_and_stops_are_outcomes() -> None:
    def function(rank: Rank) -> str:
        if rank.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return "alive"

    killed, stopped, alive = rank_outcomes(3, function, casualties=[0, 1], timeout_s=20)
    assert killed.exit_code == -signal.SIGKILL or not killed.ended
    assert not stopped.ended
    assert alive.value == "alive" and not alive.failure


def test_a_dead_rank_fails_the_run() -> None:
    def function(rank: Rank) -> None:
        if rank.rank == 1:
            os._exit(3)

    with pytest.raises(RanksFailed, match="rank 1 died of exit code 3"):
        run_ranks(2, function)


def test_no_process_outlives_its_rank() -> None:
    def function(rank: Rank) -> int:
        if pid := os.fork():
            return pid
        time.sleep(60)
        os._exit(0)

    (pid,) = run_ranks(1, function)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":  # nobody reaps it in a container without an init
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} still runs")


def test_a_skip_on_a_rank_skips_the_test() -> None:
    def function(rank: Rank) -> None:
        pytest.skip("rank says no")

    with pytest.raises(pytest.skip.Exception, match="rank says no"):
        run_ranks(2, function)
