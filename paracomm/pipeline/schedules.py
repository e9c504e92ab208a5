"""The schedules. Every one of them takes the microbatches of a stage in rising order, in each kind of action, so that
gradients add up in the same order whatever the schedule."""

from __future__ import annotations

from paracomm.pipeline.action import BACKWARD, FORWARD, Action
from paracomm.pipeline.registry import pipeline_schedule


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
        ahead = min(microbatches, ranks - rank - 1)
        mine = [Action(rank, FORWARD, m) for m in range(ahead)]
        for m in range(microbatches - ahead):
            mine += [Action(rank, FORWARD, ahead + m), Action(rank, BACKWARD, m)]
        mine += [Action(rank, BACKWARD, m) for m in range(microbatches - ahead, microbatches)]
        program.append(mine)
    return program
