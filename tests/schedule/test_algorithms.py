"""Every registered algorithm at every world size: proved, run on numbers, and held to its documented cost."""

from fractions import Fraction
from typing import Any

import pytest

from paracomm.schedule import COLLECTIVES, Schedule, algorithms, build, get, project_all, verify
from paracomm.schedule.emulate import outcome
from paracomm.schedule.order import order_of
from paracomm.schedule.registry import cases
from paracomm.schedule.simulate import Link, Topology, simulate

ALGORITHMS = [(collective, name) for collective in COLLECTIVES for name in algorithms(collective)]
SMALL = tuple(range(1, 18))
SAMPLE = (23, 31, 32, 48, 65, 128)
Params = dict[str, Any]


def built(collective: str, name: str, world_size: int) -> list[tuple[Schedule, Params]]:
    return [
        (build(collective, name, world_size, root, **params), params)
        for c, a, root, params in cases(world_size, (collective,))
        if a == name
    ]


@pytest.mark.parametrize("collective,name", ALGORITHMS)
def test_proved_at_every_world_size(collective: str, name: str) -> None:
    for n in SMALL:
        for schedule, _ in built(collective, name, n):
            verify(schedule)


@pytest.mark.parametrize("world_size", SAMPLE)
@pytest.mark.parametrize("collective,name", ALGORITHMS)
def test_proved_at_large_world_sizes(collective: str, name: str, world_size: int) -> None:
    schedule, _ = built(collective, name, world_size)[-1]
    verify(schedule)


@pytest.mark.parametrize("collective,name", ALGORITHMS)
def test_right_numbers_on_random_interleavings(collective: str, name: str) -> None:
    for n in (1, 2, 3, 4, 5, 7, 8, 11):
        for schedule, params in built(collective, name, n):
            for seed in range(3):
                assert outcome(schedule, seed) is None, (n, params, seed)


@pytest.mark.parametrize("collective,name", ALGORITHMS)
def test_steps_and_bytes_are_the_documented_ones(collective: str, name: str) -> None:
    entry = get(collective, name)
    assert entry.steps is not None
    for n in (*SMALL, 32, 48):
        for schedule, params in built(collective, name, n):
            assert max(order_of(schedule).level, default=0) == entry.steps(n, **params), (n, params)
            if entry.volume is not None:
                sent = Fraction(project_all(schedule)[0].volume, schedule.chunks)
                assert sent == entry.volume(n, **params), (n, params)


@pytest.mark.parametrize("between", ["ring", "direct"])
@pytest.mark.parametrize(
    "hosts", [(0, 0, 1, 1), (0, 0, 0, 1), (0, 1, 0, 1, 2), (0, 0, 0, 1, 1, 2, 2, 2, 2), (3, 3, 3), (0, 1, 2)]
)
def test_hierarchical_sends_the_least_between_hosts(hosts: tuple[int, ...], between: str) -> None:
    schedule = build("all_reduce", "hierarchical", len(hosts), hosts=hosts, between=between)
    verify(schedule)
    nbytes, h = 720720.0, len(set(hosts))
    result = simulate(schedule, nbytes, Topology(hosts, Link(1e-6, 1e-10), Link(1e-5, 1e-9)))
    for host in set(hosts):
        sent = sum(size for (source, _), size in result.host_bytes.items() if source == host)
        assert sent == pytest.approx(2 * nbytes * (h - 1) / h)


def test_double_tree_gives_no_rank_two_inner_roles() -> None:
    from paracomm.schedule.algorithms.double_tree import parents

    for n in range(2, 40):
        first, second = parents(n, 0), parents(n, 1)
        assert sum(p < 0 for p in first) == sum(p < 0 for p in second) == 1
        assert not set(first) & set(second) - {-1}


@pytest.mark.parametrize("name", algorithms("all_reduce"))
def test_one_rank_needs_nothing(name: str) -> None:
    assert len(build("all_reduce", name, 1)) == 0
