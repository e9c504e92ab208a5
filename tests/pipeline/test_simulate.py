"""Simulated steps: by hand, against a replay of their own rules, and against the published formulas."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from paracomm.errors import InvalidArgument, ScheduleError
from paracomm.pipeline import SCHEDULES, Action, Costs, Link, build, read_schedule, simulate
from paracomm.pipeline.memory import peaks

SIZES = [(1, 1), (1, 5), (2, 2), (2, 7), (3, 6), (4, 8), (4, 13), (5, 24), (8, 16), (8, 19), (16, 40)]
"""(p, m) with m >= p."""


def step(name, p, m, f, b, w, v=None):
    return simulate(build(name, ranks=p, microbatches=m, stages_per_rank=v), Costs(f, b, w))


# The formulas, as the authors' docstrings state them; numbers are integers, so that sums of floats are exact.


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("f,b,w", [(1, 1, 1), (3, 4, 5), (5, 0, 1)])
def test_bubble_of_gpipe_and_1f1b(name, f, b, w):
    for p, m in [*SIZES, (4, 1), (8, 3), (5, 4)]:
        found = step(name, p, m, f, b, w)
        assert found.step_s == (m + p - 1) * (f + b + w)
        assert found.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
        assert found.bubbles == pytest.approx((found.bubble,) * p, abs=1e-12)


@pytest.mark.parametrize("v", [2, 3, 4, 8])
@pytest.mark.parametrize("f,b,w", [(1, 1, 1), (3, 4, 5)])
def test_bubble_of_interleaved(v, f, b, w):
    for p, m in SIZES:  # whether p divides m or not
        found = step("interleaved", p, m, f, b, w, v)
        assert found.step_s == (v * m + p - 1) * (f + b + w)
        assert found.bubble == pytest.approx((p - 1) / (v * m + p - 1), abs=1e-12)


def test_interleaved_with_fewer_microbatches_than_ranks():
    for p, m, v in [(4, 1, 2), (4, 3, 2), (8, 5, 3), (5, 4, 4)]:
        assert step("interleaved", p, m, 3, 4, 5, v).step_s == (v * p + m - 1) * 12


@pytest.mark.parametrize("f,b,w", [(1, 1, 1), (10, 10, 5), (10, 14, 7), (3, 20, 2), (10, 2, 7), (7, 10, 10)])
def test_bubble_of_zb_h1(f, b, w):
    published = f + b - w
    for p, m in SIZES:
        found = step("zb-h1", p, m, f, b, w)
        idle = (p - 1) * (published if w <= min(f, b) else max(f, b))
        assert found.step_s == m * (f + b + w) + idle
        if idle != (p - 1) * published:
            continue
        # In Qi's definition it is the same: the first rank begins at once, and takes longest.
        assert found.bubble_within == pytest.approx(idle / (m * (f + b + w) + idle), abs=1e-12)
        assert found.bubble == pytest.approx(found.bubble_within, abs=1e-12)


def test_bubble_of_zbv():
    for p, m in [(p, max(m, 2 * p)) for p, m in SIZES]:
        found = step("zbv", p, m, 2, 2, 2)
        assert found.bubble_within == 0
        assert found.step_s == 2 * m * 6 + (p - 1) * 2
        for rank, mine in enumerate(found.ranks):
            assert all(a.end_s == c.start_s for a, c in pairwise(mine)), "idle between its first and last action"
            assert mine[0].start_s == 2 * rank


@pytest.mark.parametrize("f,b,w", [(1, 1, 1), (10, 10, 5), (10, 10, 8)])
def test_bubble_of_dualpipev(f, b, w):
    for p, m in [(p, max(m, 2 * p)) for p, m in SIZES]:
        found = step("dualpipev", p, m, f, b, w)
        assert found.step_s - 2 * m * (f + b + w) == (p - 1) * (f + b - w)


def test_bubble_of_dualpipev_is_at_most_the_published_one():
    for f, b, w in [(10, 14, 7), (10, 20, 10), (8, 10, 10), (12, 10, 8)]:
        for p in range(2, 9):
            idle = step("dualpipev", p, 2 * p, f, b, w).step_s - 4 * p * (f + b + w)
            assert 0 < idle <= (p - 1) * ((f + b + w) + (b + w) - 3 * w)


def longest_round(p, m):
    return -(-m // max(1, m // p))


PEAKS = {
    "gpipe": lambda p, m, v, r: m,
    "1f1b": lambda p, m, v, r: min(m, p - r),
    "interleaved": lambda p, m, v, r: min(v * m, 2 * (p - r - 1) + (v - 1) * longest_round(p, m) + 1),
    "zb-h1": lambda p, m, v, r: min(m, p),
    "zbv": lambda p, m, v, r: 2 * p if m >= 2 * p else None,
    "dualpipev": lambda p, m, v, r: 2 * p + 1 if m >= 2 * p + 1 else None,
}
MOST = {"zbv": lambda p, m: min(2 * m, 2 * p), "dualpipev": lambda p, m: min(2 * m, 2 * p + 1)}


@pytest.mark.parametrize("name", PEAKS)
def test_peaks(name):
    for p in range(1, 9):
        for m in range(1, 25):
            for v in (2, 3, 5) if name == "interleaved" else (None,):
                found = tuple(peaks(build(name, ranks=p, microbatches=m, stages_per_rank=v)))
                expected = tuple(PEAKS[name](p, m, v, r) for r in range(p))
                assert None in expected or found == expected, (p, m, v)
                assert name not in MOST or max(found) <= MOST[name](p, m), (p, m)


def test_a_timeline_has_the_peaks_of_its_schedule():
    assert step("dualpipev", 4, 9, 1, 1, 1).peaks == (9, 9, 9, 9)
    assert step("1f1b", 4, 2, 1, 1, 1).peaks == (2, 2, 2, 1)


def test_zero_bubble_needs_no_more_memory_than_1f1b_at_its_most():
    for p, m in SIZES:
        at_most = max(step("1f1b", p, m, 1, 1, 1).peaks)
        assert max(step("zb-h1", p, m, 1, 1, 1).peaks) == at_most
        assert max(step("zbv", p, m, 1, 1, 1).peaks) / 2 <= at_most


def test_better_schedules_are_better():
    for p, m in SIZES:
        if p > 1 and m >= 2 * p:
            order = [step(name, p, m, 1, 1, 1).bubble for name in ("zbv", "zb-h1", "interleaved", "1f1b")]
            assert order[0] < order[1] < order[3] and order[2] < order[3]


# By hand.


def spans(text, costs, **options):
    found = simulate(read_schedule(text), costs, **options)
    return {str(span.action): (span.start_s, span.end_s) for span in found.spans}, found


def test_two_ranks_by_hand():
    found, timeline = spans("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1", Costs([1, 2], [3, 1], [0.5, 0.25], whole=[4, 5]))
    assert found == {
        "0F0": (0, 1),
        "0F1": (1, 2),
        "1F0": (1, 3),
        "1B0": (3, 8),
        "1F1": (8, 10),
        "1B1": (10, 15),
        "0B0": (8, 12),
        "0B1": (15, 19),
    }
    assert timeline.step_s == 19 and timeline.busy_s == (10, 14) and timeline.peaks == (2, 1)
    assert timeline.bubbles == (1 - 10 / 19, 1 - 14 / 19)
    assert timeline.bubble == pytest.approx(1 - 24 / 38)
    assert timeline.bubble_within == 1 - 10 / 19


def test_a_split_backward_lets_the_gradient_go_early():
    found, _ = spans("0F0 0B0\n1F0 1B0 1W0", Costs(1, 2, 4))
    assert found["1B0"] == (2, 4) and found["1W0"] == (4, 8)
    assert found["0B0"] == (4, 10)  # whole: 2 + 4


def test_links_by_hand():
    """Messages of 8 bytes at 4 a second, and 3 s of latency: they leave one after the other, and hold nobody up."""
    found, _ = spans("0F0 0F1 0B0 0B1\n1F0 1F1 1B0 1B1", Costs(1, 1), links=Link(3, 4), message_bytes=8)
    assert found["0F0"] == (0, 1) and found["0F1"] == (1, 2)
    assert found["1F0"] == (6, 7)  # 1 + 2 + 3
    assert found["1F1"] == (8, 9)  # its message left at 3, after the other one: 3 + 2 + 3
    assert found["1B0"] == (9, 10) and found["0B0"] == (15, 16)
    assert found["1B1"] == (10, 11) and found["0B1"] == (17, 18)


def test_links_of_pairs_and_sizes_of_boundaries():
    links = {(0, 1): Link(10), (1, 0): Link(20), (1, 2): Link(0, 2), (2, 1): Link(0, 4)}
    found, _ = spans("0F0 0B0\n1F0 1B0\n2F0 2B0", Costs(1, 1), links=links, message_bytes=[1000, 8])
    assert found["1F0"] == (11, 12) and found["2F0"] == (16, 17)
    assert found["1B0"] == (20, 21) and found["0B0"] == (41, 42)


def test_nothing_is_sent_within_a_rank():
    found, _ = spans("0F0 1F0 1B0 0B0", Costs(1, 1), links={}, message_bytes=8)
    assert found["0B0"] == (3, 4)


def test_bytes_of_activations():
    timeline = simulate(build("zbv", ranks=2, microbatches=4), Costs(1, 1, 1), activation_bytes=[1, 10, 100, 1000])
    for rank, mine in enumerate(timeline.schedule.ranks):
        held, most = 0, 0
        for action in mine:
            held += {"F": 1, "B": 0, "W": -1}[action.kind] * 10**action.stage
            most = max(most, held + 10**action.stage * (action.kind == "W"))
        assert timeline.peak_bytes[rank] == most
    assert simulate(build("gpipe", ranks=2, microbatches=4), Costs(1, 1), activation_bytes=7).peak_bytes == (28, 28)
    assert simulate(build("gpipe", ranks=2, microbatches=4), Costs(0, 0)).bubble == 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_begins_as_soon_as_it_can(name):
    """Random costs of each stage, and latencies of each pair: nothing earlier than it may be, and nothing later."""
    for seed in range(20):
        draw = random.Random(seed)
        p, m = draw.randint(1, 6), draw.randint(1, 10)
        schedule = build(name, ranks=p, microbatches=m)
        forward, backward, weight = ([draw.randint(0, 9) for _ in schedule.placement] for _ in range(3))
        links = {(a, b): Link(draw.randint(0, 5)) for a in range(p) for b in range(p)}
        timeline = simulate(schedule, Costs(forward, backward, weight), links=links)
        end = {span.action: span for span in timeline.spans}
        assert len(end) == len(timeline.spans) == sum(map(len, schedule.ranks))
        for rank, mine in enumerate(timeline.ranks):
            assert tuple(span.action for span in mine) == schedule.ranks[rank]
            for position, (_, (s, k, mb), start, stop) in enumerate(mine):
                both = k == "B" and (s, mb) not in schedule.split
                seconds = {"F": forward[s], "B": backward[s] + both * weight[s], "W": weight[s]}[k]
                assert stop == start + seconds
                giver = end.get(Action(s - 1, k, mb) if k == "F" else Action(s + 1, k, mb)) if k != "W" else None
                came = giver.end_s + (giver.rank != rank) * links[giver.rank, rank].latency_s if giver else 0
                assert start == max(came, mine[position - 1].end_s if position else 0)


def test_a_slow_stage_holds_everybody_up():
    uneven = simulate(build("1f1b", ranks=4, microbatches=8), Costs([1, 2, 1, 1], [2, 4, 2, 2]))
    assert 1 + 8 * 6 + 2 <= uneven.step_s < 1 + 8 * 6 + 2 + 4
    assert uneven.bubbles[1] < min(uneven.bubbles[0], *uneven.bubbles[2:])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"costs": Costs([1, 2], 1)}, "2 numbers of forward, expected one for all, or 3"),
        ({"costs": Costs(1, -1)}, "backward is -1, expected 0 or more"),
        ({"costs": Costs(1, 1, float("nan"))}, "weight is nan"),
        ({"costs": Costs(1, 1, whole=[1, 1, float("inf")])}, "whole is"),
        ({"links": {(0, 1): Link()}}, "no link from rank 1 to rank 2"),
        ({"links": Link(-1.0)}, "expected a finite latency"),
        ({"links": Link(0, 0)}, "a rate above 0"),
        ({"message_bytes": [1, 2, 3]}, "3 numbers of message_bytes, expected one for all, or 2"),
        ({"activation_bytes": -1}, "activation_bytes is -1"),
    ],
)
def test_what_cannot_be_simulated(options, message):
    with pytest.raises(InvalidArgument, match=message):
        simulate(build("gpipe", ranks=3, microbatches=2), **{"costs": Costs(1, 1), **options})


def test_wrong_schedules_are_refused():
    with pytest.raises(ScheduleError, match="rank 0, action 0"):
        simulate(read_schedule("0B0 0F0"), Costs(1, 1))
