"""What `verify` must refuse."""

from dataclasses import replace

import numpy as np
import pytest

from paracomm.errors import ScheduleError
from paracomm.schedule import COLLECTIVES, Schedule, algorithms, build, project_all, verify
from paracomm.schedule.mutate import campaign
from paracomm.schedule.program import OP_DST_BUFFER, OP_EARLY_WRITE, OP_KIND, RECV, SCRATCH
from paracomm.schedule.verify import check_depth, check_order, replay

ALGORITHMS = [(collective, name) for collective in COLLECTIVES for name in algorithms(collective)]


@pytest.mark.parametrize("collective,name", ALGORITHMS)
def test_every_single_deletion_is_caught(collective: str, name: str) -> None:
    for n in (2, 3, 4, 5):
        schedule = build(collective, name, n)
        for i in range(len(schedule)):
            with pytest.raises(ScheduleError):
                verify(schedule.replaced(np.delete(schedule.ops, i, axis=0)))


def test_wrong_mutants_are_caught() -> None:
    verdicts = campaign(300, seed=7)
    assert [v.what for v in verdicts if v.fate == "missed"] == []
    assert sum(v.fate == "caught" for v in verdicts) > 200


def broken(message: str, schedule: Schedule, *fragments: str) -> str:
    with pytest.raises(ScheduleError, match=message) as caught:
        verify(schedule)
    for fragment in fragments:
        assert fragment in str(caught.value)
    return str(caught.value)


def test_error_shows_the_fault_with_an_arrow_and_the_table() -> None:
    s = Schedule("all_reduce", 3, name="mine")
    s.reduce(s.at(0), s.at(1))
    s.reduce(s.at(0), s.at(1))
    text = broken("rank 0 enters 1.data.0. twice", s, "all_reduce [mine] world_size=3")
    assert any(line.startswith("-->") and "1  reduce 0.data[0] -> 1.data[0]" in line for line in text.splitlines())
    assert "<-- here, rank 0" in text and "level  rank 0" in text


def test_undefined_reads() -> None:
    s = Schedule("broadcast", 2)
    s.copy(s.at(1), s.at(0))
    broken("1.data.0. is read before anything is in it", s)
    s = Schedule("all_reduce", 2)
    s.reduce(s.at(0), s.at(1, 0, "scratch"))
    broken("1.scratch.0. is reduced into before anything is in it", s)


def test_replicas_must_hold_the_same_expression() -> None:
    s = Schedule("all_reduce", 3)
    for r in range(3):
        s.copy(s.at(r), s.at(r, 0, "scratch"))
    for r in range(3):
        for step in (1, 2):
            s.reduce(s.at((r + step) % 3, 0, "scratch"), s.at(r))
    broken("replicas could differ", s)


def test_wrong_chunk_and_wrong_block() -> None:
    s = Schedule("all_reduce", 2, chunks=2)
    s.reduce(s.at(0, 0), s.at(1, 1))
    broken("has the size of chunk 0", s)
    s = Schedule("all_to_all", 2, chunks=2)
    for r in range(2):
        for j in range(2):
            s.copy(s.at(r, j, "input"), s.at(r, j, "output"))
    broken("has the size of chunk", s)


def test_wasted_operations() -> None:
    s = Schedule("broadcast", 2)
    s.copy(s.at(0), s.at(1))
    s.copy(s.at(0), s.at(1))
    broken("holds that value already", s)
    s = Schedule("broadcast", 2)
    s.copy(s.at(0), s.at(1, 0, "scratch"))
    s.copy(s.at(0), s.at(1))
    broken("nobody uses what it writes", s)


def test_barrier_must_hear_of_everybody() -> None:
    s = Schedule("barrier", 3)
    for r in range(3):
        s.copy(s.at(r), s.at((r + 1) % 3, 0, "scratch"))
    for r in range(3):
        s.reduce(s.at(r, 0, "scratch"), s.at(r))
    broken("lacks the contribution of rank", s)


def test_scratch_is_used_in_the_spans_it_was_filled_in() -> None:
    s = Schedule("broadcast", 2, chunks=2)
    s.copy(s.at(0, 0, span=2), s.at(1, 0, "scratch", span=2))
    s.copy(s.at(1, 0, "scratch"), s.at(1, 0))
    s.copy(s.at(1, 1, "scratch"), s.at(1, 1))
    broken("in the spans it was filled in", s)


def test_too_many_messages_at_one_level() -> None:
    s = build("broadcast", "chain", 2, pieces=33)
    broken("33 messages from one rank to another at one level", s)
    verify(s, fifo_depth=66)
    check_depth(build("broadcast", "chain", 2, pieces=32), 64)


def test_programs_out_of_order_are_races() -> None:
    s = build("all_reduce", "ring", 4)
    programs = project_all(s)
    check_order(s, programs)
    turned = replace(programs[1], ops=programs[1].ops[::-1], index=programs[1].index[::-1])
    with pytest.raises(ScheduleError, match="after a later operation on the same chunk"):
        check_order(s, [programs[0], turned, *programs[2:]])


def test_unproved_early_writes_are_races() -> None:
    s = build("all_reduce", "ring", 4)
    programs = project_all(s)
    ops = programs[1].ops.copy()
    late = np.flatnonzero((ops[:, OP_KIND] == RECV) & (ops[:, OP_DST_BUFFER] != SCRATCH))
    assert not ops[late, OP_EARLY_WRITE].any()
    ops[late[0], OP_EARLY_WRITE] = 1
    with pytest.raises(ScheduleError, match="early write"):
        check_order(s, [programs[0], replace(programs[1], ops=ops), *programs[2:]])


def test_deadlock_is_found() -> None:
    s = Schedule("all_gather", 2, chunks=2)
    s.copy(s.at(0, 0), s.at(1, 0))
    s.copy(s.at(1, 1), s.at(0, 1))
    verify(s)
    programs = project_all(s)
    replay(s, programs, fifo_depth=1)
    receive_first = [replace(p, ops=p.ops[np.argsort(-p.ops[:, 0])], index=p.index[np.argsort(-p.ops[:, 0])])
                     for p in programs]  # fmt: skip
    with pytest.raises(ScheduleError, match="deadlock at FIFO depth 64: rank 0 at operation 1, rank 1 at operation 0"):
        replay(s, receive_first)


def test_runs_that_would_close_a_cycle_fall_apart() -> None:
    """Rank 2 adds rank 0's chunk before and after rank 1 overwrites it: no single reduction can do both."""
    from paracomm.schedule.order import order_of

    s = Schedule("reduce", 3, root=2)
    s.reduce(s.at(0), s.at(2))
    s.copy(s.at(1), s.at(0))
    s.reduce(s.at(0), s.at(2))
    order = order_of(s)
    assert order.node == [0, 1, 2]
    assert order.level[0] < order.level[1] < order.level[2]
    verify(s)


def test_reduces_in_a_row_are_one_node() -> None:
    from paracomm.schedule.order import order_of

    order = order_of(build("all_reduce", "one_shot", 4))
    assert set(order.level) == {1}
    assert len(set(order.node)) == 8
