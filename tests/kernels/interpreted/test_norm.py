"""Residual and norm under the law of twice: several rows a program, ragged rows and columns, wide rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paracomm.kernels import config, norm_kernels, select
from paracomm.kernels.norm import _forward_op, add_norm
from tests.kernels.law import interpreted, mutate, twice

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def configs(BM: int, BN: int, programs: int) -> dict[str, dict[str, int]]:
    row = {"BM": BM, "BN": BN, "warps": 1, "stages": 1, "programs": programs}
    return dict.fromkeys(("add_norm_forward", "add_norm_backward", "add_norm_backward_wide"), row)


@dataclass(frozen=True)
class Shape:
    N: int
    D: int
    kind: Any
    residual: bool
    bias: bool
    BM: int = 4
    BN: int = 32
    programs: int = 3
    eps: float = 1e-5

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.D)
        shapes = [(self.N, self.D)] * (1 + self.residual) + [(self.D,)] * (1 + self.bias)
        return [torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3 for shape in shapes]

    def unpacked(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        left = list(inputs)
        x = left.pop(0)
        residual = left.pop(0) if self.residual else None
        return x, residual, left.pop(0), left.pop(0) if self.bias else None

    def __str__(self) -> str:
        extras = "+residual" * self.residual + "+bias" * self.bias
        return f"{self.N}x{self.D} {self.kind}{extras} {self.BM}x{self.BN} {self.programs}"


SHAPES = [
    Shape(10, 32, "rms", True, False),
    Shape(13, 29, "rms", True, False),
    Shape(13, 29, "layer", True, True),
    Shape(1, 17, "layer", False, True),
    Shape(1, 32, "rms", False, False),
    Shape(37, 24, "rms", False, True, programs=2),
    Shape(37, 7, "layer", True, False, BM=8),
    Shape(5, 1, "rms", True, True, eps=0.5),
    Shape(9, 70, "layer", True, True),
    Shape(9, 64, "rms", True, False, BM=2),
    Shape(7, 97, "rms", False, False, BM=1),
    Shape(6, 33, "layer", False, False, BM=2, programs=1),
    Shape(150, 16, "layer", True, True, BM=16, BN=16, programs=4),
]


def eager(shape: Shape) -> Any:
    """In its own dtype, as a model is written."""

    def run(*inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x, residual, weight, bias = shape.unpacked(inputs)
        total = x if residual is None else x + residual
        if shape.kind == "layer":
            normed = F.layer_norm(total, (shape.D,), weight, bias, shape.eps)
        else:
            normed = total * (total.square().mean(-1, keepdim=True) + shape.eps).rsqrt() * weight
            normed = normed if bias is None else normed + bias
        return normed if residual is None else (normed, total)

    return run


def ours(shape: Shape) -> Any:
    def run(*inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x, residual, weight, bias = shape.unpacked(inputs)
        normed, total = add_norm(x, residual, weight, bias, eps=shape.eps, kind=shape.kind)
        if residual is None:
            assert total is x
            return normed
        return normed, total

    return interpreted(run, **configs(shape.BM, shape.BN, shape.programs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_law_of_twice(shape: Shape, dtype: torch.dtype) -> None:
    twice(ours(shape), eager(shape), shape.inputs(), dtype)


@pytest.mark.parametrize("D", [29, 70])
def test_a_mean_far_from_zero(D: int) -> None:
    """The variance is taken about the mean: a mean of squares less the mean's square would be off by 0.1 here."""
    shape = Shape(6, D, "layer", True, True)
    x, *rest = shape.inputs()
    exact, _ = eager(shape)(x + 1000.0, *rest)
    found, _ = ours(shape)((x + 1000.0).float(), *(t.float() for t in rest))
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-3)


