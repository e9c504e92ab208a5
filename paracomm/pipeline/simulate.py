"""What a schedule costs before anything of it runs: when each action begins and ends, bubbles, and peaks of memory.

A rank does one action after the other. What an action gives to another rank is sent without holding the rank up; it
arrives after the link's latency and its bytes' time, and the messages from one rank to another one follow each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite
from typing import NamedTuple

from paracomm.errors import InvalidArgument
from paracomm.pipeline.action import BACKWARD, FORWARD, WEIGHT, Action, PipelineSchedule
from paracomm.pipeline.memory import kept, peaks
from paracomm.pipeline.replay import replay
from paracomm.pipeline.verify import verify

Each = float | Sequence[float]
"""One number for all, or one for each."""


@dataclass(frozen=True)
class Costs:
    """Seconds of one microbatch on a stage: one number for all stages, or one for each.

    forward: F. backward: the gradient of the inputs, a B that has a W. weight: that of the weights, W.
    whole: a B that has no W; backward + weight if not given.
    """

    forward: Each
    backward: Each
    weight: Each = 0.0
    whole: Each | None = None


@dataclass(frozen=True)
class Link:
    """A message of n bytes takes latency_s + n / bytes_per_s."""

    latency_s: float = 0.0
    bytes_per_s: float = inf


class Span(NamedTuple):
    """An action, when it ran."""

    rank: int
    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """A step as simulated.

    ranks: ranks[rank] are its spans in order; time begins at 0.
    peaks: for each rank, the most activations that it keeps at a time, in units of one stage and microbatch.
    peak_bytes: the same in bytes.
    """

    schedule: PipelineSchedule
    ranks: tuple[tuple[Span, ...], ...]
    peaks: tuple[int, ...]
    peak_bytes: tuple[float, ...]

    @property
    def spans(self) -> tuple[Span, ...]:
        """Of all ranks, rank by rank."""
        return tuple(span for mine in self.ranks for span in mine)

    @cached_property
    def step_s(self) -> float:
        return max(mine[-1].end_s for mine in self.ranks)

    @cached_property
    def busy_s(self) -> tuple[float, ...]:
        """For each rank."""
        return tuple(sum(span.end_s - span.start_s for span in mine) for mine in self.ranks)

    @property
    def bubbles(self) -> tuple[float, ...]:
        """For each rank, the share of the step in which it is idle, 0 to 1."""
        return tuple(1 - busy / self.step_s if self.step_s else 0.0 for busy in self.busy_s)

    @property
    def bubble(self) -> float:
        """The share of the step in which a rank is idle, on average over the ranks."""
        return sum(self.bubbles) / len(self.bubbles)

    @property
    def bubble_within(self) -> float:
        """Idle share of the rank that takes longest from its first action to its last one.

        What Qi et al. (ICLR 2024) call bubble: ranks that begin later may end later, into the next step.
        """
        longest, busy = max(
            (mine[-1].end_s - mine[0].start_s, busy) for mine, busy in zip(self.ranks, self.busy_s, strict=True)
        )
        return 1 - busy / longest if longest else 0.0


def simulate(
    schedule: PipelineSchedule,
    costs: Costs,
    *,
    links: Link | Mapping[tuple[int, int], Link] = Link(),
    message_bytes: Each = 0.0,
    activation_bytes: Each = 0.0,
) -> Timeline:
    """When everything of a step runs.

    Args:
        links: of all pairs of ranks, or by (from, to).
        message_bytes: what stage s gives to s + 1, which is also what it gets back: one number, or stages - 1 of them.
        activation_bytes: kept of a microbatch by a stage: one number, or one for each.

    Raises ScheduleError for a schedule that is wrong, see verify(), and InvalidArgument for costs that are negative,
    infinite or too few, and for a pair of ranks that has no link.
    """
    verify(schedule)
    seconds = _seconds(schedule, costs)
    message = _each(message_bytes, schedule.stages - 1, "message_bytes")
    placement = schedule.placement
    spans: list[list[Span]] = [[] for _ in schedule.ranks]
    arrived: dict[Action, float] = {}
    sent: defaultdict[tuple[int, int], float] = defaultdict(float)

    def visit(rank: int, action: Action) -> None:
        stage, kind, microbatch = action
        mine = spans[rank]
        start = max(mine[-1].end_s if mine else 0.0, arrived.pop(action, 0.0))
        whole = kind == BACKWARD and (stage, microbatch) not in schedule.split
        end = start + seconds["whole" if whole else kind][stage]
        mine.append(Span(rank, action, start, end))
        following = {FORWARD: stage + 1, BACKWARD: stage - 1}.get(kind, -1)
        if 0 <= following < schedule.stages:
            pair = (rank, placement[following])
            if pair[0] != pair[1]:
                link = _link(links, pair)
                sent[pair] = max(sent[pair], end) + message[min(stage, following)] / link.bytes_per_s
                end = sent[pair] + link.latency_s
            arrived[Action(following, kind, microbatch)] = end

    replay(schedule, visit)
    sizes = _each(activation_bytes, schedule.stages, "activation_bytes")
    peak_bytes = tuple(max(history) for history in kept(schedule, sizes))
    return Timeline(schedule, tuple(map(tuple, spans)), tuple(peaks(schedule)), peak_bytes)


def _seconds(schedule: PipelineSchedule, costs: Costs) -> dict[str, list[float]]:
    """Of each stage, by F, B, W and "whole"."""
    stages = schedule.stages
    seconds = {
        FORWARD: _each(costs.forward, stages, "forward"),
        BACKWARD: _each(costs.backward, stages, "backward"),
        WEIGHT: _each(costs.weight, stages, "weight"),
    }
    both = [b + w for b, w in zip(seconds[BACKWARD], seconds[WEIGHT], strict=True)]
    return {**seconds, "whole": both if costs.whole is None else _each(costs.whole, stages, "whole")}


def _each(numbers: Each, count: int, name: str) -> list[float]:
    found = [float(numbers)] * count if isinstance(numbers, (int, float)) else [float(number) for number in numbers]
    if len(found) != count:
        raise InvalidArgument(f"pipeline: {len(found)} numbers of {name}, expected one for all, or {count}")
    if not all(isfinite(number) and number >= 0 for number in found):
        raise InvalidArgument(f"pipeline: {name} is {numbers}, expected 0 or more, and finite")
    return found


def _link(links: Link | Mapping[tuple[int, int], Link], pair: tuple[int, int]) -> Link:
    link = links if isinstance(links, Link) else links.get(pair)
    if link is None:
        raise InvalidArgument(f"pipeline: there is no link from rank {pair[0]} to rank {pair[1]}, which sends to it")
    if not (link.latency_s >= 0 and isfinite(link.latency_s) and link.bytes_per_s > 0):
        raise InvalidArgument(f"pipeline: {link}, expected a finite latency, 0 or more, and a rate above 0")
    return link
