"""What a checkpoint holds of a run, by the names of the whole model, and where on this rank it lies.

    model.NAME                          [its shape]         parameters, those of the optimizer under mixed precision
    optimizer.state.NAME.KEY            [its shape]         or one number; an object: a number of Python's, a text
    optimizer.numbers                   object              the keys of tensors that are one number for a parameter
    optimizer.param_groups              object              options, and the names of their parameters
    hook.memory.NAME                    [ranks, its shape]  what each rank's hook owes
    hook.state                          object              kind, steps
    hook.q.KEY@tp 0 of 2                its shape           what is the same on all ranks that average
    random.NAME                         [ranks, bytes]      generators of the caller's

A rank saves the block of each bucket that it would own under ZeRO, whatever the stage, so that every element is written
once and all ranks write alike much. It loads all that it owns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from paracomm.errors import InvalidArgument
from paracomm.hooks import LocalSGDState
from paracomm.parallel import DataParallel
from paracomm.parallel.optimizer import SCALARS, shards_of
from paracomm.parallel.pieces import Piece, of_range, of_whole
from paracomm.parallel.shard import Shard, shard_of
from paracomm.parallel.weights import Weights
from paracomm.train.storage import Entry, Ranks, Saved, Where

MODEL, STATE = ("model",), ("optimizer", "state")
GROUPS, NUMBERS = ("optimizer", "param_groups"), ("optimizer", "numbers")
LOCAL_OPTIONS = ("params", "fused", "foreach", "capturable", "differentiable")
"""Of a group: how this process computes, which is not loaded."""
PLAIN = (bool, int, float, str)
"""What a state may be beside tensors."""


@dataclass(frozen=True)
class Part:
    """A module of this rank: a stage of a pipeline, or the whole model.

    spread: what made it parallel; None for a module of torch's own, which every rank holds whole.
    """

    module: nn.Module
    spread: DataParallel | None
    first: bool
    """Whether this rank is the first of those that hold what is in no bucket."""

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def writes(self, tensor: Tensor) -> bool:
        """Whether this rank writes what is in no bucket, of all that hold the same."""
        return self.first and self.is_first_on_tp(tensor)

    def is_first_on_tp(self, tensor: Tensor) -> bool:
        """Whether no rank before this one on tp holds the same of a parameter."""
        mesh = None if self.spread is None else self.spread.mesh
        return mesh is None or shard_of(tensor) is not None or mesh.index("tp") == 0

    def bucketed(self, saving: bool) -> Iterator[tuple[Weights, int, slice, slice]]:
        """(bucket, member, place in the flattened parameter, place in its `master`) of what this rank saves or loads.

        A bucket that is summed over tp as well has a block for each of its ranks.
        """
        if self.spread is None:
            return
        for weights in self.spread.weights:
            bucket = weights.bucket
            apart = "tp" in getattr(bucket.members[0], "partial", ())
            for slot, source, target in weights.owned_parts(bucket.block if saving else None):
                member = bucket.members[slot]
                if not saving or (not is_copy(member) and (apart or self.is_first_on_tp(member))):
                    yield weights, slot, source, target


def spread_parts(replica: Any) -> list[DataParallel]:
    """The parts of a DataParallel or of a pipeline of them; none of a module of torch's own."""
    parts = getattr(replica, "parts", None)
    if isinstance(parts, (list, tuple)) and all(isinstance(part, DataParallel) for part in parts):
        return list(parts)
    return []


def parts_of(replica: Any, ranks: Ranks) -> list[Part]:
    """As spread_parts(), or a module of torch's own, in DistributedDataParallel or not, as one.

    Raises InvalidArgument for ranks that have models of their own.
    """
    spread = spread_parts(replica)
    for part in spread:
        if isinstance(part.reducer.state, LocalSGDState):
            raise InvalidArgument("checkpoint: under local SGD the ranks have models of their own; it saves one")
    if spread:
        return [Part(part.module, part, part.comm.rank == 0) for part in spread]
    bare = isinstance(replica, nn.Module) and not isinstance(replica, DistributedDataParallel)
    return [Part(replica if bare else replica.module, None, ranks.rank == 0)]


