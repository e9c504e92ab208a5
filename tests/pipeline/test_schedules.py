"""Every schedule of the registry: right for any numbers, in the promised order, and what it was."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from paracomm.errors import InvalidArgument
from paracomm.pipeline import SCHEDULES, Action, PipelineSchedule, build, pipeline_schedule, read_schedule, verify
from paracomm.pipeline.registry import check, loop, vee

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "pipeline"


def depths(name):
    least, most, _ = SCHEDULES[name].stages_per_rank
    return sorted({least, min(least + 1, most), most})


@pytest.mark.parametrize("name", SCHEDULES)
def test_right_for_ranks_1_to_8_and_microbatches_1_to_24(name):
    for ranks in range(1, 9):
        for microbatches in range(1, 25):
            for each in depths(name):
                schedule = build(name, ranks=ranks, microbatches=microbatches, stages_per_rank=each)
                verify(schedule)
                assert schedule.world_size == ranks and schedule.stages == each * ranks
                assert {len(schedule.stages_of(rank)) for rank in range(ranks)} == {each}
                count = sum(map(len, schedule.ranks))
                assert count == 2 * schedule.stages * microbatches + len(schedule.split)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks,microbatches", [(64, 70), (33, 7), (1, 200)])
def test_right_for_many(name, ranks, microbatches):
    verify(build(name, ranks=ranks, microbatches=microbatches))


@pytest.mark.parametrize("name", SCHEDULES)
def test_microbatches_rise_in_every_kind_and_in_the_gradients_of_weights(name):
    """What makes the bits of a step equal across schedules; looked at without verify()."""
    for ranks, microbatches in ((1, 3), (2, 7), (4, 8), (5, 3), (4, 21)):
        schedule = build(name, ranks=ranks, microbatches=microbatches)
        for mine in schedule.ranks:
            for stage in {action.stage for action in mine}:
                for kind in "FBW":
                    taken = [a.microbatch for a in mine if (a.stage, a.kind) == (stage, kind)]
                    assert all(a < b for a, b in pairwise(taken))
                weights = [
                    a.microbatch
                    for a in mine
                    if a.stage == stage and (a.kind == "W" or (a.kind == "B" and a[::2] not in schedule.split))
                ]
                assert weights == list(range(microbatches))


@pytest.mark.parametrize("name", SCHEDULES)
def test_messages_of_a_kind_between_two_ranks_are_taken_in_the_order_in_which_they_are_given(name):
    """So activations, and gradients, need no tag. Both over one channel would not do: see zbv."""
    for ranks, microbatches in ((2, 5), (3, 7), (4, 8), (5, 3), (8, 21)):
        schedule = build(name, ranks=ranks, microbatches=microbatches)
        place = {action: (rank, at) for rank, mine in enumerate(schedule.ranks) for at, action in enumerate(mine)}
        taken = {}
        for rank, mine in enumerate(schedule.ranks):
            for stage, kind, m in mine:
                to = place.get(Action(stage + {"F": 1, "B": -1, "W": schedule.stages}[kind], kind, m))
                if to is not None and to[0] != rank:
                    taken.setdefault((rank, to[0], kind), []).append(to[1])
        assert all(order == sorted(order) for order in taken.values())
        assert sum(map(len, taken.values())) > 0


def test_which_backward_is_split():
    for name, split in (("gpipe", 0), ("1f1b", 0), ("interleaved", 0), ("zb-h1", 1), ("zbv", 1)):
        schedule = build(name, ranks=4, microbatches=9)
        assert len(schedule.split) == split * schedule.stages * 9, name
    mixed = build("dualpipev", ranks=4, microbatches=9)
    assert 0 < len(mixed.split) < mixed.stages * 9


@pytest.mark.parametrize("name", SCHEDULES)
def test_dump_is_the_golden_one(name):
    """After a wanted change: python tests/pipeline/test_schedules.py"""
    path = GOLDEN / f"{name}.txt"
    text = path.read_text()
    assert text == dump(name)
    read = read_schedule("\n".join(line for line in text.splitlines() if not line.startswith("#")))
    assert read.ranks == build(name, ranks=4, microbatches=8).ranks
    assert read.placement == build(name, ranks=4, microbatches=8).placement


def test_no_golden_file_is_left_over():
    assert {path.stem for path in GOLDEN.iterdir()} == set(SCHEDULES)


def dump(name):
    return f"# {name}, 4 ranks, 8 microbatches, a line a rank\n{build(name, ranks=4, microbatches=8)}\n"


def test_actions_are_read_and_written():
    assert str(Action(2, "F", 10)) == "2F10" and Action.parse(" 2F10 ") == (2, "F", 10)
    for text in ("F0", "2X0", "2F", "-1F0", "2F0 2F1", ""):
        with pytest.raises(InvalidArgument, match="no pipeline action"):
            Action.parse(text)
    schedule = read_schedule("0F0 0B0 3F0\n1F0 1B0", name="mine")
    assert schedule.placement == (0, 1, 0, 0) and schedule.microbatches == 1 and schedule.name == "mine"
    assert schedule.stages_of(0) == (0, 2, 3)
    assert read_schedule("0F0", placement=[1, 0], microbatches=7).microbatches == 7


def test_places():
    assert [loop(stage, 3) for stage in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [vee(stage, 3) for stage in range(6)] == [0, 1, 2, 2, 1, 0]


@pytest.mark.parametrize(
    "name,numbers,message",
    [
        ("2f2b", {"ranks": 2, "microbatches": 2}, "no schedule is called '2f2b', expected one of gpipe, 1f1b"),
        ("1f1b", {"ranks": 0, "microbatches": 2}, "0 ranks and 2 microbatches, expected at least 1 of each"),
        ("gpipe", {"ranks": 2, "microbatches": 0}, "2 ranks and 0 microbatches"),
        ("1f1b", {"ranks": 2, "microbatches": 2, "stages_per_rank": 2}, "1f1b with 2 stages a rank, expected 1$"),
        ("interleaved", {"ranks": 2, "microbatches": 2, "stages_per_rank": 1}, "1 stages a rank, expected 2 to 8"),
        ("interleaved", {"ranks": 2, "microbatches": 2, "stages_per_rank": 9}, "9 stages a rank, expected 2 to 8"),
        ("zbv", {"ranks": 2, "microbatches": 2, "stages_per_rank": 4}, "zbv with 4 stages a rank, expected 2$"),
    ],
)
def test_what_cannot_be_built(name, numbers, message):
    with pytest.raises(InvalidArgument, match=message):
        build(name, **numbers)


def test_one_line_adds_a_schedule():
    def refuses(ranks, stages, microbatches):
        return "needs an even number of microbatches" if microbatches % 2 else ""

    @pipeline_schedule("pairs", refuses=refuses)
    def pairs(ranks, stages, microbatches):
        order = [f"{kind}{m}" for first in range(0, microbatches, 2) for kind in "FB" for m in (first, first + 1)]
        return [[Action.parse(f"{rank}{each}") for each in order] for rank in range(ranks)]

    try:
        verify(build("pairs", ranks=3, microbatches=4), memory=2)
        with pytest.raises(InvalidArgument, match="pairs: needs an even number"):
            check("pairs", 3, 5)
    finally:
        del SCHEDULES["pairs"]


def test_any_subset_of_microbatches_of_a_right_schedule_is_right():
    """The V schedules rely on it where there are few microbatches."""
    draw = random.Random(5)
    for name in SCHEDULES:
        schedule = build(name, ranks=4, microbatches=12)
        kept = sorted(draw.sample(range(12), 5))
        ranks = tuple(
            tuple(Action(a.stage, a.kind, kept.index(a.microbatch)) for a in mine if a.microbatch in kept)
            for mine in schedule.ranks
        )
        verify(PipelineSchedule(name, 5, schedule.placement, ranks))


if __name__ == "__main__":
    for known in SCHEDULES:
        (GOLDEN / f"{known}.txt").write_text(dump(known))
