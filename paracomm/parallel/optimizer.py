"""A torch optimizer over the flat parts that this rank owns.

Consecutive parameters of a bucket that share their options are one flat tensor to the optimizer, cut to what the rank
owns; its state has the same shape. `optimizer.state_dict()` is gathered and keyed by the parameters' names, so that any
other layout can load it:

    {"state": {"blocks.0.up.weight": {"exp_avg": [of the parameter's shape], "step": ..., ...}, ...},
     "param_groups": [{"lr": ..., "params": ["blocks.0.up.weight", ...]}, ...]}

Under mixed precision the state has the float32 weights as well, as "master".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from paracomm.errors import Error, InvalidArgument
from paracomm.parallel.weights import Weights

Rule = Callable[[str, nn.Parameter], Mapping[str, Any]]
"""rule(name, parameter) -> the options of its group, as {"weight_decay": 0.1}."""
Groups = Iterable[Mapping[str, Any]] | Rule | None

FUSED = ("Adam", "AdamW", "SGD", "Adagrad")
NOT_BY_ELEMENT = ("Adafactor", "LBFGS", "Muon", "SparseAdam")
SCALARS = ("step", "mu_product", "eta", "mu")
"""States of torch's optimizers that are one number for a parameter, whatever its shape."""


@dataclass
class Run:
    """Part of a bucket's flat parameters that the optimizer takes as one tensor."""

    weights: Weights
    group: int
    where: slice
    """In `weights.master`."""
    parameter: nn.Parameter

    @property
    def gradient(self) -> Tensor | None:
        found = self.weights.bucket.gradient
        return None if found is None else found[self.where]


