"""Residual and norm by the eager twin, which is what runs on a CPU, with or without Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paracomm.errors import InvalidArgument
from paracomm.kernels.norm import _backward_op, _forward_op, add_norm


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 5, 12), (2, 5, 12), (12,), (12,))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_operation_is_the_twin(kind: Any, residual: bool, bias: bool) -> None:
    """What the kernels are called by, on a CPU: outputs and gradients of the formulas that the kernels have."""
    x, other, weight, offset = inputs(torch.float64)
    r, b = other if residual else None, offset if bias else None
    wanted = [t for t in (x, r, weight, b) if t is not None]
    expected = add_norm(x, r, weight, b, eps=0.1, kind=kind)
    normed, total, mean, rstd = _forward_op(
        *(None if t is None else t.float() for t in (x, r, weight, b)), 0.1, kind == "layer"
    )
    found = (normed, total if residual else x.float())
    assert rstd.shape == (10,) and mean.shape == ((10,) if kind == "layer" else (0,))
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)
    loss = sum((o.double() * (i + 1)).sin().sum() for i, o in enumerate(found))
    exact = sum((o * (i + 1)).sin().sum() for i, o in enumerate(expected))
    for a, e in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(exact, wanted), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_is_torchs_own() -> None:
    x, residual, weight, bias = inputs()
    normed, total = add_norm(x, residual, weight, bias, eps=1e-6, kind="layer")
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, F.layer_norm(x + residual, (12,), weight, bias, 1e-6))


def test_rms_is_torchs_own_to_rounding() -> None:
    x, _, weight, _ = inputs()
    normed, total = add_norm(x, None, weight, eps=1e-6)
    exact = F.rms_norm(x, (12,), weight, 1e-6)
    assert total is x
    torch.testing.assert_close(normed, exact)
    found, expected = (torch.autograd.grad(y.sin().sum(), (x, weight)) for y in (normed, exact))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layer", [False, True])
def test_opcheck(layer: bool) -> None:
    x, residual, weight, bias = inputs()
    torch.library.opcheck(_forward_op, (x, residual, weight, bias, 1e-5, layer))
    torch.library.opcheck(_forward_op, (x, None, weight, None, 1e-5, layer))
    x, residual, weight = x.detach(), residual.detach(), weight.detach()
    rstd = torch.rand(10)
    mean = torch.rand(10) if layer else torch.empty(0)
    torch.library.opcheck(_backward_op, (x, residual, residual, weight, mean, rstd, True))
    torch.library.opcheck(_backward_op, (x, None, residual, weight, mean, rstd, False))


def test_what_does_not_fit() -> None:
    x, residual, weight, bias = (t.detach() for t in inputs())
    wrong: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        r"kind is 'group', expected one of rms, layer": ((x, residual, weight), {"kind": "group"}),
        r"eps is -1, expected at least 0": ((x, residual, weight), {"eps": -1}),
        r"x \[\], expected": ((x[0, 0, 0], None, weight), {}),
        r"residual \[5, 12\], expected \[2, 5, 12\]": ((x, residual[0], weight), {}),
        r"weight \[11\], expected \[12\]": ((x, None, weight[1:]), {}),
        r"bias \[1\], expected \[12\]": ((x, None, weight, bias[:1]), {}),
        r"weight is torch.float16 on cpu, expected torch.float32 on cpu": ((x, None, weight.half()), {}),
    }
    for message, (arguments, options) in wrong.items():
        with pytest.raises(InvalidArgument, match=message):
            add_norm(*arguments, **options)
