"""The two verbs, the registry, projection, and what people see."""

import subprocess
import sys

import numpy as np
import pytest

from paracomm.errors import InvalidArgument, ScheduleError
from paracomm.schedule import Schedule, algorithm, algorithms, build, project, project_all, verify
from paracomm.schedule.emulate import outcome
from paracomm.schedule.program import OP_COLUMNS, RECV, SEND
from paracomm.schedule.registry import forget


def test_a_user_writes_an_algorithm_in_a_dozen_lines() -> None:
    @algorithm("all_reduce", "star", steps=lambda n: 2, volume=lambda n: n - 1)
    def star(s: Schedule) -> None:
        """Everybody sends to rank 0, which sends the sum back."""
        for r in range(1, s.world_size):
            s.reduce(s.at(r), s.at(0))
        for r in range(1, s.world_size):
            s.copy(s.at(0), s.at(r))

    try:
        assert "star" in algorithms("all_reduce")
        for n in range(1, 9):
            schedule = build("all_reduce", "star", n)
            verify(schedule)
            assert outcome(schedule, n) is None
        assert build("all_reduce", "star", 4) is build("all_reduce", "star", 4)
    finally:
        forget("all_reduce", "star")


def test_arrays_write_many_operations_at_once() -> None:
    one, many = Schedule("all_gather", 4, chunks=4), Schedule("all_gather", 4, chunks=4)
    for r in range(4):
        one.copy(one.at(r, r), one.at((r + 1) % 4, r))
    many.copy(many.at(many.ranks, many.ranks), many.at((many.ranks + 1) % 4, many.ranks))
    assert np.array_equal(one.ops, many.ops)
    assert one.fingerprint == many.fingerprint


@pytest.mark.parametrize(
    "make",
    [
        lambda: Schedule("all_sum", 2),
        lambda: Schedule("all_reduce", 0),
        lambda: Schedule("all_reduce", 2, chunks=0),
        lambda: Schedule("all_gather", 3, chunks=4),
        lambda: Schedule("broadcast", 3, root=3),
        lambda: Schedule("all_reduce", 3, root=0),
        lambda: algorithms("all_sum"),
        lambda: algorithm("all_sum", "x"),
        lambda: build("all_reduce", "spiral", 2),
        lambda: build("all_reduce", "ring", 2, pieces=3),
        lambda: build("all_reduce", "hierarchical", 4, hosts=[0, 1]),
        lambda: build("all_reduce", "hierarchical", 4, hosts=[0, 0, 1, 1], ranks_per_host=2),
        lambda: build("all_reduce", "hierarchical", 4, between="pigeon"),
        lambda: project(build("all_reduce", "ring", 2), 2),
    ],
)
def test_invalid_arguments(make: object) -> None:
    with pytest.raises(InvalidArgument):
        make()  # type: ignore[operator]


def test_regions_that_do_not_exist() -> None:
    s = Schedule("all_reduce", 2, chunks=2)
    for src, dst in (
        (s.at(0, 0), s.at(2, 0)),
        (s.at(-1, 0), s.at(1, 0)),
        (s.at(0, 2), s.at(1, 2)),
        (s.at(0, 1, span=2), s.at(1, 1, span=2)),
        (s.at(0, 0, span=2), s.at(1, 0)),
        (s.at(0, 0), s.at(0, 0)),
        (s.at(0, 0, "input"), s.at(1, 0)),
        (s.at(0, 0, "temporary"), s.at(1, 0)),
    ):
        with pytest.raises(ScheduleError):
            s.copy(src, dst)
    with pytest.raises(ScheduleError, match="shared"):
        build("all_reduce", "ring", 2).copy(s.at(0), s.at(1))


def test_programs_of_a_ring() -> None:
    programs = project_all(build("all_reduce", "ring", 4))
    assert [len(p.ops) for p in programs] == [3 * 3 + 3 * 2] * 4
    for p in programs:
        assert p.ops.dtype == np.int32 and p.ops.shape[1] == len(OP_COLUMNS) == 12
        assert (p.chunks, p.scratch_chunks, p.volume, p.levels, p.pair_depth, p.root) == (4, 3, 6, 6, 1, -1)
        assert p.fingerprint == programs[0].fingerprint
        assert (np.diff(p.ops[:, 8]) >= 0).all()
        assert p.ops[:, 9].sum() == 1  # one final reduce: of the chunk that the rank owns


def test_both_ends_agree_on_every_message() -> None:
    for name in algorithms("all_reduce"):
        programs = project_all(build("all_reduce", name, 6))
        for a in range(6):
            for b in range(6):
                sent = programs[a].ops[(programs[a].ops[:, 0] == SEND) & (programs[a].ops[:, 7] == b)]
                got = programs[b].ops[(programs[b].ops[:, 0] == RECV) & (programs[b].ops[:, 7] == a)]
                assert np.array_equal(sent[:, [4, 5, 6, 8, 10, 11]], got[:, [4, 5, 6, 8, 10, 11]])


def test_sizes_travel_through_scratch() -> None:
    s = Schedule("broadcast", 3, chunks=2)
    for c in range(2):
        s.copy(s.at(0, c), s.at(1, 1 - c, "scratch_a"))
        s.copy(s.at(1, 1 - c, "scratch_a"), s.at(1, c))
        s.copy(s.at(1, 1 - c, "scratch_a"), s.at(2, c))
    verify(s)
    assert outcome(s, 3) is None
    sends = [op for op in project(s, 1).ops.tolist() if op[0] == SEND]
    assert [(op[1], op[2], op[11]) for op in sends] == [(3, 1, 0), (3, 0, 1)]


def test_sizes_of_all_to_all_are_local() -> None:
    for op in project(build("all_to_all", "direct", 4), 2).ops.tolist():
        if op[0] == SEND or op[0] == RECV:
            assert op[11] == op[7]
        else:
            assert op[11] == 2


def test_table_and_text() -> None:
    schedule = build("all_reduce", "ring", 3)
    assert schedule.table().splitlines()[1].split() == ["1", "2>+1", "0>+2", "1>+0"]
    assert schedule.dump().splitlines()[:2] == [
        "all_reduce ring world_size=3 chunks=3",
        "  1  reduce 0.data[2] -> 1.data[2]",
    ]
    assert "send   data[2:3] -> scratch[0:1] to rank 1" in str(project(schedule, 0))
    assert "ring" in repr(schedule)


def test_schedules_need_neither_torch_nor_the_extension() -> None:
    code = (
        "import sys; import paracomm.schedule.tune; "
        "bad = {'torch', 'paracomm._C', 'typer', 'rich'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
