"""Odd calls: every method x every argument x a list of odd values ends right, or in a named error that is the same on
all ranks and is raised before anything is sent; nothing dies, nothing hangs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paracomm import InvalidArgument
from tests.comm import odd_backend, odd_communicator
from tests.comm.odd_calls import BackendSeat, Case, Prepared, Report, Seat, one_by_one, run_cases

Cases = Callable[[], Iterator[Case]]
# Of how many cases one is run (`-m exhaustive` runs all): strides without a common divisor with the lists' lengths.
GROUPS: dict[str, tuple[type[Seat], Cases, int, int]] = {
    "arrays": (Seat, odd_communicator.collectives, 19, 370),
    "messages": (Seat, odd_communicator.messages, 3, 130),
    "one rank": (Seat, odd_communicator.on_one_rank, 11, 18),
    "overlap": (Seat, odd_communicator.overlapping, 5, 90),
    "rows": (Seat, odd_communicator.rows, 3, 100),
    "times": (Seat, odd_communicator.timeouts, 3, 140),
    "scalars": (Seat, odd_communicator.scalars, 7, 280),
    "others": (Seat, odd_communicator.others, 3, 200),
    "connect": (Seat, odd_communicator.connections, 5, 70),
    "core": (Seat, odd_communicator.private, 1, 400),
    "tensors": (BackendSeat, odd_backend.tensors, 19, 350),
    "lists": (BackendSeat, odd_backend.lists, 5, 70),
    "options": (BackendSeat, odd_backend.options, 5, 190),
    "groups": (BackendSeat, odd_backend.groups_and_objects, 5, 60),
}  # fmt: skip


def run_group(name: str, every: int, folder: Path) -> Report:
    seat, cases, _, least = GROUPS[name]
    chosen = one_by_one(cases())[::every]
    report = run_cases(chosen, seat, folder / "ranks")
    print(report)
    assert report.calls == len(chosen) >= least * GROUPS[name][2] // every
    assert report.right > 0 or name == "core"
    return report


@pytest.mark.parametrize("name", GROUPS)
def test_odd_calls(name: str, tmp_path: Path) -> None:
    report = run_group(name, GROUPS[name][2], tmp_path)
    assert not report.failures, str(report)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", GROUPS)
def test_all_odd_calls(name: str, tmp_path: Path) -> None:
    report = run_group(name, 1, tmp_path)
    assert not report.failures, str(report)


def test_enough_of_them() -> None:
    assert sum(least for _, _, _, least in GROUPS.values()) >= 2400


# --- what the run must notice ---
def case(name: str, call: Callable[[Seat], Any], check: Callable[[Any], str] = lambda found: "", **more: Any) -> Case:
    return Case(name, lambda seat: Prepared(lambda: call(seat), check), **more)


def wrong_value(seat: Seat) -> str:
    x = np.ones(3)
    seat.comm.all_reduce(x)
    x[1] += seat.rank
    return "" if (x == 2).all() else f"x is {x.tolist()}"


def dies(seat: Seat) -> None:
    if seat.rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)


def hangs(seat: Seat) -> None:
    if seat.rank == 0:
        time.sleep(60)


def raises(error: type[Exception], rank: int | None = None) -> Callable[[Seat], None]:
    def call(seat: Seat) -> None:
        if rank in (None, seat.rank):
            raise error("planted")

    return call


def left_over(seat: Seat) -> None:
    """Sends before it refuses."""
    if seat.rank == 0:
        seat.comm.all_reduce(np.ones(100), async_op=True)
    raise InvalidArgument("planted")


def refused_late(seat: Seat) -> None:
    seat.comm.all_reduce(np.ones(3 + seat.rank))


def good(seat: Seat) -> str:
    return str(seat.good_call())


PLANTED: dict[str, tuple[Case, str]] = {
    "value": (case("value", wrong_value, str), "x is"),
    "death": (case("death", dies), "rank 1 died SIGSEGV"),
    "hang": (case("hang", hangs), "rank 0 hung"),
    "unnamed": (case("unnamed", raises(TypeError)), "raised TypeError"),
    "one rank": (case("one rank", raises(InvalidArgument, 1)), "differs"),
    "sent": (case("sent", left_over), "the next all_reduce"),
    "late": (case("late", refused_late), "refused only after sending: Mismatch"),
    "accepted": (case("accepted", good, str, expect="refused"), "accepted"),
    "refused": (case("refused", raises(InvalidArgument), expect="right"), "refused: InvalidArgument"),
    "untested": (Case("untested", lambda seat: [][1]), "untested"),
}  # fmt: skip


def test_what_is_wrong_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each planted fault is found and laid at its own call's door; good calls between them are not."""
    monkeypatch.setattr("tests.comm.odd_calls.LIMIT_S", 6.0)
    cases, expected = [], {}
    for name, (planted, why) in PLANTED.items():
        cases += [case(f"good before {name}", good, str), planted]
        expected[name] = why
    cases.append(case("refused alike", raises(InvalidArgument), expect="refused"))
    report = run_cases(cases, Seat, tmp_path / "ranks")
    found = dict(report.failures)
    assert set(found) == set(expected), str(report)
    for name, why in expected.items():
        assert why in found[name], (name, found[name])
    assert report.calls == len(cases) and report.right == len(PLANTED) and report.refused == 1
