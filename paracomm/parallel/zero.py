"""ZeRO 3: parameters are gathered ahead of their use, a unit at a time, and released after it.

A unit is a module, usually a block of a Transformer; what belongs to no unit, or to several (tied weights), belongs to
the root, which is there from the beginning of forward to the end of backward.

    forward    | gather 0 | block 0  | block 1  | block 2 |
    wire                  [ gather 1 ][ gather 2 ]
    released                         0          1            (2 stays: backward begins with it)
    backward   | block 2  | block 1  | block 0  | root |
    wire       [ gather 1 ][ gather 0 ]
    released              2          1          0

What autograd saves for backward of a gathered parameter is not the memory, which is about to be given back, but a note
where it lay; reading the note in backward gathers the unit, should that not have happened yet. A parameter that is read
outside of its unit's forward gathers its unit too. Every rank has to use the same units in the same order.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from paracomm.errors import InvalidArgument
from paracomm.parallel.bucket import Bucket
from paracomm.parallel.reduction import Recycler
from paracomm.parallel.weights import Weights

ROOT = ""


def find_units(module: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Names of the modules that are units: those that match a pattern of `names`, or each child of a ModuleList.

    Raises InvalidArgument for a pattern that matches nothing, and for a unit inside of another.
    """
    known = [name for name, _ in module.named_modules() if name]
    if names is None:
        lists = [name for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
        units: list[str] = []
        for name in lists:
            if not any(_inside(name, unit) for unit in units):
                units += [f"{name}.{index}".lstrip(".") for index in range(len(module.get_submodule(name)))]  # type: ignore[arg-type]
        return units
    for pattern in names:
        if not fnmatch.filter(known, pattern):
            raise InvalidArgument(f"ZeRO 3: no module is called '{pattern}'; there are {', '.join(known)}")
    units = [name for name in known if any(fnmatch.fnmatchcase(name, pattern) for pattern in names)]
    for unit in units:
        for other in units:
            if other != unit and _inside(unit, other):
                raise InvalidArgument(f"ZeRO 3: unit '{unit}' lies inside of unit '{other}'; name one of them")
    return units


def _inside(name: str, unit: str) -> bool:
    return name == unit or name.startswith(unit + ".")


def unit_of_parameters(module: nn.Module, units: Sequence[str]) -> dict[str, str]:
    """The unit of every parameter, by the name that named_parameters() gives; ROOT for none or several."""
    owners: dict[nn.Parameter, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        unit = next((unit for unit in units if _inside(name, unit)), ROOT)
        owners.setdefault(parameter, set()).add(unit)
    found = {}
    for name, parameter in module.named_parameters():
        of = owners[parameter]
        found[name] = next(iter(of)) if len(of) == 1 else ROOT
    return found


class Unit:
    """Buckets that are gathered and released together."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.weights: list[Weights] = []
        self.works: list[Any] = []
        self.started = False
        self.ready = False


class _Guarded(dict[str, Any]):
    """The parameters of a module of a unit: whoever reads one in forward or backward finds it gathered."""

    def __init__(self, parameters: dict[str, Any], units: Units) -> None:
        super().__init__(parameters)
        self._units = units

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        if self._units.running or _in_backward():
            self._units.reach(parameter)
        return parameter


class Units:
    """The units of `module`, whose parameters lie in `weights`."""

    def __init__(
        self, module: nn.Module, names: Sequence[str], weights: Iterable[Weights], unit_of: dict[str, str]
    ) -> None:
        self.running = 0
        self._units = {name: Unit(name) for name in (ROOT, *names)}
        self._of: dict[int, Unit] = {}
        self._memory = Recycler()
        self._saving: list[Any] = []
        for each in weights:
            unit = self._units[unit_of[each.bucket.names[0]]]
            unit.weights.append(each)
            self._of |= {id(parameter): unit for parameter in each.bucket.members}
        self._unit_of_bucket = {each.bucket.position: unit for unit in self._units.values() for each in unit.weights}
        order = [self._units[name] for name in names if self._units[name].weights]
        self._next = dict(itertools.pairwise(order))
        self._previous = {later: earlier for earlier, later in self._next.items()}
        self._first: Unit | None = order[0] if order else None
        self._last: Unit | None = order[-1] if order else None
        for unit in order:
            part = module.get_submodule(unit.name)
            part.register_forward_pre_hook(self._before(unit))
            part.register_forward_hook(self._after(unit))
            for owner in part.modules():
                object.__setattr__(owner, "_parameters", _Guarded(owner._parameters, self))
        module.register_forward_pre_hook(self._before_all)
        module.register_forward_hook(self._after_all, always_call=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise InvalidArgument(
            "copy.deepcopy: a module under ZeRO 3 holds none of its parameters, and neither would a copy. For an "
            "average of the weights (EMA, SWA) call parallel.average(decay); for their values, module.state_dict()"
        )

    # --- one unit ---
    def _start(self, unit: Unit) -> None:
        if unit.started:
            return
        for each in unit.weights:
            bucket = each.bucket
            full = self._memory.take(bucket.comm, bucket.count, bucket.members[0], bucket.dtype)
            unit.works.append(each.start_gather(full))
        unit.started = True

    def _ensure(self, unit: Unit) -> None:
        if unit.ready:
            return
        self._start(unit)
        for work in unit.works:
            if work is not None:
                work.wait()
        unit.works = []
        unit.ready = True

    def _release(self, unit: Unit) -> None:
        if not unit.started:
            return
        self._ensure(unit)
        for each in unit.weights:
            full = each.release()
            if full is not None:
                self._memory.give_back(full)
        unit.started = unit.ready = False

    def reach(self, parameter: Tensor) -> None:
        """Gathers the unit of a parameter."""
        unit = self._of.get(id(parameter))
        if unit is not None:
            self._ensure(unit)

    def gradients_arrived(self, bucket: Bucket) -> None:
        """Releases the unit of `bucket` when backward has all of its gradients."""
        unit = self._unit_of_bucket[bucket.position]
        if unit.name != ROOT and all(each.bucket.missing == 0 for each in unit.weights):
            self._release(unit)

    # --- all of them ---
    def gather_all(self) -> None:
        """Makes every parameter whole."""
        for unit in self._units.values():
            self._start(unit)
        for unit in self._units.values():
            self._ensure(unit)

    def release_all(self) -> None:
        """Gives back everything that is gathered: what follows reads the parameters anew."""
        for unit in self._units.values():
            self._release(unit)

    def held(self) -> list[Tensor]:
        """Memory that waits for the next unit."""
        return self._memory.held()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Every parameter is whole inside."""
        self.gather_all()
        try:
            yield
        finally:
            self.release_all()

    # --- forward and backward ---
    def _before_all(self, module: nn.Module, args: Any) -> None:
        self.running += 1
        self._ensure(self._units[ROOT])
        if self._first is not None:
            self._start(self._first)
        saving = saved_tensors_hooks(self._pack, self._unpack) if torch.is_grad_enabled() else None
        self._saving.append(saving)
        if saving is not None:
            saving.__enter__()

    def _after_all(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._saving:  # forward failed before it began
            return
        saving = self._saving.pop()
        self.running -= 1
        if saving is not None:
            saving.__exit__(None, None, None)
        elif not _in_backward() and not self.running:
            self.release_all()

    def _before(self, unit: Unit) -> Any:
        def gather(module: nn.Module, args: Any) -> None:
            self._ensure(unit)
            self._ahead((self._previous if _in_backward() else self._next).get(unit))

        return gather

    def _after(self, unit: Unit) -> Any:
        def release(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(self._backward(unit))
            if not _in_backward() and not (unit is self._last and torch.is_grad_enabled()):
                self._release(unit)

        return release

    def _backward(self, unit: Unit) -> Any:
        def gather(gradient: Tensor) -> None:
            self._ensure(unit)
            self._ahead(self._previous.get(unit))

        return gather

    def _ahead(self, unit: Unit | None) -> None:
        if unit is not None:
            self._start(unit)

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.layout != torch.strided:
            return tensor
        address = tensor.data_ptr()
        for unit in self._units.values():
            if unit.ready:
                for each in unit.weights:
                    full = each.full
                    assert full is not None
                    offset = address - full.data_ptr()
                    if 0 <= offset < full.nbytes:
                        return unit, each, offset // full.itemsize, tensor.size(), tensor.stride()
        return tensor

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        unit, each, offset, size, stride = packed
        self._ensure(unit)
        full = each.full
        found: Tensor = full.as_strided(size, stride, full.storage_offset() + offset)
        return found


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for each in output.values():
            yield from _tensors(each)
    elif isinstance(output, (list, tuple)):
        for each in output:
            yield from _tensors(each)
