"""The law of twice can fail, and so can a mutant."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paracomm.kernels import config, select
from tests.kernels.law import ULPS, errors, interpreted, mutate, twice

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def inputs() -> tuple[Tensor, ...]:
    return torch.randn(24, 48).double(), torch.randn(32, 48).double()


def eager(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = F.linear(x, w)
    return torch.tanh(y), y.logsumexp(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_eager_version_obeys(dtype: torch.dtype) -> None:
    twice(eager, eager, inputs(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_computed_in_more_bits_obeys(dtype: torch.dtype) -> None:
    def ours(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(x.double(), w.double())
        return torch.tanh(y).to(x.dtype), y.logsumexp(-1).to(x.dtype)

    twice(ours, eager, inputs(), dtype)


class Off(torch.autograd.Function):
    """x and its gradient, each off by a share of itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_share = backward
        return x * (1 + forward)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * (1 + ctx.backward_share), None, None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("place", "name"), [(0, "output 0"), (1, "gradient of input 0")])
def test_an_error_of_many_ulp_is_found(place: int, name: str, dtype: torch.dtype) -> None:
    share = [0.0, 0.0]
    share[place] = 64 * torch.finfo(dtype).eps

    def ours(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y, lse = eager(Off.apply(x, 0.0, share[1]), w)
        return y * (1 + share[0]), lse

    with pytest.raises(AssertionError, match=rf"^{name}: largest error"):
        twice(ours, eager, inputs(), dtype)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda y: y[:-1], r"Mismatch in shape: grad_output\[0\]"),
        (lambda y: y.double(), "output 0: .* torch.float64"),
        (lambda y: y.masked_fill(torch.eye(24, 32).bool(), torch.nan), "output 0: largest error nan"),
        (lambda y: y.masked_fill(torch.eye(24, 32).bool(), torch.inf), "output 0: largest error inf"),
    ],
)
def test_wrong_shapes_dtypes_and_values_are_found(wrong: Callable[[Tensor], Tensor], message: str) -> None:
    def ours(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y, lse = eager(x, w)
        return (wrong(y), lse) if x.dtype == torch.float32 else (y, lse)

    with pytest.raises((AssertionError, RuntimeError), match=message):
        twice(ours, eager, inputs(), torch.float32)


def test_infinities_must_agree() -> None:
    def hidden(x: Tensor) -> Tensor:
        return x.masked_fill(torch.arange(8) > 4, -torch.inf)

    twice(hidden, hidden, [torch.randn(8).double()], torch.float32)
    with pytest.raises(AssertionError, match="infinities differ"):
        twice(lambda x: x.clone(), hidden, [torch.randn(8).double()], torch.float32)


def test_the_floor_is_a_few_ulp() -> None:
    """An eager version that happens to be exact allows no more than that."""
    (found,) = errors(lambda x: x + 3e-7, lambda x: x + 0, [torch.ones(8).double()], torch.float32)[:1]
    assert found.eager == (0.0, 0.0) and found.broken() is not None
    assert found.ours[0] > ULPS * found.ulp


def test_interpreted_chooses_kernels_and_tiles_inside_only() -> None:
    row = {"BM": 16, "BN": 16, "warps": 1, "stages": 1}
    seen = []

    def failing(x: Tensor) -> Tensor:
        seen.append((select.current(), config.config("attention_forward", 80, "float32", 64)))
        raise KeyError("here")

    with pytest.raises(KeyError):
        interpreted(failing, attention_forward=row)(torch.ones(1))
    assert seen == [("triton", row)] and select.current() == "auto"
    assert config.config("attention_forward", 80, "float32", 64) != row


@pytest.fixture
def doubling(tmp_path: Path) -> ModuleType:
    """A module of one function."""
    path = tmp_path / "doubling.py"
    path.write_text("def double(x):\n    return x + x\n")
    spec = importlib.util.spec_from_file_location("doubling", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_mutant_is_a_changed_copy(doubling: ModuleType) -> None:
    first, second = mutate(doubling, "x + x", "x + x * x"), mutate(doubling, "x + x", "x - x")
    assert [module.double(5) for module in (doubling, first, second)] == [10, 30, 0]
    assert len({module.__name__ for module in (doubling, first, second)}) == 3
    assert "x * x" in inspect.getsource(first.double), "Triton reads the source of a kernel when it is called"


def test_a_mutant_that_changes_nothing_is_refused(doubling: ModuleType) -> None:
    """Else a kernel that was rewritten would have mutants that are itself."""
    with pytest.raises(AssertionError, match=r"doubling\.py has no 'no such text' to change"):
        mutate(doubling, "no such text", "")
    with pytest.raises(AssertionError, match="changed to itself"):
        mutate(doubling, "x + x", "x + x")
