"""Where to cut a model into stages, so that the slowest rank of a pipeline is as fast as can be.

In the long run a microbatch takes what the slowest rank takes for it: the sum over the stages that this rank has. The
layers are in a row, and a cut is the first layer of each stage. Partial cuts grow stage by stage:

    s stages, of the first j layers  ->  the seconds of each rank so far, and of the slowest settled one,
                                         which is a rank that gets no more stages

A partial cut is dropped where another one of as many stages and layers is as good in each of these numbers, or where
the ranks cannot take what is left without being slower than in a cut that is known. With one stage a rank every rank is
settled at once, one number is left, and this is the dynamic program of PipeDream (Narayanan et al., SOSP 2019, section
3.1): O(stages x layers^2), exact. With several stages a rank the numbers of partial cuts that none other beats can grow
exponentially (two ranks that take turns have to solve a problem of subset sums); see KEPT for what is exact then.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paracomm.errors import InvalidArgument

Floats = NDArray[np.float64]

KEPT = 1 << 15
"""Partial cuts that are kept, KEPT / (stages x layers) for each number of stages and layers. The result is optimal as
long as no more are left: always with one stage a rank (one is left) and with up to 12 layers (j layers have
comb(j - 1, s - 1) partial cuts of s stages), and often elsewhere. Beyond, the flattest are kept, and the result is the
best cut that was seen."""
ROUNDING = 1e-12


def cut_evenly(layers: int, stages: int) -> list[int]:
    """The first layer of each stage, by the number of layers alone; the first stages get one more if need be.

    Raises InvalidArgument for fewer layers than stages.
    """
    _check_numbers(layers, stages)
    return [stage * (layers // stages) + min(stage, layers % stages) for stage in range(stages)]


def cut(
    costs: Sequence[float],
    stages: int,
    *,
    speeds: Sequence[float] | None = None,
    boundary: Sequence[float] | None = None,
    memory: Sequence[float] | Sequence[Sequence[float]] | None = None,
    limit: float | Sequence[float] | None = None,
    placement: Sequence[int] | None = None,
    tied: Sequence[tuple[int, int, float]] = (),
) -> list[int]:
    """The first layer of each stage. The slowest rank is as fast as can be; among such cuts, the ranks are as equal as
    can be (least sum of squares). Optimal; for many layers on several stages a rank see KEPT.

    Args:
        costs: seconds of each layer for a microbatch, forward and backward, on a rank of speed 1.
        stages: each gets at least one layer.
        speeds: of each rank; 0.5 takes twice the time. None: 1.
        boundary: boundary[i] are the seconds that it takes each of two ranks to hand over what layer i gives, and its
            gradient. Stages that are neighbours on the same rank hand over nothing. The last layer's is not used.
        memory: bytes of each layer; or a list of these for each stage, because an early stage keeps more microbatches.
        limit: bytes that a rank may have, or a list of these. It needs `memory`.
        placement: placement[stage] is the rank. None: rank s has stage s.
        tied: (layer, layer, seconds): what each rank pays, a microbatch, if these layers are on two (a shared weight).

    Raises:
        InvalidArgument: lengths that do not fit together, negative numbers, fewer layers than stages, or no cut that
            keeps `limit`.
    """
    problem = _problem(costs, stages, speeds, boundary, memory, limit, placement, tied)
    known = _improve(problem, cut_evenly(len(costs), stages))
    bound = max(problem.seconds(known)) if problem.fits(known) else math.inf
    fastest = _search(problem, bound, flat=False) or known
    if not problem.fits(fastest):
        raise InvalidArgument(_no_cut(problem))
    fastest = min((_improve(problem, fastest), fastest, known), key=problem.merit)
    flattest = _search(problem, max(problem.seconds(fastest)), flat=True)
    return min((flattest or fastest, fastest), key=lambda starts: problem.merit(starts)[-1])


def rank_seconds(
    costs: Sequence[float],
    starts: Sequence[int],
    *,
    speeds: Sequence[float] | None = None,
    boundary: Sequence[float] | None = None,
    placement: Sequence[int] | None = None,
    tied: Sequence[tuple[int, int, float]] = (),
) -> list[float]:
    """What each rank takes for a microbatch if the stages begin at `starts`; cut() makes the largest of them small."""
    rising = all(a < b for a, b in itertools.pairwise([*starts, len(costs)]))
    if not starts or starts[0] != 0 or not rising:
        raise InvalidArgument(
            f"cut: stages begin at {list(starts)}, expected 0, then rising, below {len(costs)} layers"
        )
    problem = _problem(costs, len(starts), speeds, boundary, None, None, placement, tied)
    return problem.seconds(list(starts))


@dataclass(frozen=True)
class _Problem:
    work: Floats  # seconds of the first i layers, at speed 1
    boundary: Floats  # boundary[i]: a cut before layer i
    memory: Floats  # [stage, i]: bytes of the first i layers
    limit: Floats  # of each rank
    speeds: Floats
    placement: tuple[int, ...]
    tied: tuple[tuple[int, int, float], ...]

    @property
    def layers(self) -> int:
        return len(self.work) - 1

    @property
    def stages(self) -> int:
        return len(self.placement)

    @property
    def ranks(self) -> int:
        return len(self.speeds)

    @cached_property
    def last(self) -> NDArray[np.int64]:
        """Of each rank, its last stage."""
        return np.array([max(s for s, r in enumerate(self.placement) if r == rank) for rank in range(self.ranks)])

    def stage_seconds(self, stage: int, starts: NDArray[np.int64], stop: int) -> Floats:
        """Of the stage of layers start <= i < stop, for each start."""
        found = (self.work[stop] - self.work[starts]) / self.speeds[self.placement[stage]]
        if stage > 0 and self.placement[stage - 1] != self.placement[stage]:
            found += self.boundary[starts]
        if stage + 1 < self.stages and self.placement[stage + 1] != self.placement[stage]:
            found += self.boundary[stop]
        return np.asarray(found, np.float64)

    def seconds(self, starts: list[int]) -> list[float]:
        """Of each rank, summed up in the order of the search."""
        edges, where = np.array([*starts, self.layers]), np.array(self.placement)
        each = np.diff(self.work[edges]) / self.speeds[where]
        paid = np.where(where[1:] != where[:-1], self.boundary[edges[1:-1]], 0.0)
        each[1:] += paid
        each[:-1] += paid
        found = self._by_rank(each)
        for a, b, tie in self.tied:
            pair = {self.placement[int(np.searchsorted(starts, layer, "right")) - 1] for layer in (a, b)}
            for rank in pair if len(pair) == 2 else ():
                found[rank] += tie
        return list(map(float, found))

    def excess(self, starts: list[int]) -> float:
        """Bytes beyond the limits."""
        stages = np.arange(self.stages)
        held = self._by_rank(self.memory[stages, [*starts[1:], self.layers]] - self.memory[stages, starts])
        return float(np.maximum(held - self._lenient_limit, 0.0).sum())

    def _by_rank(self, of_stages: Floats) -> Floats:
        found = np.zeros(self.ranks)
        np.add.at(found, np.array(self.placement), of_stages)
        return found

    @cached_property
    def _lenient_limit(self) -> Floats:
        return self.limit * (1 + ROUNDING)

    def fits(self, starts: list[int]) -> bool:
        return self.excess(starts) == 0.0

    def merit(self, starts: list[int]) -> tuple[float, float, float]:
        """Less is better. The slowest rank is rounded, so that sums in another order do not decide."""
        seconds = self.seconds(starts)
        return self.excess(starts), float(f"{max(seconds):.10e}"), sum(s * s for s in seconds)


def _improve(problem: _Problem, starts: list[int]) -> list[int]:
    """Moves the beginning of one stage at a time by one layer, as long as that makes the cut better."""
    best, merit = starts, problem.merit(starts)
    improved = True
    while improved:
        improved = False
        for stage, step in itertools.product(range(1, problem.stages), (-1, 1)):
            other = list(best)
            other[stage] += step
            if not other[stage - 1] < other[stage] < [*other, problem.layers][stage + 1]:
                continue
            if (found := problem.merit(other)) < merit:
                best, merit, improved = other, found, True
    return best


@dataclass(frozen=True)
class _Partial:
    """Partial cuts of equally many stages, a row each.

    stop: [n] layers that they have. origin: [n] the row, one stage before, that each of them extends.
    settled: [n] of the ranks that get no more: the slowest, or the sum of squares.
    seconds, bytes: [n, ranks] so far; 0 of settled ranks.
    twin: [n, tied] the rank of the first of two tied layers while the second has none; -1 else.
    """

    stop: NDArray[np.int64]
    origin: NDArray[np.int64]
    settled: Floats
    seconds: Floats
    bytes: Floats
    twin: NDArray[np.int64]

    def rows(self, which: NDArray[Any]) -> _Partial:
        return _Partial(*(column[which] for column in vars(self).values()))


def _search(problem: _Problem, bound: float, flat: bool) -> list[int] | None:
    """The fastest cut, none of whose ranks takes more than `bound`, or the flattest of these; None if there is none."""
    ranks, ties = problem.ranks, len(problem.tied)
    zero = np.zeros(1, np.int64)
    rows = _Partial(
        zero, zero, np.zeros(1), np.zeros((1, ranks)), np.zeros((1, ranks)), np.full((1, ties), -1, np.int64)
    )
    history = []
    for stage in range(problem.stages):
        latest = problem.layers - (problem.stages - 1 - stage)
        earliest = latest if stage + 1 == problem.stages else stage + 1
        grown = [_grow(problem, rows, stage, stop, bound, flat) for stop in range(earliest, latest + 1)]
        rows = _Partial(*(np.concatenate(columns) for columns in zip(*(vars(g).values() for g in grown), strict=True)))
        if not len(rows.stop):
            return None
        history.append(rows)
    row = int(np.argmin(rows.settled))
    starts = []
    for rows, earlier in zip(reversed(history[1:]), reversed(history[:-1]), strict=True):
        row = int(rows.origin[row])
        starts.append(int(earlier.stop[row]))
    return [0, *reversed(starts)]


def _grow(problem: _Problem, before: _Partial, stage: int, stop: int, bound: float, flat: bool) -> _Partial:
    """The partial cuts whose next stage ends before layer `stop`, those that may lead to the best."""
    rank = problem.placement[stage]
    which = np.flatnonzero(before.stop < stop)
    starts = before.stop[which]
    rows = replace(before.rows(which), origin=which, stop=np.full(len(which), stop))
    rows.seconds[:, rank] += problem.stage_seconds(stage, starts, stop)
    rows.bytes[:, rank] += problem.memory[stage, stop] - problem.memory[stage, starts]
    _pay_ties(problem, rows, rank, starts, stop)
    beyond = np.column_stack((rows.seconds > bound * (1 + ROUNDING), rows.bytes > problem._lenient_limit))
    hopeless = beyond.any(1)
    if math.isfinite(bound):
        still = problem.last > stage
        room = ((bound * (1 + ROUNDING) - rows.seconds) * problem.speeds)[:, still].sum(1)
        hopeless |= room < (problem.work[-1] - problem.work[stop]) * (1 - ROUNDING)
    rows = _settle(problem, rows.rows(np.flatnonzero(~hopeless)), stage, flat)
    width = max(32, KEPT // (problem.stages * problem.layers))
    if len(rows.stop) > 4 * width:
        rows = rows.rows(_flattest(rows, 4 * width, flat))
    numbers = np.column_stack((rows.settled, rows.seconds, rows.bytes, rows.twin, -rows.twin))
    rows = rows.rows(_unbeaten(numbers))
    return rows if len(rows.stop) <= width else rows.rows(_flattest(rows, width, flat))


def _pay_ties(problem: _Problem, rows: _Partial, rank: int, starts: NDArray[np.int64], stop: int) -> None:
    for k, (first, second, paid) in enumerate(problem.tied):
        rows.twin[(starts <= first) & (first < stop), k] = rank
        complete = np.flatnonzero((starts <= second) & (second < stop))
        apart = complete[rows.twin[complete, k] != rank]
        rows.seconds[apart, rank] += paid
        rows.seconds[apart, rows.twin[apart, k]] += paid
        rows.twin[complete, k] = -1


def _settle(problem: _Problem, rows: _Partial, stage: int, flat: bool) -> _Partial:
    """Takes the ranks that get no more out of the columns, so that rows differ in less."""
    settled = rows.settled
    for rank in np.flatnonzero(problem.last <= stage):
        done = ~(rows.twin == rank).any(1)
        mine = np.where(done, rows.seconds[:, rank], 0.0)
        settled = settled + mine * mine if flat else np.maximum(settled, mine)
        rows.seconds[done, rank] = 0.0
        rows.bytes[done, rank] = 0.0
    return replace(rows, settled=settled)


def _flattest(rows: _Partial, count: int, flat: bool) -> NDArray[np.int64]:
    settled = rows.settled if flat else np.maximum(rows.settled, rows.seconds.max(1)) ** 2
    return np.argsort(settled + (rows.seconds**2).sum(1), kind="stable")[:count]


def _unbeaten(numbers: NDArray[Any]) -> NDArray[np.int64]:
    """The rows that no other row equals or beats in all columns (of equal ones, one)."""
    numbers = numbers[:, (numbers != numbers[:1]).any(0)]
    if numbers.shape[1] == 0:
        return np.arange(min(1, len(numbers)))
    if numbers.shape[1] == 1:
        return np.array([np.argmin(numbers[:, 0])])
    # In this order no row beats an earlier one.
    rest = np.lexsort(numbers.T[::-1])
    kept = []
    while len(rest):
        kept.append(rest[0])
        rest = rest[(numbers[rest] < numbers[rest[0]]).any(1)]
    return np.array(kept)


def _problem(
    costs: Sequence[float],
    stages: int,
    speeds: Sequence[float] | None,
    boundary: Sequence[float] | None,
    memory: Sequence[float] | Sequence[Sequence[float]] | None,
    limit: float | Sequence[float] | None,
    placement: Sequence[int] | None,
    tied: Sequence[tuple[int, int, float]],
) -> _Problem:
    layers = len(costs)
    _check_numbers(layers, stages)
    where = tuple(range(stages)) if placement is None else tuple(placement)
    ranks = max(where) + 1
    if len(where) != stages or set(where) != set(range(ranks)):
        raise InvalidArgument(
            f"cut: placement {list(where)}, expected a rank for each of {stages} stages, none left out"
        )
    if (memory is None) != (limit is None):
        raise InvalidArgument("cut: memory and limit go together, expected both or neither")
    rate = _numbers("speeds", [1.0] * ranks if speeds is None else speeds, ranks)
    if not (rate > 0).all():
        raise InvalidArgument(f"cut: speeds {rate.tolist()}, expected more than 0")
    passed = _numbers("boundary", [0.0] * layers if boundary is None else boundary, layers)
    may = np.full(ranks, math.inf)
    if limit is not None:
        may = _numbers("limit", list(limit) if isinstance(limit, Sequence) else [limit] * ranks, ranks)
    ties = []
    for a, b, paid in tied:
        if not (0 <= a < layers and 0 <= b < layers and paid >= 0):
            raise InvalidArgument(f"cut: tied ({a}, {b}, {paid}), expected two of {layers} layers and seconds")
        if a != b:
            ties.append((min(a, b), max(a, b), float(paid)))
    work = _sums(_numbers("costs", costs, layers))
    held = _held(memory, stages, layers)
    return _Problem(work, np.concatenate(([0.0], passed)), held, may, rate, where, tuple(ties))


def _check_numbers(layers: int, stages: int) -> None:
    if not 1 <= stages <= layers:
        raise InvalidArgument(f"cut: {layers} layers in {stages} stages, expected at least one layer for each stage")


def _numbers(name: str, given: Sequence[float], count: int) -> Floats:
    found = np.array(given, np.float64)
    if found.shape != (count,) or not np.isfinite(found).all() or (found < 0).any():
        raise InvalidArgument(f"cut: {name} {list(given)}, expected {count} numbers, finite and not negative")
    return found


def _sums(numbers: Floats) -> Floats:
    return np.concatenate((np.zeros((*numbers.shape[:-1], 1)), np.cumsum(numbers, -1)), -1)


def _held(memory: Sequence[float] | Sequence[Sequence[float]] | None, stages: int, layers: int) -> Floats:
    """[stage, i]: bytes of the first i layers."""
    if memory is None:
        return np.zeros((stages, layers + 1))
    nested = [row for row in memory if isinstance(row, Sequence | np.ndarray)]
    if not nested:
        return _sums(np.tile(_numbers("memory", memory, layers), (stages, 1)))  # type: ignore[arg-type]
    if len(nested) != len(memory) or len(nested) != stages:
        raise InvalidArgument(
            f"cut: memory of {len(memory)} rows, expected {layers} numbers, or these for {stages} stages"
        )
    return _sums(np.stack([_numbers("memory", row, layers) for row in nested]))


def _no_cut(problem: _Problem) -> str:
    held = np.diff(problem.memory, axis=1)
    return (
        f"cut: found no cut of {problem.layers} layers in {problem.stages} stages that keeps every rank within its "
        f"limit, {problem.limit.tolist()} bytes; all layers have {held.sum(1).max():.0f}, the largest {held.max():.0f}"
    )