class Shards:
    """Makes the optimizer and moves gradients, weights and states in and out of it."""

    def __init__(self, kind: type[torch.optim.Optimizer], weights: Sequence[Weights], groups: Groups,
                 named: Sequence[tuple[str, nn.Parameter]], publish: Callable[[], None], options: dict[str, Any],
                 ) -> None:  # fmt: skip
        if kind.__name__ in NOT_BY_ELEMENT:
            raise InvalidArgument(
                f"optimizer: {kind.__name__} looks at a parameter's shape, and a shard has none; take one that treats "
                "every element by itself, such as AdamW"
            )
        if kind.__name__ in FUSED and not options.keys() & {"fused", "foreach", "differentiable"}:
            options = options | {"fused": all(each.master.is_floating_point() for each in weights)}
        self._weights = list(weights)
        self._publish = publish
        self._names: list[list[str]] = []
        self._group_of: dict[int, int] = {}
        described = self._sort(named, groups)
        self._runs = [run for each in self._weights for run in self._cut(each)]
        for index, group in enumerate(described):
            group["params"] = [run.parameter for run in self._runs if run.group == index]
        self.optimizer: torch.optim.Optimizer = kind(described, **options)
        vars(self.optimizer)["shards"] = self
        self.optimizer.zero_grad = self._zero_grad  # type: ignore[method-assign]
        self.optimizer.register_step_pre_hook(self._before_step)
        self.optimizer.register_step_post_hook(self._after_step)
        self.optimizer.register_state_dict_post_hook(self._whole)
        self.optimizer.register_load_state_dict_pre_hook(self._own)

    def _sort(self, named: Sequence[tuple[str, nn.Parameter]], groups: Groups) -> list[dict[str, Any]]:
        """Each parameter's group; returns the groups' options."""
        described: list[dict[str, Any]] = []
        names = {id(parameter): name for name, parameter in named}
        if groups is None or callable(groups):
            for name, parameter in named:
                options = {} if groups is None else dict(groups(name, parameter))
                if options not in described:
                    described.append(options)
                    self._names.append([])
                index = described.index(options)
                self._group_of[id(parameter)] = index
                self._names[index].append(name)
            return described
        for index, group in enumerate(groups):
            described.append({key: value for key, value in group.items() if key != "params"})
            members = [parameter for parameter in group["params"] if parameter.requires_grad]
            for parameter in members:
                if id(parameter) not in names:
                    raise InvalidArgument(f"optimizer: group {index} has a parameter that is not the module's")
                if self._group_of.setdefault(id(parameter), index) != index:
                    raise InvalidArgument(f"optimizer: '{names[id(parameter)]}' is in two groups")
            self._names.append([names[id(parameter)] for parameter in members])
        missing = [name for name, parameter in named if id(parameter) not in self._group_of]
        if missing:
            raise InvalidArgument(f"optimizer: no group has '{missing[0]}', expected all that require a gradient")
        return described

    def _cut(self, weights: Weights) -> list[Run]:
        bucket, runs = weights.bucket, []
        groups = [self._group_of[id(member)] for member in bucket.members]
        edges = [*bucket.offsets, bucket.count]
        start = 0
        for slot, group in enumerate(groups):
            if slot + 1 < len(groups) and groups[slot + 1] == group:
                continue
            lo, hi = max(start, bucket.owned.start), min(edges[slot + 1], bucket.owned.stop)
            if lo < hi:
                where = slice(lo - bucket.owned.start, hi - bucket.owned.start)
                runs.append(Run(weights, group, where, nn.Parameter(weights.master[where])))
            start = edges[slot + 1]
        return runs

    # --- steps ---
    def _zero_grad(self, set_to_none: bool = True) -> None:
        """What zero_grad() does: it clears the gradients of the module's parameters, not those of flat ones."""
        for weights in self._weights:
            for member in weights.bucket.members:
                if set_to_none:
                    member.grad = None
                elif member.grad is not None:
                    member.grad.zero_()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for run in self._runs:
            run.parameter.grad = run.gradient
            if run.parameter.grad is None:
                raise Error("optimizer.step() came before the first finish(): there are no reduced gradients yet")

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for run in self._runs:
            run.parameter.grad = None
        self._publish()

    # --- states, piece by piece ---
    def runs(self, weights: Weights) -> list[tuple[slice, list[int], dict[str, Any]]]:
        """(place in `weights.master`, members, state as it is) of each tensor that the optimizer takes of this bucket.

        A state is changed in place; its tensors are [the length of the place], or numbers. A place that holds nothing
        but a gap has the member before it.
        """
        base, found = weights.bucket.owned.start, []
        for run in (run for run in self._runs if run.weights is weights):
            first, last = base + run.where.start, base + run.where.stop
            starts = weights.bucket.offsets
            before = sum(offset <= first for offset in starts) - 1
            members = list(range(before, sum(offset < last for offset in starts)))
            found.append((run.where, members, self.optimizer.state[run.parameter]))
        return found

    def names(self) -> list[list[str]]:
        """The parameters of each group, in order, those too that this rank owns nothing of."""
        return [list(names) for names in self._names]

    # --- states, whole ---
    @torch.no_grad()
    def _whole(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """What state_dict() gives instead of this rank's part. Collective."""
        found: dict[str, dict[str, Any]] = {}
        for weights in self._weights:
            bucket = weights.bucket
            runs = [run for run in self._runs if run.weights is weights]
            kept = self._agreed(bucket.comm, {run.group: self._described(run, optimizer) for run in runs})
            for group, described in kept.items():
                members = [slot for slot, p in enumerate(bucket.members) if self._group_of[id(p)] == group]
                for slot in members:
                    found.setdefault(bucket.names[slot], {}).update(
                        {key: _scalar(*said) for key, said in described["scalars"].items()}
                    )
                for key in described["tensors"]:
                    flat = torch.zeros_like(weights.master)
                    for run in runs:
                        if run.group == group:
                            flat[run.where] = weights.master[run.where] if key == "master" else (
                                optimizer.state[run.parameter][key]
                            )  # fmt: skip
                    parts = bucket.cut(flat if bucket.stage == 0 else bucket.comm.all_gather(flat).flatten())
                    for slot in members:
                        found[bucket.names[slot]][key] = parts[slot].clone()
        groups = [
            {key: value for key, value in group.items() if key != "params"} | {"params": list(names)}
            for group, names in zip(state["param_groups"], self._names, strict=True)
        ]
        return {"state": found, "param_groups": groups}

    def _described(self, run: Run, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state = optimizer.state.get(run.parameter, {})
        tensors = [key for key, value in state.items() if isinstance(value, Tensor) and value.dim()]
        scalars = {key: _said(key, value) for key, value in state.items() if key not in tensors and value is not None}
        mixed = run.weights.bucket.dtype != run.weights.bucket.master_dtype
        return {"tensors": tensors + ["master"] * mixed, "scalars": scalars}

    @staticmethod
    def _agreed(comm: Any, mine: dict[int, Any]) -> dict[int, Any]:
        """What all ranks together know of each group of a bucket, of which a rank may own nothing."""
        if not hasattr(comm, "exchange"):
            return mine
        everyone = [json.loads(blob) for blob in comm.exchange(json.dumps(mine).encode())]
        return {int(group): described for theirs in reversed(everyone) for group, described in sorted(theirs.items())}

    @torch.no_grad()
    def _own(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of what another layout saved, as torch numbers it."""
        saved = [sorted(group["params"]) for group in state["param_groups"]]
        expected = [sorted(names) for names in self._names]
        if saved != expected:
            differs = sorted({n for g in saved for n in g} ^ {n for g in expected for n in g})
            raise InvalidArgument(
                f"load_state_dict: the parameters of the {len(saved)} groups are not those of the {len(expected)} "
                f"groups here{': ' if differs else ''}{', '.join(map(str, differs[:3]))}"
            )
        numbers: dict[int, dict[str, Any]] = {}
        order = [run for index in range(len(expected)) for run in self._runs if run.group == index]
        for number, run in enumerate(order):
            numbers[number] = self._part(run, state["state"])
            master = numbers[number].pop("master", None)
            if master is not None:
                run.parameter.copy_(master)
            if not numbers[number]:
                del numbers[number]
        groups = []
        for index, group in enumerate(state["param_groups"]):
            places = [number for number, run in enumerate(order) if run.group == index]
            groups.append({**group, "params": places})
        self._publish()
        return {"state": numbers, "param_groups": groups}

    @staticmethod
    def _part(run: Run, state: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        bucket, part = run.weights.bucket, {}
        places = [place for place in run.weights.owned_parts() if run.where.start <= place[2].start < run.where.stop]
        numbers = {
            key
            for slot, _, _ in places
            for key, value in state.get(bucket.names[slot], {}).items()
            if isinstance(value, Tensor) and not value.dim() and (key in SCALARS or bucket.members[slot].dim())
        }
        for slot, source, target in places:
            for key, value in state.get(bucket.names[slot], {}).items():
                if key in numbers or not isinstance(value, Tensor) or value.shape != bucket.members[slot].shape:
                    part[key] = value.clone() if isinstance(value, Tensor) else value
                    continue
                flat = part.setdefault(key, torch.zeros_like(run.parameter))
                flat[target.start - run.where.start : target.stop - run.where.start] = value.flatten()[source]
        return part


def _said(key: str, value: Any) -> tuple[str | None, Any]:
    """(dtype of a tensor, number) as JSON takes it; without a dtype it is Python's own."""
    if isinstance(value, Tensor):
        return str(value.dtype).removeprefix("torch."), value.item()
    if not isinstance(value, (bool, int, float, str)):
        raise InvalidArgument(
            f"optimizer: the state '{key}' is a {type(value).__name__}, expected a tensor, a number or a text"
        )
    return None, value


def _scalar(dtype: str | None, value: Any) -> Any:
    return value if dtype is None else torch.tensor(value, dtype=getattr(torch, dtype))


def shards_of(optimizer: torch.optim.Optimizer) -> Shards | None:
    """What moves its gradients and states; None for an optimizer over a module's own parameters."""
    return cast("Shards | None", getattr(optimizer, "shards", None))
