"""Rotary embedding under the law of twice: odd sizes, several positions a program, tables whose halves differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from paracomm.kernels import config, rotary_kernels, select
from paracomm.kernels.rotary import _op, rotary
from tests.kernels.law import interpreted, mutate, twice

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Shape:
    B: int
    H: int
    T: int
    K: int
    BM: int = 8

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.K)
        shapes = ((self.B, self.H, self.T, self.K), (self.T, self.K), (self.T, self.K))
        x, cosine, sine = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return x, cosine, sine

    def __str__(self) -> str:
        return f"{self.B}x{self.H}x{self.T}x{self.K} {self.BM}"


SHAPES = [
    Shape(2, 3, 16, 16),
    Shape(1, 2, 13, 10),
    Shape(2, 1, 1, 64),
    Shape(1, 1, 33, 2, BM=16),
    Shape(1, 2, 9, 48, BM=4),
    Shape(1, 2, 20, 128),
]


def eager(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-high, low], dim=-1) * sine


def check(shape: Shape, dtype: torch.dtype) -> None:
    x, *tables = shape.inputs()
    rounded = [table.to(dtype) for table in tables]
    ours: Any = interpreted(
        lambda x: rotary(x, *(table.to(x.dtype) for table in rounded)),
        rotary={"BM": shape.BM, "warps": 1, "stages": 1},
    )
    twice(ours, lambda x: eager(x, *(table.to(x.dtype) for table in rounded)), [x], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_law_of_twice(shape: Shape, dtype: torch.dtype) -> None:
    check(shape, dtype)


def test_strides() -> None:
    """A part of [B, T, heads, K] as the model has it; a table cut from a wider one, and one that lies across."""
    x = torch.randn(2, 9, 6, 16).transpose(1, 2)[:, 1:4]
    cosine, sine = torch.randn(9, 32)[:, :16], torch.randn(16, 9).mT
    with select.backend("triton"), config.override(rotary={"BM": 4, "warps": 1, "stages": 1}):
        found = rotary(x, cosine, sine)
    assert found.is_contiguous()
    torch.testing.assert_close(found, eager(x, cosine, sine), rtol=0, atol=1e-6)


def test_backward_turns_back() -> None:
    """With true angles, the gradient map undoes the rotation."""
    angles = torch.outer(torch.arange(11.0), torch.tensor([1.0, 0.1, 0.01, 0.001])).repeat(1, 2)
    x = torch.randn(1, 2, 11, 8)
    with select.backend("triton"):
        y = rotary(x.requires_grad_(), angles.cos(), angles.sin())
        (back,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(back, x.detach(), rtol=0, atol=1e-6)


def test_opcheck() -> None:
    x, *tables = (t.float() for t in Shape(1, 2, 9, 12).inputs())
    with select.backend("triton"):
        torch.library.opcheck(_op, (x.requires_grad_(), *tables, False))


def test_nothing_to_do() -> None:
    with select.backend("triton"):
        for shape in ((0, 2, 3, 4), (1, 2, 0, 4)):
            x = torch.randn(shape, requires_grad=True)
            table = torch.ones(shape[2:])
            (grad,) = torch.autograd.grad(rotary(x, table, table).sum(), x)
            assert grad.shape == x.shape


MUTANTS = {
    "the sign of the rotation": ("y_low = low * cos_low - high * sin_low", "y_low = low * cos_low + high * sin_low"),
    "backward is forward": ("if TRANSPOSED:", "if not TRANSPOSED:"),
    "the other half's sine": ("y_low = low * cos_low + high * sin_high", "y_low = low * cos_low + high * sin_low"),
    "one head's features for all": ("+ (bh % H) * x_h", ""),
    "the tail of positions is dropped": ("triton.cdiv(T, row", "max(1, T // row"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_kernel_breaks_the_law(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary_kernels, "launch", mutate(rotary_kernels, *change).launch)
    with pytest.raises((AssertionError, IndexError)):
        check(Shape(1, 2, 13, 10), torch.float32)
