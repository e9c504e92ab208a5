"""What a pipeline schedule is made of.

Of stage 2 and microbatch 0:

    2F0    forward: takes the activations of stage 1, gives them to stage 3
    2B0    backward: takes the gradient of its outputs, gives that of its inputs; that of its weights too, unless
    2W0    follows: the gradient of the weights, which nobody waits for

(Qi et al., "Zero bubble pipeline parallelism", ICLR 2024, for the third.) A stage is a run of a model's layers. A
rank has one stage or several; it runs its list of actions in order, each as soon as what it takes is there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from paracomm.errors import InvalidArgument

FORWARD, BACKWARD, WEIGHT = "F", "B", "W"
KINDS = (FORWARD, BACKWARD, WEIGHT)
_FORM = re.compile(r"(\d+)([FBW])(\d+)")


class Action(NamedTuple):
    """`kind` (F, B or W) of one microbatch on one stage."""

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Of "2F0". Raises InvalidArgument for another form."""
        found = _FORM.fullmatch(text.strip())
        if found is None:
            raise InvalidArgument(f"'{text}' is no pipeline action, expected a stage, F, B or W, and a microbatch: 2F0")
        return cls(int(found[1]), found[2], int(found[3]))


def actions(text: str) -> tuple[Action, ...]:
    """Of "0F0 0F1 0B0 0B1"."""
    return tuple(map(Action.parse, text.split()))


@dataclass(frozen=True)
class PipelineSchedule:
    """Who runs which action when.

    name: of the function that wrote it. microbatches: of a step.
    placement: placement[stage] is the rank that has the stage.
    ranks: ranks[rank] are its actions in order.
    """

    name: str
    microbatches: int
    placement: tuple[int, ...]
    ranks: tuple[tuple[Action, ...], ...]

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @property
    def stages(self) -> int:
        return len(self.placement)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """In rising order."""
        return tuple(stage for stage, owner in enumerate(self.placement) if owner == rank)

    @cached_property
    def split(self) -> frozenset[tuple[int, int]]:
        """The (stage, microbatch) whose backward is in two actions, B and W."""
        return frozenset((a.stage, a.microbatch) for mine in self.ranks for a in mine if a.kind == WEIGHT)

    def __str__(self) -> str:
        """A line a rank: "0F0 0F1 0B0 0B1"."""
        return "\n".join(" ".join(map(str, mine)) for mine in self.ranks)


def read_schedule(
    text: str, name: str = "read", placement: Sequence[int] | None = None, microbatches: int | None = None
) -> PipelineSchedule:
    """Of lines of actions, a line a rank, as str() gives them. It is not checked: see verify().

    What is not given is taken from the actions: a stage is on the first rank that has an action of it.
    """
    ranks = tuple(actions(line) for line in text.strip().splitlines())
    everything = [(rank, action) for rank, mine in enumerate(ranks) for action in mine]
    if placement is None:
        owner: dict[int, int] = {}
        for rank, action in everything:
            owner.setdefault(action.stage, rank)
        if max(owner, default=0) >= len(everything):
            raise InvalidArgument(
                f"pipeline: stage {max(owner)} in a schedule of {len(everything)} actions, a typing error?"
            )
        placement = [owner.get(stage, 0) for stage in range(max(owner, default=-1) + 1)]
    if microbatches is None:
        microbatches = max((action.microbatch for _, action in everything), default=-1) + 1
    return PipelineSchedule(name, microbatches, tuple(placement), ranks)
