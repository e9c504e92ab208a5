"""What verify() must refuse, and what it must let pass, told apart by an oracle that shares no code with it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from paracomm.errors import InvalidArgument, ScheduleError
from paracomm.pipeline import SCHEDULES, Action, Fault, build, faults, read_schedule, verify
from paracomm.pipeline import replay as replaying
from paracomm.pipeline.memory import peaks


def right(schedule, memory=None):
    """The oracle: plays the schedule, a rank after the other, again and again, and then looks at what was played."""
    last, ms = schedule.stages - 1, range(schedule.microbatches)
    given = [action for mine in schedule.ranks for action in mine]
    demanded = {(stage, kind, m) for stage in range(last + 1) for kind in "FB" for m in ms}
    allowed = demanded | {(stage, "W", m) for stage in range(last + 1) for m in ms}
    if len(given) != len(set(given)) or not demanded <= set(given) <= allowed:
        return False
    if any(schedule.placement[action.stage] != rank for rank, mine in enumerate(schedule.ranks) for action in mine):
        return False
    played, left = [], [list(mine) for mine in schedule.ranks]
    for _ in given:
        for mine in left:
            while mine and needed(*mine[0], last) <= set(played):
                played.append(mine.pop(0))
    if any(left):
        return False
    split = {(stage, m) for stage, kind, m in given if kind == "W"}
    for stage in range(last + 1):
        of = [action for action in played if action.stage == stage]
        gradients = [
            a.microbatch for a in of if a.kind == "W" or (a.kind == "B" and (stage, a.microbatch) not in split)
        ]
        for order in (gradients, *([a.microbatch for a in of if a.kind == kind] for kind in "FBW")):
            if order != sorted(order):
                return False
    for rank, limit in enumerate(memory or ()):
        held = set()
        for stage, kind, m in schedule.ranks[rank]:
            held |= {(stage, m)} if kind == "F" else set()
            if len(held) > limit:
                return False
            held -= {(stage, m)} if kind == "W" or (kind == "B" and (stage, m) not in split) else set()
    return True


def needed(stage, kind, m, last):
    if kind == "F":
        return {(stage - 1, "F", m)} if stage > 0 else set()
    if kind == "W":
        return {(stage, "B", m)}
    return {(stage, "F", m), (stage + 1, "B", m)} if stage < last else {(stage, "F", m)}


# What damages a schedule: (draw, ranks, schedule) changes the lists `ranks`; what comes of it may still be right.


def drop(draw, ranks, schedule):
    mine = draw.choice([mine for mine in ranks if mine])
    mine.pop(draw.randrange(len(mine)))


def double(draw, ranks, schedule):
    mine = draw.choice(ranks)
    mine.insert(draw.randrange(len(mine) + 1), draw.choice(mine))


def swap(draw, ranks, schedule):
    mine = draw.choice(ranks)
    a, b = (draw.randrange(len(mine)) for _ in range(2))
    mine[a], mine[b] = mine[b], mine[a]


def move(draw, ranks, schedule):
    mine, other = draw.choice(ranks), draw.choice(ranks)
    action = mine.pop(draw.randrange(len(mine)))
    other.insert(draw.randrange(len(other) + 1), action)


def rename(draw, ranks, schedule, **changes):
    mine = draw.choice(ranks)
    at = draw.randrange(len(mine))
    mine[at] = mine[at]._replace(**{name: draw.choice(values) for name, values in changes.items()})


def kind(draw, ranks, schedule):
    rename(draw, ranks, schedule, kind="FBWX")


def microbatch(draw, ranks, schedule):
    rename(draw, ranks, schedule, microbatch=range(-1, schedule.microbatches + 1))


def stage(draw, ranks, schedule):
    rename(draw, ranks, schedule, stage=range(-1, schedule.stages + 1))


def exchange(draw, ranks, schedule, first, second):
    """`second` of a microbatch and stage comes where its `first` was, and the other way round."""
    mine = draw.choice(ranks)
    pairs = [(a, a._replace(kind=second)) for a in mine if a.kind == first and a._replace(kind=second) in mine]
    if pairs:
        a, b = map(mine.index, draw.choice(pairs))
        mine[a], mine[b] = mine[b], mine[a]


def backward_first(draw, ranks, schedule):
    exchange(draw, ranks, schedule, "F", "B")


def weights_first(draw, ranks, schedule):
    exchange(draw, ranks, schedule, "B", "W")


def order(draw, ranks, schedule):
    """Two microbatches of one stage change places everywhere on its rank: only their order is wrong."""
    if schedule.microbatches > 1:
        a, b = draw.sample(range(schedule.microbatches), 2)
        new = {a: b, b: a}
        chosen = draw.randrange(schedule.stages)
        mine = ranks[schedule.placement[chosen]]
        mine[:] = [x._replace(microbatch=new.get(x.microbatch, x.microbatch)) if x.stage == chosen else x for x in mine]


def merge(draw, ranks, schedule):
    """A rank's queues in another order that it can see nothing wrong with: a deadlock with its neighbours, or none."""
    mine = draw.choice(ranks)
    queues = [[a for a in mine if (a.stage, a.kind) == pair] for pair in sorted({(a.stage, a.kind) for a in mine})]
    merged = []
    while any(queues):
        queue = draw.choice([queue for queue in queues if queue])
        needed = {"F": "", "B": "F", "W": "B"}[queue[0].kind]
        if not needed or queue[0]._replace(kind=needed) in merged:
            merged.append(queue.pop(0))
    mine[:] = merged


