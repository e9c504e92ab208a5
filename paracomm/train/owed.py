"""What each rank of a run has for itself: what its hook owes, and generators of the caller's. See contents.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paracomm.hooks import HookState
from paracomm.parallel.pieces import Piece, of_range, of_whole
from paracomm.parallel.shard import shard_of
from paracomm.train.contents import Part, entries_of, is_copy, stored_name
from paracomm.train.storage import Entry, Ranks, Saved, Where

HOOK, RANDOM = ("hook",), ("random",)


# --- hooks ---
@dataclass(frozen=True)
class Level:
    """A hook's state, or the one that it has between hosts, and its state_dict()."""

    path: Where
    state: HookState
    held: dict[str, Any]


def levels_of(part: Part) -> list[Level]:
    """Those of the hook of ours that averages a part's gradients; none for other hooks."""
    found: list[Level] = []
    state = None if part.spread is None else part.spread.reducer.state
    path: Where = HOOK
    held = state.state_dict() if isinstance(state, HookState) else {}
    while isinstance(state, HookState):
        found.append(Level(path, state, held))
        state, path, held = getattr(state, "outer", None), (*path, "outer"), held.get("outer") or {}
    return found


def described(part: Part) -> dict[str, Any]:
    """{path: kind and steps} of each level."""
    return {".".join(level.path): {key: level.held[key] for key in ("kind", "steps")} for level in levels_of(part)}


def hooks_of(part: Part) -> list[Entry]:
    """What this rank's hook owes, and what it shares with the ranks that it averages with."""
    found: list[Entry] = []
    parameters = part.parameters()
    for level in levels_of(part):
        wire = level.state.wire
        for name, owed in level.held["memory"].items():
            member = parameters[name]
            if part.is_first_on_tp(member) and not is_copy(member):
                pieces = of_range(owed, 0, member.shape, shard_of(member))
                rows = [_row(piece, wire.rank, wire.world_size) for piece in pieces]
                found += entries_of((*level.path, "memory", name), rows)
        if wire.rank == 0:
            for what, key, value in _shared(level.held):
                found += entries_of((*level.path, what, _on_tp(part, key)), of_whole(value, None))
    return found


def _row(piece: Piece, row: int, rows: int) -> Piece:
    return Piece((rows, *piece.shape), (row, *piece.offsets), piece.values.unsqueeze(0))


def _shared(held: Mapping[str, Any]) -> Iterator[tuple[str, str, Tensor]]:
    for what, values in held.items():
        if what not in ("kind", "steps", "memory", "outer"):
            yield from ((what, key, value) for key, value in values.items())


def _on_tp(part: Part, key: str) -> str:
    mesh = None if part.spread is None else part.spread.mesh
    index, size = (0, 1) if mesh is None else (mesh.index("tp"), mesh.size("tp"))
    return f"{key}@tp {index} of {size}"


def load_hooks(part: Part, saved: Saved, descriptions: Mapping[str, Any]) -> None:
    """Gives the hook what it owes.

    On as many ranks as saved, each goes on from its own. On another number every rank owes what all owed on average,
    which leaves the average as it was. A hook of another kind takes over what is owed and nothing else.
    """
    levels = levels_of(part)
    whole: dict[str, Any] = {}
    for level in reversed(levels):
        was = descriptions.get(".".join(level.path))
        state = dict(level.held)
        state["memory"] = _owed(part, level, saved) if level.state.memory is not None else {}
        if was is not None and was["kind"] == level.held["kind"]:
            state["steps"] = was["steps"]
            state |= _read_shared(part, level, saved)
        if "outer" in state and whole:
            state["outer"] = whole
        whole = state
    if levels:
        levels[0].state.load_state_dict(whole)


def _owed(part: Part, level: Level, saved: Saved) -> dict[str, Tensor]:
    """By name, what this rank owes of each parameter, flat."""
    wire, parameters = level.state.wire, part.parameters()
    found: dict[str, Tensor] = {}
    entries: list[Entry] = []
    averaged: list[tuple[Tensor, Tensor]] = []
    for (name,), kind in saved.below(*level.path, "memory").items():
        names = [each for each, p in parameters.items() if stored_name(each, p) == name]
        for mine in names:
            member = parameters[mine]
            found[mine] = torch.zeros(member.numel(), dtype=kind.properties.dtype)
            for piece in of_range(found[mine], 0, member.shape, shard_of(member)):
                rows = int(kind.size[0])
                if rows == wire.world_size:
                    row = _row(piece, wire.rank, rows)
                else:
                    values = piece.values.new_empty((rows, *piece.values.shape))
                    row = Piece((rows, *piece.shape), (0, *piece.offsets), values)
                    averaged.append((piece.values, values))
                entries.append(Entry((*level.path, "memory", name), row))
    saved.read(entries)
    for target, values in averaged:
        target.copy_(values.double().mean(0))
    return found


def _read_shared(part: Part, level: Level, saved: Saved) -> dict[str, dict[str, Tensor]]:
    """What was saved by as many ranks of tp; what is not there begins anew, as it may."""
    kinds: dict[str, dict[str, Tensor]] = {
        what: {} for what, values in level.held.items() if isinstance(values, dict) and what != "memory"
    }
    kinds.pop("outer", None)
    entries: list[Entry] = []
    suffix = _on_tp(part, "")
    for what, found in kinds.items():
        for (key,), kind in saved.below(*level.path, what).items():
            if key.endswith(suffix):
                value = torch.empty(kind.size, dtype=kind.properties.dtype)
                found[key.removesuffix(suffix)] = value
                entries += entries_of((*level.path, what, key), of_whole(value, None))
    saved.read(entries)
    return kinds


# --- generators ---
def random_of(generators: Mapping[str, torch.Generator], ranks: Ranks) -> list[Entry]:
    """The state of each, a row for every rank."""
    return [
        Entry((*RANDOM, name), _row(piece, ranks.rank, ranks.world_size))
        for name, generator in generators.items()
        for piece in of_whole(generator.get_state(), None)
    ]


def load_random(generators: Mapping[str, torch.Generator], ranks: Ranks, saved: Saved) -> None:
    """Each rank's own; on another number of ranks, rank r goes on from rank r modulo the number then."""
    for (name,), kind in saved.below(*RANDOM).items():
        if name in generators:
            rows, count = (int(size) for size in kind.size)
            state = torch.empty((1, count), dtype=kind.properties.dtype)
            saved.read([Entry((*RANDOM, name), Piece((rows, count), (ranks.rank % rows, 0), state))])
            generators[name].set_state(state[0])
