"""Tables of choices: made, merged, kept, and refused when they are wrong."""

import os
from pathlib import Path
from typing import Any

import pytest

from paracomm.errors import InvalidArgument
from paracomm.schedule import COLLECTIVES, build, verify
from paracomm.schedule.schedule import ROOTED
from paracomm.schedule.simulate import Link, Topology
from paracomm.schedule.tune import (
    UNLIMITED,
    Candidate,
    cache_path,
    candidates,
    check,
    default_table,
    load,
    lookup,
    save,
    shortlist,
    tune,
)

LAYOUTS = [(0,), (0, 0), (0, 1), (0,) * 8, (0, 0, 1, 1), (0, 1, 2, 3), (0, 0, 0, 1), (0, 1) * 4]


@pytest.mark.parametrize("hosts", LAYOUTS)
def test_default_table_is_sound(hosts: tuple[int, ...]) -> None:
    table = default_table(len(hosts), hosts)
    check(table)
    assert set(table) == set(COLLECTIVES)
    for collective, rows in table.items():
        for _, name, params in rows:
            verify(build(collective, name, len(hosts), 0 if collective in ROOTED else None, **params))
    large = lookup(table, "all_reduce", 1 << 30).algorithm
    count = len(set(hosts))
    assert large == ("direct" if count == 1 else "ring" if count == len(hosts) else "hierarchical")


def test_simulation_prefers_few_steps_for_small_and_few_bytes_for_large_calls() -> None:
    topology = Topology(tuple(r // 4 for r in range(16)), Link(1e-6, 1e-10), Link(3e-5, 8e-9))
    assert shortlist("all_reduce", 1 << 26, topology)[0].algorithm == "hierarchical"
    flat = Topology.flat(16, 1e-5, 1e-10)
    assert shortlist("all_reduce", 8, flat)[0].algorithm == "recursive_doubling"
    assert shortlist("all_gather", 8, flat)[0].algorithm == "bruck"
    assert not any(c.algorithm == "hierarchical" for c in candidates("all_reduce", (0, 1, 2)))


def test_measurement_decides_among_the_best() -> None:
    asked: list[tuple[str, str, int]] = []

    def measure(collective: str, candidate: Candidate, nbytes: int) -> float:
        asked.append((collective, candidate.algorithm, nbytes))
        return {"ring": 1.0, "direct": 2.0 if nbytes > 5000 else 0.5}.get(candidate.algorithm, 3.0)

    topology = Topology.flat(4, 1e-6, 1e-10)
    table = tune(topology, measure, ["reduce_scatter", "barrier"], sizes=(1000, 4000, 16000), best=3, budget_s=60)
    assert table["reduce_scatter"] == [[8000, "direct", {}], [UNLIMITED, "ring", {}]]
    assert table["barrier"] == [[UNLIMITED, "dissemination", {}]]
    assert not any(collective == "barrier" for collective, _, _ in asked)
    check(table)


def test_a_small_lead_is_noise() -> None:
    def measure(collective: str, candidate: Candidate, nbytes: int) -> float:
        return 0.95 if candidate.algorithm == "ring" else 1.0

    table = tune(Topology.flat(4, 1e-6, 1e-10), measure, ["all_reduce"], sizes=(1 << 22,), budget_s=60)
    assert table["all_reduce"] == [[UNLIMITED, "direct", {}]]


def test_budget_ends_the_measuring() -> None:
    now = iter(float(t) for t in range(1000))
    asked: list[int] = []

    def measure(collective: str, candidate: Candidate, nbytes: int) -> float:
        asked.append(nbytes)
        return 1.0

    tune(Topology.flat(4, 1e-6, 1e-10), measure, ["all_reduce"], (1, 2, 3, 4), budget_s=2.5, clock=lambda: next(now))
    assert set(asked) == {1, 2}


def test_kept_table_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cache_path("node-1/x", (0, 0, 1, 1))
    assert path.parent == tmp_path / "paracomm" and path != cache_path("node-1/x", (0, 1, 0, 1))
    assert load(path) is None
    table = default_table(4, (0, 0, 1, 1))
    save(table, path, {"inside": "fast"})
    assert load(path) == table
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        '{"format": 1}',
        '{"format": 1, "table": {"all_reduce": [[4, "ring", {}]]}}',
        '{"format": 1, "table": {"all_reduce": [[4611686018427387904, "spiral", {}]]}}',
        '{"format": 1, "table": {"all_reduce": [[8, "ring", {}], [4, "ring", {}]]}}',
        "",
        "{}",
        "null",
        '"a"',
        "[" * 100_000,
        '{"a": ' * 100_000,
        b"\x80\xff\x00",
        '{"format": 1, "table": []}',
        '{"format": 1, "table": {"all_reduce": 5}}',
        '{"format": 1, "table": {"all_reduce": {"a": 1}}}',
        '{"format": 1, "table": {"all_reduce": []}}',
        '{"format": 1, "table": {"sum_it_up": [[4611686018427387904, "ring", {}]]}}',
        '{"format": 1, "table": {"all_reduce": [[4611686018427387904, ["ring"], {}]]}}',
        '{"format": 1, "table": {"all_reduce": [[4611686018427387904, "ring"]]}}',
        '{"format": 1, "table": {"all_reduce": [[4611686018427387904, "ring", []]]}}',
        '{"format": 1, "table": {"all_reduce": [[1e300, "ring", {}]]}}',
        '{"format": 1, "table": {"all_reduce": [[true, "ring", {}], [4611686018427387904, "ring", {}]]}}',
        '{"format": 1, "table": {"all_reduce": [[340282366920938463463374607431768211456, "ring", {}]]}}',
        "a folder",
        "a pipe",
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "table.json"
    if text == "a folder":
        path.mkdir()
    elif text == "a pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidArgument, match=r"table\.json"):
        load(path)


@pytest.mark.parametrize(
    "params", [{"spin": 1}, {"pieces": "x"}, {"pieces": -1}, {"pieces": 0}, {"pieces": {}}, {"pieces": [1]},
               {"pieces": 1e9}, {"pieces": 2**60}, {"pieces": None}],
)  # fmt: skip
def test_parameters_that_an_algorithm_does_not_take(params: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        build("broadcast", "chain", 4, 0, **params)


def test_lookup_outside_the_table() -> None:
    with pytest.raises(InvalidArgument, match="no row for all_reduce"):
        lookup({}, "all_reduce", 1)