def is_copy(parameter: Tensor) -> bool:
    """Whether it is a tied weight's later one, on another stage than the first."""
    return getattr(parameter, "copy_of", None) is not None


def stored_name(name: str, parameter: Tensor) -> str:
    """The name under which a parameter's values are saved."""
    origin: str | None = getattr(parameter, "copy_of", None)
    return name if origin is None else origin


def entries_of(path: Where, pieces: Sequence[Piece]) -> list[Entry]:
    return [Entry(path, piece) for piece in pieces]


# --- weights ---
def weights_of(part: Part, saving: bool) -> list[Entry]:
    """Parameters and buffers, those that a state_dict has."""
    found: list[Entry] = []
    if part.spread is not None:
        part.spread.settle()
    for weights, slot, source, target in part.bucketed(saving):
        member = weights.bucket.members[slot]
        pieces = of_range(weights.master[target], source.start, member.shape, shard_of(member))
        found += entries_of((*MODEL, stored_name(weights.bucket.names[slot], member)), pieces)
    in_buckets = {id(member) for weights in part.spread.weights for member in weights.bucket.members} if (
        part.spread is not None
    ) else set()  # fmt: skip
    others = {name: p for name, p in part.parameters().items() if id(p) not in in_buckets} | _buffers(part.module)
    for name, tensor in others.items():
        if not saving or (part.writes(tensor) and not is_copy(tensor)):
            pieces = of_whole(tensor.detach(), shard_of(tensor))
            found += entries_of((*MODEL, stored_name(name, tensor)), pieces)
    return found


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Those that are kept, under their first names."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, each in module.named_modules():
        for name, buffer in each.named_buffers(recurse=False):
            if name not in each._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def names_of(parts: Sequence[Part]) -> set[str]:
    """All that lies below "model" of what these parts hold, empty tensors left out."""
    names = {
        stored_name(name, tensor)
        for part in parts
        for name, tensor in (part.parameters() | _buffers(part.module)).items()
        if tensor.numel()
    }
    return names


# --- the optimizer ---
def states_of(part: Part, optimizer: torch.optim.Optimizer, saving: bool) -> list[Entry]:
    """The tensors that the optimizer has of a part's parameters; to load, without numbers, which make_states() reads.

    Raises InvalidArgument for a state of which no part could be cut for another layout.
    """
    shards, found = shards_of(optimizer), []
    if shards is None:
        for name, parameter in part.parameters().items():
            if saving and not part.writes(parameter):
                continue
            for key, value in _tensors(name, optimizer.state.get(parameter, {})):
                if saving or not _is_number(key, value, parameter.dim()):
                    path = (*STATE, stored_name(name, parameter), key)
                    found += entries_of(path, of_whole(value, _cut_like(parameter, name, key, value)))
        return found
    for weights, slot, source, target in part.bucketed(saving):
        member, name = weights.bucket.members[slot], weights.bucket.names[slot]
        for where, _, state in shards.runs(weights):
            if where.start <= target.start < where.stop:
                place = slice(target.start - where.start, target.stop - where.start)
                for key, value in _tensors(name, state):
                    if value.dim():
                        _expect_flat(name, key, value, where.stop - where.start)
                        pieces = of_range(value[place], source.start, member.shape, shard_of(member))
                        found += entries_of((*STATE, stored_name(name, member), key), pieces)
    for name, _, held in _by_name(part, optimizer) if saving else ():
        for key, value in _tensors(name, held):
            if not value.dim():  # several ranks offer the same
                found += entries_of((*STATE, name, key), of_whole(value, None))
    return found


