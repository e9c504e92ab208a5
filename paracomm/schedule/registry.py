"""The algorithms by name. Tests, benchmarks and the tuner walk this table: registering is all that a new one needs.

@algorithm("broadcast", "star", steps=lambda n: min(1, n - 1), volume=lambda n: n - 1)
def star(s):
    for peer in range(s.world_size):
        if peer != s.root:
            s.copy(s.at(s.root), s.at(peer))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeVar

from ..errors import Error, InvalidArgument
from .schedule import COLLECTIVES, ROOTED, Schedule

Author = Callable[..., None]
Formula = Callable[..., Any]
AnySchedule = TypeVar("AnySchedule", bound=Schedule)
Params = dict[str, Any]
Items = tuple[tuple[str, Any], ...]

FAMILIES = f"{__package__}.algorithms."
LAYOUT = frozenset({"hosts", "between"})
"""Parameters that the library itself sets; others are a caller's wish, and what they make is proved."""


@dataclass(frozen=True)
class Algorithm:
    """A registered algorithm.

    Attributes:
        chunks: (world_size, **params) -> chunks of the schedule.
        steps: (world_size, **params) -> transfers on the longest chain, or None if not known.
        volume: (world_size, **params) -> the most that any rank sends, as a fraction of the size S of the data buffer
            (of the input for all_to_all), or None.
        variants: world_size -> parameters that tests, and the tuner, try; the first ones are the defaults.
    """

    collective: str
    name: str
    author: Author
    chunks: Formula
    steps: Formula | None
    volume: Formula | None
    variants: Callable[[int], list[dict[str, Any]]]

    @property
    def shipped(self) -> bool:
        """Whether it comes with this package."""
        return self.author.__module__.startswith(FAMILIES)

    def build(self, world_size: int, root: int | None = None, **params: Any) -> Schedule:
        return self.write(Schedule, world_size, root, **params)

    def write(self, kind: Callable[..., AnySchedule], world_size: int, root: int | None, **params: Any) -> AnySchedule:
        """Let the author write on a schedule of another kind, e.g. one that consumes operations as they come."""
        schedule = kind(self.collective, world_size, self.chunks(world_size, **params), root, self.name)
        self.author(schedule, **params)
        return schedule


_registry: dict[str, dict[str, Algorithm]] = {collective: {} for collective in COLLECTIVES}


def algorithm(
    collective: str,
    name: str,
    *,
    chunks: int | Formula = 1,
    steps: Formula | None = None,
    volume: Formula | None = None,
    variants: Callable[[int], list[dict[str, Any]]] = lambda world_size: [{}],
) -> Callable[[Author], Author]:
    """Register a function (schedule, **params) -> None that writes an algorithm.

    Args:
        collective: what it computes.
        name: how callers ask for it. Registering a name again replaces it.
        chunks: chunks of data, or a function (world_size, **params) -> chunks. Collectives made of blocks need a
            multiple of world_size.
        steps, volume: the documented cost, see `Algorithm`; tests hold the schedule to it.
        variants: world_size -> sets of parameters that are worth a proof and a try.

    Raises:
        InvalidArgument: no such collective.
    """
    if collective not in COLLECTIVES:
        raise InvalidArgument(f"unknown collective {collective!r}: expected one of {', '.join(COLLECTIVES)}")
    count = chunks if callable(chunks) else lambda world_size, **params: chunks

    def register(author: Author) -> Author:
        _registry[collective][name] = Algorithm(collective, name, author, count, steps, volume, variants)
        _build.cache_clear()
        return author

    return register


def algorithms(collective: str) -> tuple[str, ...]:
    """Names of the algorithms of a collective."""
    if collective not in _registry:
        raise InvalidArgument(f"unknown collective {collective!r}: expected one of {', '.join(COLLECTIVES)}")
    return tuple(_registry[collective])


def get(collective: str, name: str) -> Algorithm:
    """The algorithm of that name.

    Raises:
        InvalidArgument: no such collective or algorithm.
    """
    known = algorithms(collective)
    if name not in known:
        raise InvalidArgument(f"{collective} has no algorithm {name!r}: expected one of {', '.join(known)}")
    return _registry[collective][name]


def build(collective: str, name: str, world_size: int, root: int | None = None, **params: Any) -> Schedule:
    """The schedule of an algorithm; equal arguments give the same, frozen object.

    Raises:
        InvalidArgument: no such algorithm, world size, root or parameter.
    """
    get(collective, name)
    frozen = tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in params.items()))
    try:
        return _build(collective, name, world_size, root, frozen)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        if isinstance(error, Error):
            raise
        raise InvalidArgument(f"{collective} [{name}] does not take {params}: {error}") from error


@lru_cache(maxsize=256)
def _build(collective: str, name: str, world_size: int, root: int | None, params: Items) -> Schedule:
    entry = get(collective, name)
    schedule = entry.build(world_size, root, **dict(params)).freeze()
    schedule.shipped = entry.shipped and LAYOUT.issuperset(dict(params))
    return schedule


def share(numerator: int, denominator: int) -> Fraction:
    """A part of S, exactly."""
    return Fraction(numerator, denominator)


def cases(world_size: int, collectives: tuple[str, ...] = COLLECTIVES) -> Iterator[tuple[str, str, int | None, Params]]:
    """Everything that is to be proved at a world size: (collective, algorithm, root, params)."""
    for collective in collectives:
        roots = sorted({0, world_size - 1}) if collective in ROOTED else [None]
        for name, entry in _registry[collective].items():
            for params in entry.variants(world_size):
                for root in roots:
                    yield collective, name, root, params


def forget(collective: str, name: str) -> None:
    """Take an algorithm out of the registry again."""
    _registry[collective].pop(name, None)
    _build.cache_clear()
