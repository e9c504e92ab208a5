"""The schedules. Every one of them takes the microbatches of a stage in rising order, in each kind of action, so that
gradients add up in the same order whatever the schedule; for that reason, too, no whole backward of a stage comes
between a B and its W.

In the docstrings p is ranks, v stages a rank, m microbatches, r a rank; f, b, w the seconds of one stage's actions for
one microbatch, b without w. The bubble is the idle share of a step. tests/pipeline/test_simulate.py holds every
schedule to the times and peaks stated here. Where m is too small for a V it is written for more microbatches, and the
surplus is left out: a right schedule without some of its microbatches is right, since none waits for another one.
"""

from __future__ import annotations

from collections import Counter, deque
from itertools import pairwise

from paracomm.pipeline.action import BACKWARD, FORWARD, WEIGHT, Action
from paracomm.pipeline.registry import pipeline_schedule, vee


@pipeline_schedule("gpipe")
def gpipe(ranks: int, stages: int, microbatches: int) -> list[list[Action]]:
    """All forward, then all backward (Huang et al., "GPipe", NeurIPS 2019).

    Bubble (p - 1) / (m + p - 1) of a step; a rank keeps the activations of m microbatches.
    """
    return [
        [Action(rank, kind, m) for kind in (FORWARD, BACKWARD) for m in range(microbatches)] for rank in range(ranks)
    ]


@pipeline_schedule("1f1b")
def one_forward_one_backward(ranks: int, stages: int, microbatches: int) -> list[list[Action]]:
    """A backward as soon as there can be one (Narayanan et al., "PipeDream", SOSP 2019; its flushed form, SC 2021).

    The bubble of gpipe; rank r keeps the activations of min(m, p - r) microbatches.
    """
    program = []
    for rank in range(ranks):
        forward = [Action(rank, FORWARD, m) for m in range(microbatches)]
        backward = [Action(rank, BACKWARD, m) for m in range(microbatches)]
        program.append(_alternate(forward, backward, ahead=ranks - rank - 1))
    return program


@pipeline_schedule("interleaved", stages_per_rank=(2, 8, 2))
def interleaved(ranks: int, stages: int, microbatches: int) -> list[list[Action]]:
    """1F1B with several stages a rank (Narayanan et al., "Efficient large-scale language model training", SC 2021).

    Microbatches go in rounds of p: all of a round through a rank's first stage, then through its second, ...; backward
    the other way. Ahead of the first backward are 2 (p - r - 1) + (v - 1) p forwards (Megatron-LM's warm-up).

    Bubble (p - 1) / (v m + p - 1) if m >= p. Where p does not divide m, rounds are longer, up to 2 p - 1, which costs
    memory and no time; with m < p the step takes as long as v p + m - 1 microbatches on a stage do. A rank keeps
    min(v m, 2 (p - r - 1) + (v - 1) round + 1) activations of a stage.
    """
    each = stages // ranks
    rounds = _rounds(ranks, microbatches)
    longest = max(map(len, rounds))
    program = []
    for rank in range(ranks):
        mine = [rank + ranks * chunk for chunk in range(each)]
        forward = [Action(stage, FORWARD, m) for group in rounds for stage in mine for m in group]
        backward = [Action(stage, BACKWARD, m) for group in rounds for stage in reversed(mine) for m in group]
        program.append(_alternate(forward, backward, ahead=2 * (ranks - rank - 1) + (each - 1) * longest))
    return program


@pipeline_schedule("zb-h1")
def zero_bubble_h1(ranks: int, stages: int, microbatches: int) -> list[list[Action]]:
    """1F1B with W after its B by r microbatches (Qi et al., "Zero bubble pipeline parallelism", ICLR 2024, ZB-H1).

    At the end, when 1F1B waits for gradients, a rank has weights left to do. Idle for (p - 1) (f + b - w), if w is
    at most f and b, and m >= p; every rank keeps min(m, p) activations until their W, as many as 1F1B's first rank.
    """
    program = []
    for rank in range(ranks):
        mine = []
        for action in _alternate(
            [Action(rank, FORWARD, m) for m in range(microbatches)],
            [Action(rank, BACKWARD, m) for m in range(microbatches)],
            ahead=ranks - rank - 1,
        ):
            mine.append(action)
            if action.kind == BACKWARD and action.microbatch >= rank:
                mine.append(Action(rank, WEIGHT, action.microbatch - rank))
        mine += [Action(rank, WEIGHT, m) for m in range(max(0, microbatches - rank), microbatches)]
        program.append(mine)
    return program