def late(draw, ranks, schedule):
    """One forward waits for a backward that waits for it, over other ranks."""
    mine = draw.choice(ranks)
    at = draw.randrange(len(mine))
    mine.insert(draw.randrange(at, len(mine)), mine.pop(at))


DAMAGES = [drop, double, swap, move, kind, microbatch, stage, backward_first, weights_first, order, merge, late]
ROUNDS = 80


def damaged(damage, seed):
    draw = random.Random(f"{damage.__name__} {seed}")
    name = draw.choice(list(SCHEDULES))
    schedule = build(name, ranks=draw.randint(1, 5), microbatches=draw.randint(1, 7))
    ranks = [list(mine) for mine in schedule.ranks]
    damage(draw, ranks, schedule)
    return replace(schedule, ranks=tuple(map(tuple, ranks)))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_refused_and_nothing_else(damage):
    refused = 0
    for seed in range(ROUNDS):
        schedule = damaged(damage, seed)
        found = faults(schedule)
        assert (not found) == right(schedule), f"{schedule}\n{[*map(str, found)]}"
        refused += bool(found)
        for fault in found:
            if fault.position is not None:
                assert schedule.ranks[fault.rank][fault.position] == fault.action
                assert str(fault).startswith(f"rank {fault.rank}, action {fault.position} ({fault.action}): ")
        if found:
            with pytest.raises(ScheduleError) as caught:
                verify(schedule)
            assert str(found[0]) in str(caught.value)
    assert refused >= 0.4 * ROUNDS, "too few of them are wrong to say anything"


def test_too_little_memory_is_refused_and_nothing_else():
    refused = 0
    for seed in range(150):
        draw = random.Random(seed)
        schedule = build(draw.choice(list(SCHEDULES)), ranks=draw.randint(1, 6), microbatches=draw.randint(1, 8))
        limits = [peak + draw.choice([0, 0, 1, -1]) for peak in peaks(schedule)]
        found = faults(schedule, memory=limits)
        assert (not found) == right(schedule, limits)
        assert [f.rank for f in found] == [
            r for r, (a, b) in enumerate(zip(peaks(schedule), limits, strict=True)) if a > b
        ]
        refused += bool(found)
    assert refused >= 80


def test_at_least_500_different_wrong_schedules_in_all():
    every = {damaged(damage, seed) for damage in DAMAGES for seed in range(ROUNDS)}
    wrong = [schedule for schedule in every if not right(schedule)]
    assert len(wrong) >= 500
    deadlocks = [schedule for schedule in wrong if "deadlock" in faults(schedule)[0].reason]
    assert len(deadlocks) >= 50


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_single_deletion_and_exchange_of_neighbours(name):
    for ranks, microbatches in ((1, 2), (2, 4), (3, 3)):
        schedule = build(name, ranks=ranks, microbatches=microbatches)
        for rank, mine in enumerate(schedule.ranks):
            for at in range(len(mine)):
                without = (*mine[:at], *mine[at + 1 :])
                turned = (*mine[:at], *mine[at : at + 2][::-1], *mine[at + 2 :])
                for changed in (without, turned):
                    other = replace(schedule, ranks=(*schedule.ranks[:rank], changed, *schedule.ranks[rank + 1 :]))
                    assert (not faults(other)) == right(other), str(other)


