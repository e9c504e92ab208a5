"""The law of twice: a kernel errs at most twice as much as the eager version of the same dtype, both against float64.

(The rule of flash-attention's tests.) Both get the same inputs, rounded to the dtype; so do the gradients that come in.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from paracomm.kernels import config, select

Function = Callable[..., Tensor | tuple[Tensor, ...]]

ULPS, LEAST = 2, 1.0
"""Ulp of the largest value, or of LEAST where that is larger (inputs are about 1): an eager result that happens to be
exact, as a gradient that is 0, is no reason to fail."""


@dataclass(frozen=True)
class Errors:
    """Largest and root of mean squared error against float64, of ours and the eager version; `ulp` of the largest."""

    name: str
    ours: tuple[float, float]
    eager: tuple[float, float]
    ulp: float

    def broken(self) -> str | None:
        for kind, ours, eager in zip(("largest", "rms"), self.ours, self.eager, strict=True):
            if not ours <= 2 * eager + ULPS * self.ulp:
                return f"{self.name}: {kind} error {ours:.3g}, the eager one's is {eager:.3g}, an ulp {self.ulp:.1g}"
        return None


def errors(ours: Function, eager: Function, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Errors]:
    """Of every output and of the gradient of every floating-point input; inputs are float64, rounded to `dtype`."""
    rounded = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    grads: list[Tensor] = []
    results = []
    for function, kind in ((eager, torch.float64), (eager, dtype), (ours, dtype)):
        leaves = [x.to(kind).detach().requires_grad_() if x.is_floating_point() else x for x in rounded]
        with config.override(**getattr(function, "configs", {})):  # of backward too
            outputs = function(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            if not grads:
                generator = torch.Generator().manual_seed(1)
                grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype) for o in outputs]
            pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
            wanted = [x for x in leaves if x.requires_grad]
            found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs]) if pairs else ()
        results.append([*(o.detach() for o in outputs), *found])
    names = [f"output {i}" for i in range(len(grads))] + [
        f"gradient of input {i}" for i, x in enumerate(rounded) if x.is_floating_point()
    ]
    return [_compare(name, exact, theirs, own) for name, exact, theirs, own in zip(names, *results, strict=False)]


def _compare(name: str, exact: Tensor, eager: Tensor, ours: Tensor) -> Errors:
    assert ours.shape == exact.shape and ours.dtype == eager.dtype, f"{name}: {ours.shape} {ours.dtype}"
    hidden = exact.isinf()
    assert torch.equal(ours.double()[hidden], exact[hidden]), f"{name}: infinities differ"
    measures = []
    for x in (ours, eager):
        off = (x.double() - exact).masked_fill(hidden, 0.0)
        largest = float(off.abs().max()) if off.numel() else 0.0
        measures.append((largest, float(off.square().mean().sqrt()) if off.numel() else 0.0))
    top = float(exact.masked_fill(hidden, 0.0).abs().max()) if exact.numel() else 0.0
    return Errors(name, measures[0], measures[1], max(top, LEAST) * torch.finfo(ours.dtype).eps)


def twice(ours: Function, eager: Function, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Asserts the law."""
    broken = [why for each in errors(ours, eager, inputs, dtype) if (why := each.broken())]
    assert not broken, "; ".join(broken)


def interpreted(function: Function, **configs: dict[str, int]) -> Function:
    """`function` by the kernels, at these configurations."""

    def run(*inputs: Tensor) -> Any:
        with select.backend("triton"), config.override(**configs):
            return function(*inputs)

    run.configs = configs  # type: ignore[attr-defined]
    return run


_numbers = itertools.count()
_folder = tempfile.TemporaryDirectory(prefix="mutants")


def mutate(module: ModuleType, old: str, new: str) -> ModuleType:
    """A module of the source of `module` in which `old`, which must be there, is `new`; under a name of its own."""
    path = Path(str(module.__file__))
    source = path.read_text()
    assert old in source, f"{path.name} has no {old!r} to change"
    assert old != new, f"{old!r} is changed to itself"
    name = f"{module.__name__}_mutant{next(_numbers)}"
    # A file, which stays: Triton reads a kernel's source when it is called.
    changed = Path(_folder.name) / f"{name.rsplit('.', 1)[-1]}.py"
    changed.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, changed)
    assert spec is not None and spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[name] = mutant
    spec.loader.exec_module(mutant)
    return mutant
