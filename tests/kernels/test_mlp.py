"""The MLP's operations by their eager twins, which run on a CPU; torch.compile and opcheck; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paracomm.errors import Error, InvalidArgument
from paracomm.kernels import mlp, select
from paracomm.kernels.reference import ACTIVATIONS


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((6, 12), (8, 12), (8, 12), (8,), (8,), (6, 8))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_the_operations_are_the_twins(activation: str | None) -> None:
    """What the kernels are called by, on a CPU, with the backward that is written out."""
    x, w, v, b, c, r = inputs()
    name = activation or "none"
    pairs: list[tuple[Tensor, Tensor, list[Tensor]]] = [
        (mlp._linear_op(x, w, b, name, r, True)[0], mlp.linear(x, w, b, activation, r), [x, w, b, r]),
        (mlp._linear_op(x, w, None, name, None, True)[0], mlp.linear(x, w, None, activation), [x, w]),
    ]
    if activation is not None:
        pairs += [
            (mlp._glu_op(x, w, v, b, c, activation, True)[0], mlp.glu(x, w, v, b, c, activation), [x, w, v, b, c]),
            (mlp._gated_op(r, r.sin(), activation), mlp.gated(r, r.sin(), activation), [r]),
            (mlp._active_op(r, activation), mlp.activate(r, activation), [r]),
        ]
    for ours, twin, wanted in pairs:
        torch.testing.assert_close(ours, twin)
        for a, e in zip(
            torch.autograd.grad(ours.sin().sum(), wanted), torch.autograd.grad(twin.sin().sum(), wanted), strict=True
        ):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_twins_are_torchs_own() -> None:
    x, w, v, _, _, r = inputs()
    assert torch.equal(mlp.linear(x, w), F.linear(x, w))
    assert torch.equal(mlp.linear(x, w, activation="gelu", residual=r), F.gelu(F.linear(x, w)) + r)
    assert torch.equal(mlp.glu(x, w, v), F.silu(F.linear(x, w)) * F.linear(x, v))


def test_opcheck() -> None:
    x, w, v, b, c, r = inputs()
    torch.library.opcheck(mlp._linear_op, (x, w, b, "gelu", r, True))
    torch.library.opcheck(mlp._linear_op, (x, w, None, "none", None, False))
    torch.library.opcheck(mlp._glu_op, (x, w, v, b, c, "silu", True))
    torch.library.opcheck(mlp._gated_op, (r, r.detach().clone().requires_grad_(), "gelu"))
    torch.library.opcheck(mlp._active_op, (r, "relu"))
    plain = [t.detach() for t in (x, w, v, r)]
    torch.library.opcheck(mlp._sum_op, (plain[3], plain[1], plain[3], plain[2]))
    torch.library.opcheck(mlp._gated_backward_op, (plain[3], plain[3], plain[3], "silu"))
    torch.library.opcheck(mlp._active_backward_op, (plain[3], plain[3], "silu"))


@pytest.mark.slow
def test_torch_compile_sees_through() -> None:
    """One graph, no break, twin and operation alike; the same results."""

    def forward(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return mlp.linear(mlp.glu(x, w, v), w.t().contiguous(), activation="gelu")

    def by_operations(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return mlp._linear_op(
            mlp._glu_op(x, w, v, None, None, "silu", True)[0], w.t().contiguous(), None, "gelu", None, True
        )[0]

    for function in (forward, by_operations):
        x, w, v, *_ = inputs()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        expected = function(x, w, v)
        found = compiled(x, w, v)
        torch.testing.assert_close(found, expected)
        for a, e in zip(
            torch.autograd.grad(found.sum(), (x, w, v)), torch.autograd.grad(expected.sum(), (x, w, v)), strict=True
        ):
            torch.testing.assert_close(a, e)


REFUSALS: list[tuple[Any, str]] = [
    (lambda x, w, b, r: mlp.linear(x, w[:, :3]), r"weight \[8, 3\]"),
    (lambda x, w, b, r: mlp.linear(x, w.double()), "torch.float64"),
    (lambda x, w, b, r: mlp.linear(x, w, b[:3]), r"bias \[3\]"),
    (
        lambda x, w, b, r: mlp.linear(x, w, b, "swish"),
        "activation is 'swish', expected one of gelu, gelu_tanh, relu, silu",
    ),
    (lambda x, w, b, r: mlp.linear(x, w, residual=r[:2]), r"residual \[2, 8\]"),
    (lambda x, w, b, r: mlp.glu(x, w, w[:4]), "expected as large"),
    (lambda x, w, b, r: mlp.glu(x, w, w, b), "both or none"),
    (lambda x, w, b, r: mlp.gated(x, r), "expected alike"),
    (lambda x, w, b, r: mlp.activate(x, "tanh"), "activation is 'tanh'"),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS, ids=[message for _, message in REFUSALS])
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    x, w, _, b, _, r = inputs()
    with pytest.raises(InvalidArgument, match=message):
        call(x, w, b, r)


@pytest.mark.skipif(select.interpreted(), reason="this process interprets kernels on CPU tensors")
def test_kernels_asked_for_where_there_are_none() -> None:
    x, w, *_ = inputs()
    with select.backend("triton"), pytest.raises(Error, match="backend 'triton' was asked for, but tensors are on cpu"):
        mlp.linear(x, w)
    with pytest.raises(InvalidArgument, match="backend is 'cuda', expected one of auto, triton, eager"):
        select.set_backend("cuda")  # type: ignore[arg-type]
