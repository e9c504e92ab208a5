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
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from paracomm.errors import Error, InvalidArgument
from paracomm.parallel.gradient import ReducedGradient, refused
from paracomm.parallel.shard import shard_of
from paracomm.parallel.weights import Weights

Rule = Callable[[str, nn.Parameter], Mapping[str, Any]]
"""rule(name, parameter) -> the options of its group, as {"weight_decay": 0.1}."""
Groups = Iterable[Mapping[str, Any]] | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Rule | None

FUSED = ("Adam", "AdamW", "SGD", "Adagrad")
BY_ELEMENT = frozenset(
    getattr(torch.optim, name)
    for name in ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
)
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
    members: list[int]
    """Of the bucket, those too of which this rank owns nothing."""

    @property
    def gradient(self) -> Tensor | None:
        found = self.weights.bucket.gradient
        return None if found is None else found[self.where]


class Shards:
    """Makes the optimizer and moves gradients, weights and states in and out of it."""

    def __init__(self, kind: type[torch.optim.Optimizer], weights: Sequence[Weights], groups: Groups,
                 named: Sequence[tuple[str, nn.Parameter]], publish: Callable[[], None], options: dict[str, Any],
                 settle: Callable[[], None], everyone: Any, elementwise: bool = False) -> None:  # fmt: skip
        if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):
            raise InvalidArgument(f"optimizer: the kind is {kind!r}, expected a subclass of torch.optim.Optimizer")
        if kind not in BY_ELEMENT and not elementwise:
            raise InvalidArgument(
                f"optimizer: {kind.__name__} may look at a parameter's shape or norm, and is given flat parts of "
                f"several parameters here. If it treats every element by itself, say optimizer({kind.__name__}, ..., "
                f"elementwise=True); if not, make it by hand, {kind.__name__}(module.parameters()), with zero=0 and "
                "without tensor parallelism, where parameters and gradients are whole"
            )
        if any(not each.master.is_floating_point() and not each.master.is_complex() for each in weights):
            raise InvalidArgument("optimizer: a parameter is of integers, expected floating-point numbers")
        if kind.__name__ in FUSED and not options.keys() & {"fused", "foreach", "differentiable"}:
            options = options | {"fused": all(each.master.is_floating_point() for each in weights)}
        self._weights = list(weights)
        self._publish = publish
        self._settle = settle
        self._everyone = everyone
        self._not_finite: Tensor | None = None
        self._names: list[list[str]] = []
        self._group_of: dict[int, int] = {}
        described = self._sort(named, groups)
        self._runs = [run for each in self._weights for run in self._cut(each)]
        for index, group in enumerate(described):
            group["params"] = [run.parameter for run in self._runs if run.group == index]
        self.optimizer: torch.optim.Optimizer = kind(described, **options)
        vars(self.optimizer)["shards"] = self
        self.optimizer.zero_grad = self._zero_grad  # type: ignore[method-assign]
        self.optimizer.add_param_group = self._add_param_group  # type: ignore[method-assign]
        self._weights[-1].bucket.takers.append(self._offer)
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
        listed = list(groups)
        if not all(isinstance(group, Mapping) for group in listed):
            listed = [{"params": listed}]
        for index, group in enumerate(cast("list[Mapping[str, Any]]", listed)):
            described.append({key: value for key, value in group.items() if key != "params"})
            members: list[Any] = [parameter for parameter in parameters_of(group, index) if parameter.requires_grad]
            if len({id(parameter) for parameter in members}) < len(members):
                raise InvalidArgument(f"optimizer: group {index} has a parameter twice")
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
                members = [at for at, offset in enumerate(bucket.offsets) if start <= offset < edges[slot + 1]]
                runs.append(Run(weights, group, where, nn.Parameter(weights.master[where]), members))
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
        for run in self._runs:
            run.parameter.grad = None

    def _add_param_group(self, param_group: dict[str, Any]) -> None:
        raise InvalidArgument(
            "optimizer.add_param_group: the parameters of a DataParallel are sorted into groups once, where its "
            "optimizer is made: give all of them to optimizer(kind, groups); options of a group may be changed in "
            "param_groups"
        )

    def _offer(self) -> None:
        """After finish(): what GradScaler finds. step() takes the gradients themselves."""
        self._not_finite = None
        for run in self._runs:
            run.parameter.grad = ReducedGradient(
                run.parameter, f"{run.weights.bucket.names[run.members[0]]} and others", partial(_gradient, run), [],
                whole=False, alone=False, unscale=self._unscale,
            )  # fmt: skip

    @torch.no_grad()
    def _unscale(self, parts: list[Tensor], found_inf: Tensor, inverse: Tensor) -> None:
        """Of GradScaler: all ranks step, or none does."""
        if self._not_finite is None:
            bad = not all(_gradient(run).isfinite().all() for run in self._runs)
            self._not_finite = self._everyone.all_reduce(torch.tensor([float(bad)]), op="max")
        torch._amp_foreach_non_finite_check_and_unscale_(parts, found_inf, inverse)
        found_inf.fill_(float(self._not_finite))

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        result = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            result = (args[:1], {**kwargs, "closure": lambda: loss})
        if any(weights.bucket.gradient is None for weights in self._weights):
            raise Error("optimizer.step() came before the first finish(): there are no reduced gradients yet")
        there = {id(weights): weights.bucket.take_up() for weights in self._weights}
        self._settle()
        for run in self._runs:
            kept = [there[id(run.weights)][slot] for slot in run.members]
            if any(kept) and not all(kept):
                name = run.weights.bucket.names[run.members[kept.index(False)]]
                raise InvalidArgument(
                    f"optimizer.step(): the gradient of '{name}' was set to None after finish(), those of its group "
                    "were not; leave all of a group out of a step, or give the parameter a group of its own"
                )
        for run in self._runs:
            run.parameter.grad = run.gradient if there[id(run.weights)][run.members[0]] else None
        return result

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
        self._settle()
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
        self._settle()
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


def _gradient(run: Run) -> Tensor:
    return cast("Tensor", run.gradient)


def parameters_of(group: Mapping[str, Any], index: int) -> list[Tensor]:
    """Those of a group as torch takes them: a tensor, or tensors, or (name, tensor) pairs."""
    if "params" not in group:
        raise InvalidArgument(f"optimizer: group {index} has {sorted(group)}, expected 'params'")
    given = group["params"]
    listed = [given] if isinstance(given, Tensor) else list(given)
    found = [each[1] if isinstance(each, tuple) else each for each in listed]
    for each in found:
        if not isinstance(each, Tensor):
            raise InvalidArgument(f"optimizer: group {index} has a {type(each).__name__}, expected parameters")
    return found


def _expect_all(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Of optimizers made by hand."""
    if shards_of(optimizer) is not None:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for gradient in (parameter.grad for parameter in parameters):
        if isinstance(gradient, ReducedGradient) and not gradient.whole:
            raise refused(gradient, f"{type(optimizer).__name__}.step()")
    if type(optimizer) not in BY_ELEMENT and any(shard_of(parameter) is not None for parameter in parameters):
        raise InvalidArgument(
            f"{type(optimizer).__name__}.step(): a parameter is a shard of a tensor-parallel model, and the optimizer "
            "may look at its shape or norm; where it treats every element by itself, make it with "
            "parallel.optimizer(kind, ..., elementwise=True)"
        )


register_optimizer_step_pre_hook(_expect_all)


def shards_of(optimizer: torch.optim.Optimizer) -> Shards | None:
    """What moves its gradients and states; None for an optimizer over a module's own parameters."""
    return cast("Shards | None", getattr(optimizer, "shards", None))
