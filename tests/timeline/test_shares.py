"""What steps are made of: made-up spans with known shares, and any spans beside a count of each nanosecond."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paracomm.cli.trace import in_tenths
from paracomm.timeline import Record, shares
from paracomm.timeline.chrome import document
from paracomm.timeline.clock import Clock
from paracomm.timeline.record import Event
from paracomm.timeline.shares import common, union


def record_of(*spans: tuple, rank: int = 3) -> Record:
    """Of (kind, name, start, end[, details[, lane[, thread]]])."""
    record = Record(rank, 4, Clock(ahead_ns=1000, error_ns=0, unix_ns=10**18, own_unix_ns=10**18, began_ns=50))
    record.start_ns, record.end_ns = 0, 1000
    for kind, name, start, end, *others in spans:
        details = others[0] if others else {}
        lane = others[1] if len(others) > 1 else ""
        thread = others[2] if len(others) > 2 else record.thread
        record.threads.setdefault(thread, f"number {thread}")
        record.events.append(Event(kind, name, start, end, lane, thread, details))
    return record


def shares_of(*spans: tuple):
    return shares(document(record_of(*spans)))


DP = {"axis": "dp", "operation": "all_reduce"}
PP = {"axis": "pp", "operation": "recv"}
STEP = ("step", "step 7", 100, 1100)


def test_a_step_of_everything():
    found = shares_of(
        STEP,
        ("compute", "forward", 150, 450),
        ("wait", "all_reduce", 200, 230, DP),  # inside of forward
        ("wait", "reduce_scatter", 460, 470, {"axis": "dp", "operation": "reduce_scatter"}),
        ("bubble", "2B0", 500, 700),
        ("wait", "recv", 520, 680, PP),  # inside of a bubble: part of it
        ("compute", "2B0", 700, 900),
        ("wait", "all_reduce", 900, 1000, DP),
    )
    assert found.rank == 3 and found.steps == 1 and found.total_ns == 1000
    assert found.compute_ns == 270 + 200
    assert found.exposed_ns == {("dp", "all_reduce"): 130, ("dp", "reduce_scatter"): 10}
    assert found.bubble_ns == 200
    assert found.rest_ns == 1000 - 470 - 140 - 200
    described = found.described()
    assert described["exposed"] == {"dp": {"all_reduce": 0.13, "reduce_scatter": 0.01}}
    assert described["compute"] == 0.47 and described["bubble"] == 0.2 and described["rest"] == 0.19
    assert described["step_ms"] == 0.001


def test_communication_behind_compute_counts_once_and_beside_the_whole():
    found = shares_of(
        STEP,
        ("compute", "backward", 100, 600),
        ("wait", "all_reduce", 600, 700, DP),
        ("communication", "all_reduce", 200, 400, DP, "dp"),
        ("communication", "send", 300, 500, PP, "pp"),  # beside it: 300 together, not 400
        ("communication", "all_reduce", 550, 700, DP, "dp"),  # 50 of it behind backward
        ("communication", "all_reduce", 1050, 1300, DP, "dp"),  # 50 of it in the step, where nobody waits for it
    )
    assert found.overlapped_ns == 300 + 50 + 50
    assert (found.compute_ns, found.exposed_ns, found.rest_ns) == (500, {("dp", "all_reduce"): 100}, 400)


def test_what_is_of_no_step_or_of_another_thread_does_not_count():
    found = shares_of(
        STEP,
        ("step", "step 8", 1500, 1600),
        ("compute", "evaluation", 1200, 1400),
        ("wait", "barrier", 1400, 1450, {"axis": "world", "operation": "barrier"}),
        ("compute", "hook", 100, 1100, {}, "", -1),
        ("wait", "all_reduce", 100, 1100, DP, "", -1),
        ("compute", "forward", 1520, 1570),
    )
    assert found.steps == 2 and found.total_ns == 1100
    assert (found.compute_ns, found.exposed_ns, found.rest_ns) == (50, {}, 1050)
    assert found.overlapped_ns == 0


def test_without_steps_the_record_is_one():
    found = shares_of(("compute", "all", 250, 500))
    assert found.steps == 1 and found.total_ns == 1000 and found.compute_ns == 250


def test_a_wait_that_says_nothing_is_counted_by_its_name():
    assert shares_of(STEP, ("wait", "the disk", 200, 300)).exposed_ns == {("", "the disk"): 100}


@st.composite
def nested(draw, start=0, end=60, depth=0):
    """Spans inside of each other or apart, as one thread has them."""
    edges = sorted(draw(st.sets(st.integers(start, end), max_size=6)))
    found = []
    for a, b in itertools.pairwise(edges):
        if draw(st.booleans()):
            continue
        kind = draw(st.sampled_from(["step"] if depth == 0 else ["compute", "wait", "bubble", "communication"]))
        found.append((kind, f"{kind} {a}", a, b, {"axis": "dp", "operation": "op"}))
        if depth < 4:
            found += draw(nested(a, b - 1, depth + 1))  # two of the same ends would be in no order
    return found


@given(spans=nested(), under_way=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=5))
def test_any_spans_beside_a_count_of_each_nanosecond(spans, under_way):
    lanes = [("communication", "x", a, a + n, {}, "dp") for a, n in under_way]
    marker = ("step", "marker", 1000, 1001)
    found = shares_of(marker, *spans, *lanes)
    counts = {"compute": 0, "wait": 0, "bubble": 0, "rest": 1, "overlapped": 0}
    for t in range(61):
        around = [kind for kind, _, a, b, _ in spans if a <= t < b]
        if not around:
            continue
        kind = {"step": "rest", "communication": "wait"}.get(around[-1], around[-1])
        kind = "bubble" if kind == "wait" and "bubble" in around else kind
        counts[kind] += 1
        counts["overlapped"] += kind in ("rest", "compute") and any(a <= t < a + n for a, n in under_way)
    assert found.compute_ns == counts["compute"] and found.bubble_ns == counts["bubble"]
    assert sum(found.exposed_ns.values()) == counts["wait"]
    assert found.rest_ns == counts["rest"] and found.overlapped_ns == counts["overlapped"]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=8), st.integers(0, 40))
def test_intervals(some, edge):
    apart = union((a, a + n) for a, n in some)
    covered = {t for a, n in some for t in range(a, a + n)}
    assert sum(b - a for a, b in apart) == len(covered)
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(apart))
    assert common(apart, [(edge, edge + 7)]) == len(covered & set(range(edge, edge + 7)))


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=9))
def test_shares_that_are_shown_add_up(parts):
    tenths = in_tenths(parts)
    assert sum(tenths) == (1000 if sum(parts) else 0)
    assert all(abs(tenth - 1000 * part / max(sum(parts), 1)) < 1 for tenth, part in zip(tenths, parts, strict=True))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_lanes_hold_nothing_that_overlaps(count):
    """Viewers drop what does."""
    spans = [("communication", f"{i}", 10 * i, 10 * i + 10 * count - 5, {}, "dp") for i in range(20)]
    traced = document(record_of(*spans, ("communication", "tp", 0, 300, {}, "tp")))["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in traced if e["name"] == "thread_name"}
    expected = ["dp", *(f"dp {n}" for n in range(2, count + 1)), "tp"]
    assert [names[tid] for tid in sorted(names)] == ["compute", "wait", *expected]
    for tid in names:
        mine = sorted((e["ts"], e["ts"] + e["dur"]) for e in traced if e["ph"] == "X" and e["tid"] == tid)
        assert all(b <= c for (_, b), (c, _) in itertools.pairwise(mine))
    assert sum(e["ph"] == "X" for e in traced) == 21
