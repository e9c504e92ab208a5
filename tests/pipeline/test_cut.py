"""Cuts are optimal: equal to trying every cut, counted layer by layer by code that shares nothing with the search."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paracomm.errors import InvalidArgument
from paracomm.pipeline.cut import cut, cut_evenly, rank_seconds


def seconds_of(costs, starts, placement, speeds, boundary, tied):
    """Layer by layer: what each rank takes."""
    where = [placement[sum(start <= layer for start in starts) - 1] for layer in range(len(costs))]
    found = [0.0] * len(speeds)
    for layer, rank in enumerate(where):
        found[rank] += costs[layer] / speeds[rank]
        if layer + 1 < len(where) and where[layer + 1] != rank:
            found[rank] += boundary[layer]
            found[where[layer + 1]] += boundary[layer]
    for a, b, paid in tied:
        if where[a] != where[b]:
            found[where[a]] += paid
            found[where[b]] += paid
    return found


def fits(starts, placement, memory, limit):
    layers = len(memory[0])
    held = [0.0] * len(limit)
    for layer in range(layers):
        stage = sum(start <= layer for start in starts) - 1
        held[placement[stage]] += memory[stage][layer]
    return all(have <= may for have, may in zip(held, limit, strict=True))


def every_cut(layers, stages):
    return ([0, *rest] for rest in itertools.combinations(range(1, layers), stages - 1))


def merit(seconds):
    return max(seconds), sum(s * s for s in seconds)


def expect_best(found, every):
    """`found` is as fast as any, and as flat as any of those; sums in another order may differ by rounding."""
    fastest = min(max(seconds) for seconds in every)
    flattest = min(merit(seconds)[1] for seconds in every if max(seconds) <= fastest * (1 + 1e-14))
    assert merit(found)[0] <= fastest * (1 + 1e-9)
    assert merit(found)[1] <= flattest * (1 + 1e-9)


NUMBERS = st.one_of(st.integers(0, 4).map(float), st.floats(0, 5, allow_subnormal=False))


@st.composite
def problems(draw, one_stage_each=False):
    layers = draw(st.integers(1, 8))
    stages = draw(st.integers(1, layers))
    ranks = stages if one_stage_each else draw(st.integers(1, stages))
    rest = [draw(st.integers(0, ranks - 1)) for _ in range(stages - ranks)]
    placement = draw(st.permutations([*range(ranks), *rest]))
    layer = st.integers(0, layers - 1)
    return {
        "costs": [draw(NUMBERS) for _ in range(layers)],
        "placement": placement,
        "speeds": [draw(st.sampled_from([1.0, 0.5, 2.0, 0.7])) for _ in range(ranks)],
        "boundary": [draw(NUMBERS) / 4 for _ in range(layers)],
        "tied": draw(st.lists(st.tuples(layer, layer, NUMBERS), max_size=2)),
    }


@settings(deadline=None, max_examples=150)
@given(problems())
def test_equal_to_trying_every_cut(problem):
    costs, placement = problem["costs"], problem["placement"]
    rest = {key: problem[key] for key in ("placement", "speeds", "boundary", "tied")}
    found = cut(costs, len(placement), **rest)
    every = [seconds_of(costs, starts, **rest) for starts in every_cut(len(costs), len(placement))]
    expect_best(seconds_of(costs, found, **rest), every)
    assert rank_seconds(costs, found, **rest) == pytest.approx(seconds_of(costs, found, **rest), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(problems(), st.data())
def test_memory_is_kept_and_the_rest_still_optimal(problem, data):
    costs, placement = problem["costs"], problem["placement"]
    layers, stages, ranks = len(costs), len(placement), len(problem["speeds"])
    rest = {key: problem[key] for key in ("placement", "speeds", "boundary", "tied")}
    memory = [[data.draw(st.integers(0, 9)) for _ in range(layers)] for _ in range(stages)]
    limit = [data.draw(st.integers(0, 30)) for _ in range(ranks)]
    allowed = [starts for starts in every_cut(layers, stages) if fits(starts, placement, memory, limit)]
    if not allowed:
        with pytest.raises(InvalidArgument, match="found no cut"):
            cut(costs, stages, memory=memory, limit=limit, **rest)
        return
    found = cut(costs, stages, memory=memory, limit=limit, **rest)
    assert fits(found, placement, memory, limit)
    expect_best(seconds_of(costs, found, **rest), [seconds_of(costs, starts, **rest) for starts in allowed])


@settings(deadline=None, max_examples=50)
@given(problems(one_stage_each=True), st.floats(1e-6, 1e6))
def test_units_do_not_matter(problem, unit):
    costs, placement, speeds = problem["costs"], problem["placement"], problem["speeds"]
    found = cut(costs, len(placement), speeds=speeds, placement=placement)
    scaled = cut([cost * unit for cost in costs], len(placement), speeds=speeds, placement=placement)
    both = [max(rank_seconds(costs, starts, speeds=speeds, placement=placement)) for starts in (found, scaled)]
    assert both[0] == pytest.approx(both[1], rel=1e-9)


def test_one_stage_a_rank_of_a_deep_model_is_the_classical_answer():
    """Against the shortest possible time, found by filling stages greedily for every sum of neighbours."""
    costs = [((7 * i * i + 3 * i) % 11 + 1) / 4 for i in range(60)]
    sums = {sum(costs[a:b]) for a in range(60) for b in range(a + 1, 61)}

    def stages_within(most):
        count, filled = 1, 0.0
        for cost in costs:
            if filled + cost > most:
                count, filled = count + 1, 0.0
            filled += cost
        return count

    for stages in (2, 5, 16):
        least = min(s for s in sums if s >= max(costs) and stages_within(s) <= stages)
        assert max(rank_seconds(costs, cut(costs, stages))) == pytest.approx(least)


@pytest.mark.parametrize(
    "placement",
    [[0, 1, 2, 3] * 2, [0, 1, 2, 3, 3, 2, 1, 0], [0, 1, 2, 3] * 4],
    ids=["interleaved", "vee", "four stages a rank"],
)
def test_many_layers_on_several_stages_a_rank_come_close(placement):
    """24 layers that are alike between a small embedding and a large head, as a Transformer has them."""
    costs = [0.3] + [1 + 0.01 * ((13 * i) % 7) for i in range(24)] + [3.0]
    found = rank_seconds(costs, cut(costs, len(placement), placement=placement), placement=placement)
    # Whole layers cannot be had in parts: within one layer of all ranks being equal.
    assert sum(costs) / 4 <= max(found) < sum(costs) / 4 + 0.5
    assert max(found) < max(rank_seconds(costs, cut_evenly(len(costs), len(placement)), placement=placement))


def test_a_heavy_head_gets_a_rank_of_its_own():
    assert cut([1, 1, 1, 1, 1, 1, 6], 2) == [0, 6]
    assert cut_evenly(7, 2) == [0, 4]
    assert cut([1] * 12, 2, speeds=[1, 0.5]) == [0, 8]
    assert cut([1] * 6, 2, boundary=[0, 9, 9, 9, 9, 9]) == [0, 1]
    assert cut([1, 1, 1, 1], 2, memory=[5, 1, 1, 1], limit=6) == [0, 2]
    assert cut([1, 1, 1, 1], 2, memory=[5, 1, 1, 1], limit=5) == [0, 1]


def test_twins_share_a_rank_where_it_pays():
    costs, placement = [2.0, 1, 1, 1, 1, 2], [0, 1, 0, 1]
    free = cut(costs, 4, placement=placement)
    paid = cut(costs, 4, placement=placement, tied=[(0, 4, 10.0)])

    def rank_of(layer, starts):
        return placement[sum(start <= layer for start in starts) - 1]

    assert rank_of(0, paid) == rank_of(4, paid)
    assert max(rank_seconds(costs, paid, placement=placement)) >= max(rank_seconds(costs, free, placement=placement))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": 4}, "3 layers in 4 stages"),
        ({"stages": 0}, "3 layers in 0 stages"),
        ({"costs": [1, -1, 1]}, "costs"),
        ({"costs": [1, math.nan, 1]}, "costs"),
        ({"speeds": [1]}, "speeds"),
        ({"speeds": [1, 0]}, "more than 0"),
        ({"boundary": [1, 1]}, "boundary"),
        ({"placement": [0, 2]}, "none left out"),
        ({"placement": [0]}, "placement"),
        ({"memory": [1, 1, 1]}, "go together"),
        ({"limit": 4}, "go together"),
        ({"memory": [1, 1], "limit": 4}, "memory"),
        ({"memory": [[1, 1, 1]], "limit": 4}, "1 rows"),
        ({"memory": [1, 1, 1], "limit": 1}, "found no cut"),
        ({"memory": [1, 1, 1], "limit": [4]}, "limit"),
        ({"tied": [(0, 3, 1.0)]}, "tied"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(InvalidArgument, match=message):
        cut(**{"costs": [1, 1, 1], "stages": 2, **change})


@pytest.mark.parametrize("starts", [[], [1], [0, 0], [0, 3], [0, 2, 1]])
def test_seconds_of_no_cut_are_refused(starts):
    with pytest.raises(InvalidArgument, match="stages begin at"):
        rank_seconds([1, 1, 1], starts)