def test_strides_and_leading_dimensions() -> None:
    x = torch.randn(3, 40, 5).transpose(1, 2)  # last dimension not contiguous
    wide = torch.randn(3, 5, 80)[..., :40]
    weight = torch.randn(40)
    with select.backend("triton"), config.override(**configs(4, 64, 3)):
        expected = add_norm(x.contiguous(), wide.contiguous(), weight, kind="rms")
        found = add_norm(x, wide, weight, kind="rms")
    assert found[0].shape == (3, 5, 40)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_only_one_of_the_outputs_is_used() -> None:
    x, residual, weight = (t.float().requires_grad_() for t in Shape(6, 20, "rms", True, False).inputs())
    with select.backend("triton"), config.override(**configs(4, 32, 2)):
        normed, total = add_norm(x, residual, weight)
        of_sum = torch.autograd.grad(total.sum(), (x, residual), retain_graph=True)
        of_normed = torch.autograd.grad(normed.sin().sum(), (x, weight))
    assert torch.equal(of_sum[0], torch.ones_like(x)) and torch.equal(of_sum[1], of_sum[0])
    with select.backend("eager"):
        expected = torch.autograd.grad(add_norm(x, residual, weight)[0].sin().sum(), (x, weight))
    torch.testing.assert_close(of_normed, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("D", [24, 70])
def test_the_same_bits_each_time(D: int) -> None:
    leaves = [t.bfloat16().requires_grad_() for t in Shape(37, D, "layer", True, True).inputs()]
    runs = []
    with select.backend("triton"), config.override(**configs(4, 32, 3)):
        for _ in range(2):
            normed, total = add_norm(*leaves, kind="layer")
            runs.append((normed, *torch.autograd.grad((normed * total).float().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_opcheck(kind: Any) -> None:
    x, residual, weight, bias = (t.float().requires_grad_() for t in Shape(5, 40, kind, True, True).inputs())
    with select.backend("triton"), config.override(**configs(4, 32, 2)):
        torch.library.opcheck(_forward_op, (x, residual, weight, bias, 1e-5, kind == "layer"))
        torch.library.opcheck(_forward_op, (x, None, weight, None, 1e-5, kind == "layer"))


@pytest.mark.slow
def test_compile_sees_through() -> None:
    """One graph, the same bits."""
    x, residual, weight = (t.float().requires_grad_() for t in Shape(5, 40, "rms", True, False).inputs())
    compiled = torch.compile(add_norm, backend="aot_eager", fullgraph=True)
    with select.backend("triton"), config.override(**configs(4, 32, 2)):
        runs = []
        for function in (add_norm, compiled):
            normed, total = function(x, residual, weight)
            runs.append((normed, total, *torch.autograd.grad((normed * total).sum(), (x, residual, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_nothing_to_do() -> None:
    x, weight = torch.empty(2, 0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    with select.backend("triton"):
        normed, total = add_norm(x, x * 2, weight, weight * 2, kind="layer")
        grads = torch.autograd.grad(normed.sum() + total.sum(), (x, weight))
    assert normed.shape == total.shape == (2, 0, 8) and not grads[1].any() and grads[0].shape == x.shape


MUTANTS = {
    "eps within the mean is lost": ("tl.sum(off * off, 1) / D + eps", "tl.sum(off * off, 1) / D"),
    "the residual is not added": ("s = (s.to(tl.float32) + other.to(tl.float32)).to(s.dtype)", "s = s"),
    "the tail counts in the variance": ("tl.where((n < D)[None, :], s - mean[:, None], 0.0)", "s - mean[:, None]"),
    "the mean of dy weight is not taken off": ("along = tl.sum(wg, 1) / D", "along = along"),
    "the part along h is not taken off": ("- h * across[:, None]", ""),
    "the gradient of the sum is lost": ("dx += tl.load(GRAD_SUM", "dx += 0.0 * tl.load(GRAD_SUM"),
    "dweight of the last rows only": ("dweight += g * h\n        if", "dweight = g * h\n        if"),
    "a program forgets its last rows": ("tl.minimum(first + rows_each, N), BM", "tl.minimum(first + BM, N), BM"),
    "the last block of a wide row is left out": (
        "for column in range(0, D, BN):\n            g, h", "for column in range(0, D - BN, BN):\n            g, h"
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_kernel_breaks_the_law(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = mutate(norm_kernels, *change)
    monkeypatch.setattr(norm_kernels, "launch_forward", mutant.launch_forward)
    monkeypatch.setattr(norm_kernels, "launch_backward", mutant.launch_backward)
    shapes = [Shape(13, 29, "layer", True, True, eps=0.1), Shape(9, 70, "layer", True, True, eps=0.1)]
    with pytest.raises((AssertionError, IndexError)):
        for shape in shapes:
            twice(ours(shape), eager(shape), shape.inputs(), torch.float32)
