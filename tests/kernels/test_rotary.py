"""Rotary embedding by the eager twin, which is what runs on a CPU, with or without Triton."""

from __future__ import annotations

import pytest
import torch

from paracomm.errors import InvalidArgument
from paracomm.kernels.rotary import _op, rotary
from paracomm.models.layers import Rotary


def test_is_what_the_models_rotate_by() -> None:
    module = Rotary(9, 16, 10000.0)
    x = torch.randn(2, 3, 9, 16)
    cosine, sine = module._table(x)
    assert torch.equal(rotary(x, cosine, sine), module(x))


def test_the_operation_is_the_twin() -> None:
    """And its gradient, which is the transposed operation, is autograd's; twice, too."""
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    tables = torch.randn(2, 5, 8, dtype=torch.float64).unbind()
    expected, found = rotary(x, *tables), _op(x, *tables, False)
    assert torch.equal(found, expected)
    weights = torch.randn_like(x)
    exact, mine = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (expected, found))
    torch.testing.assert_close(mine, exact)
    assert torch.autograd.gradgradcheck(lambda x: _op(x, *tables, False).sin(), x)


def test_opcheck() -> None:
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    tables = torch.randn(2, 3, 8).unbind()
    for transposed in (False, True):
        torch.library.opcheck(_op, (x, *tables, transposed))
        torch.library.opcheck(_op, (x.detach().transpose(1, 2).contiguous().transpose(1, 2), *tables, transposed))


def test_what_does_not_fit() -> None:
    x, table = torch.randn(2, 3, 5, 8), torch.randn(5, 8)
    wrong = {
        r"x \[3, 5, 8\], expected \[B, H, T, K\]": (x[0], table, table),
        r"an even K": (x[..., :7], table[:, :7], table[:, :7]),
        r"cosine \[4, 8\], expected \[5, 8\]": (x, table[:4], table),
        r"sine is torch.float64 on cpu, expected torch.float32": (x, table, table.double()),
    }
    for message, arguments in wrong.items():
        with pytest.raises(InvalidArgument, match=message):
            rotary(*arguments)