def values_of(part: Part, optimizer: torch.optim.Optimizer) -> tuple[dict[Where, Any], list[str]]:
    """What the optimizer's states have that is no tensor, and the keys of tensors that are one number.

    Raises InvalidArgument for what is neither a number nor a text.
    """
    values: dict[Where, Any] = {}
    numbers: set[str] = set()
    for name, dims, state in _by_name(part, optimizer):
        for key, value in state.items():
            if isinstance(value, Tensor):
                if _is_number(key, value, dims):
                    numbers.add(key)
            elif value is not None:
                if not isinstance(value, PLAIN):
                    raise InvalidArgument(
                        f"checkpoint: the optimizer's state '{key}' of '{name}' is a {type(value).__name__}, expected "
                        "a tensor, a number or a text"
                    )
                values |= {(*STATE, name, key): value}
    return values, sorted(numbers)


def _by_name(part: Part, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """(name, dimensions that tell a number from a tensor of its shape, state) of what this rank may write."""
    shards = shards_of(optimizer)
    if shards is None:
        for name, parameter in part.parameters().items():
            if part.writes(parameter) and not is_copy(parameter):
                yield name, parameter.dim(), optimizer.state.get(parameter, {})
        return
    for weights in [] if part.spread is None else part.spread.weights:
        for _, slots, state in shards.runs(weights):
            for slot in slots:
                if not is_copy(weights.bucket.members[slot]):
                    yield weights.bucket.names[slot], 1, state


def _is_number(key: str, value: Tensor, dims: int) -> bool:
    """Whether a state is one number for a parameter of so many dimensions; with none, the key decides."""
    return value.dim() == 0 and (dims > 0 or key in SCALARS)


def _tensors(name: str, state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if not isinstance(key, str):
            raise InvalidArgument(f"checkpoint: the optimizer's state of '{name}' has a key {key!r}, expected a text")
        if isinstance(value, Tensor):
            yield key, value


def _cut_like(parameter: Tensor, name: str, key: str, value: Tensor) -> Shard | None:
    """How a state of a parameter is a part of the whole; of a whole parameter, and a number, it has any shape."""
    shard = shard_of(parameter)
    if shard is None or not value.dim():
        return None
    if value.shape != parameter.shape:
        raise InvalidArgument(
            f"checkpoint: the optimizer's state '{key}' of '{name}' is {list(value.shape)}, expected the shape of its "
            f"shard, {list(parameter.shape)}"
        )
    return shard


def _expect_flat(name: str, key: str, value: Tensor, count: int) -> None:
    if value.shape != (count,):
        raise InvalidArgument(
            f"checkpoint: the optimizer's state '{key}' of '{name}' is {list(value.shape)}, expected one number or "
            f"[{count}], one for each element that the rank owns"
        )


def make_states(part: Part, optimizer: torch.optim.Optimizer, saved: Saved, numbers: Sequence[str] | None) -> None:
    """Gives the optimizer the states that a checkpoint has: numbers, and zeros for what states_of() then names.

    numbers: the keys that are one number for a parameter without dimensions; None: it does not say.

    Raises InvalidArgument where parameters that are one tensor here have had different ones.
    """
    theirs = _Kinds(saved, SCALARS if numbers is None else numbers)
    shards = shards_of(optimizer)
    if shards is None:
        for name, parameter in part.parameters().items():
            optimizer.state.pop(parameter, None)
            name = stored_name(name, parameter)
            if name in theirs.of:
                whole = shard_of(parameter) is None
                optimizer.state[parameter] = theirs.numbers(name, parameter.dim()) | theirs.zeros(
                    name, parameter.dim(), parameter, whole
                )
        return
    for weights in [] if part.spread is None else part.spread.weights:
        bucket = weights.bucket
        for where, slots, state in shards.runs(weights):
            names = [stored_name(bucket.names[slot], bucket.members[slot]) for slot in slots]
            dims = [bucket.members[slot].dim() for slot in slots]
            of_each = [theirs.numbers(name, count) for name, count in zip(names, dims, strict=True)]
            first = theirs.of.get(names[0], {}).keys()
            for name, found in zip(names, of_each, strict=True):
                if found != of_each[0] or theirs.of.get(name, {}).keys() != first:
                    raise InvalidArgument(
                        f"checkpoint: the optimizer's {sorted(first)} of '{names[0]}' with {of_each[0]}, and "
                        f"{sorted(theirs.of.get(name, {}))} of '{name}' with {found}, cannot be one tensor's; expected "
                        "the same"
                    )
            state.clear()
            state |= of_each[0] | theirs.zeros(names[0], dims[0], weights.master[where], False)


class _Kinds:
    """What a checkpoint knows of the optimizer's states: `of` each name, by key."""

    def __init__(self, saved: Saved, scalars: Sequence[str]) -> None:
        self._saved, self._scalars = saved, scalars
        self.of: dict[str, dict[str, Any]] = {}
        for path, kind in saved.below(*STATE).items():
            self.of.setdefault(path[0], {})[path[1]] = kind
        self._values = saved.objects([(*STATE, *path) for path in saved.below(*STATE)])

    def _is_number(self, key: str, kind: Any, dims: int) -> bool:
        return not kind.size and (dims > 0 or key in self._scalars)

    def numbers(self, name: str, dims: int) -> dict[str, Any]:
        kinds = self.of.get(name, {})
        found = {
            key: torch.zeros((), dtype=kind.properties.dtype)
            for key, kind in kinds.items()
            if (*STATE, name, key) not in self._values and self._is_number(key, kind, dims)
        }
        self._saved.read(
            [entry for key, value in found.items() for entry in entries_of((*STATE, name, key), of_whole(value, None))]
        )
        paths = {key: (*STATE, name, key) for key in kinds}
        return found | {key: self._values[path] for key, path in paths.items() if path in self._values}

    def zeros(self, name: str, dims: int, like: Tensor, whole: bool) -> dict[str, Tensor]:
        """whole: of a parameter that is no part of another, a state may have a shape of its own."""
        return {
            key: torch.zeros(kind.size if whole else like.shape, dtype=kind.properties.dtype, device=like.device)
            for key, kind in self.of.get(name, {}).items()
            if (*STATE, name, key) not in self._values and not self._is_number(key, kind, dims)
        }


# --- its groups ---
def groups_of(parts: Sequence[Part], optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The options of each group, and its parameters by name."""
    shards = shards_of(optimizer)
    origins = {name: stored_name(name, p) for part in parts for name, p in part.parameters().items()}
    if shards is not None:
        names = shards.names()
    else:
        known = {id(p): name for part in parts for name, p in part.parameters().items()}
        if not all(id(p) in known for group in optimizer.param_groups for p in group["params"]):
            raise InvalidArgument("checkpoint: the optimizer has a parameter that is not the model's")
        names = [[known[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    return [
        {**{key: value for key, value in group.items() if key != "params"}, "params": [origins[name] for name in of]}
        for group, of in zip(optimizer.param_groups, names, strict=True)
    ]


def merge_groups(everyone: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The groups of all ranks, of which each stage of a pipeline knows its own parameters: equal options are one."""
    merged: list[dict[str, Any]] = []
    for group in (group for groups in everyone for group in groups):
        options = {key: value for key, value in group.items() if key != "params"}
        same = next((m for m in merged if {k: v for k, v in m.items() if k != "params"} == options), None)
        if same is None:
            merged.append({**options, "params": list(group["params"])})
        else:
            same["params"] += [name for name in group["params"] if name not in same["params"]]
    return merged


def load_groups(parts: Sequence[Part], optimizer: torch.optim.Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    """Options of each group from the saved one that has its parameters. Raises InvalidArgument if there is none."""
    number_of = {name: number for number, group in enumerate(saved) for name in group["params"]}
    for index, (group, mine) in enumerate(
        zip(optimizer.param_groups, groups_of(parts, optimizer), strict=True)
    ):  # fmt: skip
        numbers = {number_of.get(name) for name in mine["params"]}
        if len(numbers) > 1 or None in numbers:
            missing = [name for name in mine["params"] if name not in number_of]
            reason = f"it lacks '{missing[0]}'" if missing else f"there they are in groups {sorted(map(str, numbers))}"
            raise InvalidArgument(
                f"checkpoint: the parameters of group {index} are not a group's of the saved: {reason}"
            )
        for number in numbers:
            assert number is not None
            group.update({key: value for key, value in saved[number].items() if key not in LOCAL_OPTIONS})