@pytest.mark.parametrize(
    "text,message",
    [
        ("0F0 0B0\n1B0 1F0", "rank 1, action 0 (1B0): it comes before 1F0, action 1"),
        ("0F0 0W0 0B0\n1F0 1B0", "rank 0, action 1 (0W0): it comes before 0B0, action 2"),
        ("0F0 0B0\n1F0 1B0 0F0", "rank 1, action 2 (0F0): stage 0 is on rank 0"),
        ("0F0 0B0 0F0\n1F0 1B0", "rank 0, action 2 (0F0): a second time, after action 0"),
        ("0F0 0B0\n1F0", "rank 1: 1B0 is missing"),
        ("0F0 0B0 0W0 0W1\n1F0 1B0", "rank 0: 0F1 is missing"),
        ("0F0 0F1 0F2 0B0 0B1 0B2\n1F0 1B0", "rank 1: 1F1 is missing, and 1 more F of stage 1"),
        ("0F0 0F1 0B1 0B0\n1F0 1F1 1B0 1B1", "rank 0, action 3 (0B0): it comes after the B of microbatch 1"),
        ("0F0 0F1 0B0 0B1 0W0", "rank 0, action 4 (0W0): it comes after the weights' gradient of microbatch 1"),
        (
            "0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1",
            "rank 0, action 1 (0B0): deadlock: rank 0 at action 1 (0B0) waits for 1B0 of rank 1, rank 1 at action 1"
            " (1F1) waits for 0F1 of rank 0",
        ),
        ("1F0 1B0 0F0 0B0", "rank 0, action 0 (1F0): deadlock: rank 0 at action 0 (1F0) waits for 0F0 of rank 0"),
    ],
)
def test_the_first_fault_is_named(text, message):
    with pytest.raises(ScheduleError) as caught:
        verify(read_schedule(text, name="mine"))
    assert f"pipeline schedule mine: {message}" in str(caught.value)


def test_faults_of_the_whole():
    good = read_schedule("0F0 0B0\n1F0 1B0")
    verify(good)
    cases = {
        "stage 1 is placed on rank 2, expected 0 to 1": replace(good, placement=(0, 2)),
        "rank 1: no stage is placed on it": replace(good, placement=(0, 0)),
        "0 microbatches, expected at least 1": replace(good, microbatches=0),
        "0 stages, expected at least 1": replace(good, placement=()),
        "0 ranks, expected at least 1": replace(good, ranks=()),
    }
    for message, schedule in cases.items():
        with pytest.raises(ScheduleError, match=message):
            verify(schedule)
    verify(replace(good, placement=(1, 0), ranks=good.ranks[::-1]))


@pytest.mark.parametrize(
    "action,reason",
    [
        (Action(1, "X", 0), "its kind is X, expected one of F, B, W"),
        (Action(2, "F", 0), "its stage is 2, expected 0 to 1"),
        (Action(-1, "F", 0), "its stage is -1, expected 0 to 1"),
        (Action(1, "W", 1), "its microbatch is 1, expected 0 to 0"),
        (Action(1, "W", -1), "its microbatch is -1, expected 0 to 0"),
    ],
)
def test_actions_of_nobody(action, reason):
    good = read_schedule("0F0 0B0\n1F0 1B0")
    assert faults(replace(good, ranks=(good.ranks[0], (*good.ranks[1], action)))) == [Fault(1, 2, reason, action)]


def test_all_faults_are_found_in_order():
    schedule = read_schedule("0F0 0F0 0B0 0B1\n1F0 1B1 1B0", microbatches=2)
    assert [(f.rank, f.position) for f in faults(schedule)] == [(0, 1), (0, None), (1, 2), (1, None)]
    assert faults(schedule)[1] == Fault(0, None, "0F1 is missing")


def test_memory():
    schedule = build("gpipe", ranks=2, microbatches=3)
    verify(schedule, memory=3)
    verify(schedule, memory=[3, 4])
    with pytest.raises(
        ScheduleError, match=r"rank 1, action 2 \(1F2\): the rank keeps 3 activations, expected at most 2"
    ):
        verify(schedule, memory=[3, 2])
    for wrong in (-1, [3], [3, 2.5], [3, 3, 3]):
        with pytest.raises(InvalidArgument, match="expected a number of activations, or one for each of the 2 ranks"):
            verify(schedule, memory=wrong)
    split = read_schedule("0F0 0B0 0F1 0B1 0W0 0W1")
    assert peaks(split) == [2] and faults(split, memory=1)[0].position == 2


def test_a_dropped_weight_means_a_whole_backward():
    verify(read_schedule("0F0 0B0 0W0 0F1 0B1"))
    assert right(read_schedule("0F0 0B0 0W0 0F1 0B1"))


def test_the_work_is_linear_in_the_number_of_actions(monkeypatch):
    calls = 0
    real = replaying.takes

    def counting(action, stages):
        nonlocal calls
        calls += 1
        return real(action, stages)

    monkeypatch.setattr(replaying, "takes", counting)
    for name in SCHEDULES:
        calls = 0
        schedule = build(name, ranks=8, microbatches=100)
        verify(schedule)
        actions = sum(map(len, schedule.ranks))
        assert actions <= calls <= 3 * actions
    # Nor does it follow the numbers that stand in them.
    reasons = [fault.reason for fault in faults(read_schedule("0F0 0F999999999 0B3"))]
    assert reasons[0] == "0F1 is missing, and 999999997 more F of stage 0"
