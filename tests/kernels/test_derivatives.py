"""All operations under what torch can do with a function: second derivatives, torch.func, vmap, autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paracomm.errors import Error
from paracomm.kernels import attention_backward, derivatives
from tests.kernels.operations import CASES, LENGTHS, MIXTURES, Case, check_autocast, check_lse, counterparts


def outputs(case: Case, *inputs: Tensor) -> tuple[Tensor, ...]:
    found = case.function(*inputs)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_first_and_second_derivatives(case: Case) -> None:
    inputs = case.inputs()
    assert torch.autograd.gradcheck(case.function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(case.function, inputs, fast_mode=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs_that_are_asked_for_by_name(case: Case) -> None:
    """A constant gradient comes in, autograd.grad(..., inputs) goes back: where the graph is lost, nothing raises."""
    inputs = case.inputs()

    def sweep(x: Tensor, *rest: Tensor) -> Tensor:
        firsts = torch.autograd.grad([y.sum() for y in outputs(case, x, *rest)], inputs, create_graph=True)
        return sum((g * torch.linspace(0.5, 2.0, g.numel()).view_as(g)).sum() for g in firsts)  # type: ignore[return-value]

    loss = sweep(*inputs)
    nothing = [None] * len(inputs)  # right only for what is linear
    seconds = torch.autograd.grad(loss, inputs, allow_unused=True) if loss.requires_grad else nothing
    step = 1e-6
    for i, second in enumerate(seconds):
        slopes = []
        for by in (step, -step):
            moved = [t if j != i else (t + by).detach().requires_grad_() for j, t in enumerate(inputs)]
            firsts = torch.autograd.grad([y.sum() for y in outputs(case, *moved)], moved)
            slopes.append(sum(float((g * torch.linspace(0.5, 2.0, g.numel()).view_as(g)).sum()) for g in firsts))
        expected = (slopes[0] - slopes[1]) / (2 * step)
        assert abs((0.0 if second is None else float(second.sum())) - expected) <= 1e-5 * max(1.0, abs(expected)), i


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", [case for case in CASES if "chunked" not in case.name], ids=str)
def test_torch_func(case: Case) -> None:
    """grad, vmap, and grad within vmap, as of torch's own operations. (Within transforms nothing is chunked.)"""
    inputs = case.inputs()

    def loss(*tensors: Tensor) -> Tensor:
        return sum(y.sin().sum() for y in outputs(case, *tensors))  # type: ignore[return-value]

    expected = torch.autograd.grad(loss(*inputs), inputs)
    plain = [x.detach() for x in inputs]
    every = tuple(range(len(inputs)))
    found = torch.func.grad(loss, argnums=every)(*plain)
    for a, e in zip(found, expected, strict=True):
        same(a, e)
    if not case.batched:
        return
    batch = [torch.stack([x, x * 0.5]) if i in case.batched else x for i, x in enumerate(plain)]
    dims = tuple(0 if i in case.batched else None for i in every)
    mapped = torch.func.vmap(lambda *t: outputs(case, *t), dims)(*batch)
    slopes = torch.func.vmap(torch.func.grad(loss, argnums=every), dims)(*batch)
    for row in range(2):
        own = [x[row] if i in case.batched else x for i, x in enumerate(batch)]
        for a, e in zip(mapped, outputs(case, *own), strict=True):
            same(a[row], e)
        leaves = [x.requires_grad_() for x in own]
        for a, e in zip(slopes, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            same(a[row], e)


def test_what_cannot_be_differentiated_says_so() -> None:
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    dq, _, _ = attention_backward(q, q, q, q, q, torch.zeros(1, 1, 3))
    with pytest.raises(Error, match=r"attention_backward: .* cannot be differentiated"):
        torch.autograd.grad(dq.sum(), q)

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @derivatives.once("Doubled")
        def backward(ctx, grad):
            return 2 * grad

    torch.autograd.grad(Doubled.apply(q).sum(), q)
    with pytest.raises(Error, match=r"Doubled: .* create_graph=True, expected False"):
        torch.autograd.grad(Doubled.apply(q).sum(), q, create_graph=True)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("name", counterparts())
def test_autocast(name: str, mixture: str) -> None:
    check_autocast(name, mixture, "eager")


def test_autocast_leaves_lse_in_float32() -> None:
    check_lse("eager")


@pytest.mark.parametrize("check", LENGTHS)
def test_lengths(check) -> None:
    check("eager")