@pipeline_schedule("zbv", placement=vee, stages_per_rank=(2, 2, 2))
def zero_bubble_v(ranks: int, stages: int, microbatches: int) -> list[list[Action]]:
    """Down the ranks and up again (Qi et al., "Zero bubble pipeline parallelism", ICLR 2024, ZB-V; "Pipeline
    parallelism with controllable memory", NeurIPS 2024, V-ZB).

    The first rank has the loss too, so that backward begins early on it. With f = b = w and m >= 2 p no rank is idle
    between its first action and its last one; the step takes (p - 1) f longer, by which the last rank begins later.
    A rank keeps at most min(2 m, 2 p) activations of a stage, each about half of one of 1F1B's; 2 p if m >= 2 p.
    """
    written = max(microbatches, 2 * ranks)
    program = []
    for rank in range(ranks):
        after = ranks - rank - 1
        phases = [
            (2 * after + 1, "F0"),
            (rank, "F1 F0"),
            (after + 1, "F1 b1 W"),
            (written - 2 * ranks + rank + 1, "F0 b0 W F1 b1 W"),
            (after, "b0 W F1 b1 W"),
            (rank, "b0 b1"),
            (after + 1, "b0 W"),
            (2 * rank, "W"),
        ]
        program.append(_vee_actions(phases, (rank, stages - 1 - rank), microbatches))
    return program


@pipeline_schedule("dualpipev", placement=vee, stages_per_rank=(2, 2, 2))
def dual_pipe_v(ranks: int, stages: int, microbatches: int) -> list[list[Action]]:
    """As zbv, but backward is whole wherever nobody waits for it (DeepSeek-AI, "DeepSeek-V3 technical report", 2024,
    DualPipe; its V form cut in half, from DeepSeek's DualPipe repository).

    There a forward and a backward that are neighbours in the middle run as one, to hide the communication of experts,
    and ranks are idle for (p - 1) (f + 2 b - w) if that hides nothing. Here they run one after the other, so that the
    results of the first leave earlier: idle for (p - 1) (f + b - w), if f = b >= w and m >= 2 p. A rank keeps at most
    min(2 m, 2 p + 1) activations of a stage.
    """
    written = max(microbatches, 2 * ranks)
    program = []
    for rank in range(ranks):
        after = ranks - rank - 1
        phases = [
            (2 * after, "F0"),
            (rank + 1, "F0 F1"),
            (after, "b1 W F1"),
            (written - 2 * ranks + rank + 1, "F0 B1 F1 B0"),
            (after, "B1 F1 B0"),
            ((rank + 1) // 2, "B1 B0"),
            ((rank + 1) % 2, "B1 b0"),
            ((rank + 1) // 2, "b1 b0"),
            (after, "W b0"),
            (rank + 1, "W"),
        ]
        program.append(_vee_actions(phases, (rank, stages - 1 - rank), microbatches))
    return program


def _alternate(forward: list[Action], backward: list[Action], ahead: int) -> list[Action]:
    """`ahead` forwards, then one forward and one backward in turn, then the backwards that are left."""
    ahead = min(ahead, len(forward))
    mine = forward[:ahead]
    for index, action in enumerate(backward):
        mine += [*forward[ahead + index : ahead + index + 1], action]
    return mine


def _rounds(ranks: int, microbatches: int) -> list[range]:
    """As many as there are whole rounds of `ranks` microbatches, and at least one."""
    count = max(1, microbatches // ranks)
    edges = [microbatches * index // count for index in range(count + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


def _vee_actions(phases: list[tuple[int, str]], stages: tuple[int, int], microbatches: int) -> list[Action]:
    """A rank's actions, of phases (times, what).

    F0 and F1 are the next forward of its first and of its second stage, B0 and B1 the next whole backward, b0 and b1
    the next one without weights, W the weights that have waited longest. Microbatches past the last one are left out.
    """
    mine: list[Action] = []
    taken: Counter[tuple[int, str]] = Counter()
    waiting: deque[Action] = deque()
    for token in (token for times, what in phases for token in what.split() * times):
        if token == WEIGHT:
            mine.append(waiting.popleft())
            continue
        stage, kind = stages[int(token[1])], token[0].upper()
        microbatch = taken[stage, kind]
        taken[stage, kind] += 1
        mine.append(Action(stage, kind, microbatch))
        if token[0] == "b":
            waiting.append(Action(stage, WEIGHT, microbatch))
    return [action for action in mine if action.microbatch < microbatches]
