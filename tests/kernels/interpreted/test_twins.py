"""Kernels and their eager twins are one operation: the same results, dtypes, devices and errors, whatever is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from paracomm import kernels
from paracomm.errors import Error, InvalidArgument
from paracomm.kernels import Backend
from tests.kernels.operations import CASES, LENGTHS, Case, check_autocast, check_lse, counterparts


@dataclass(frozen=True)
class Call:
    """An operation with tensors by name."""

    name: str
    function: Callable[..., Any]
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def calls() -> list[Call]:
    generator = torch.Generator().manual_seed(5)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, z, w, b, y = some(3, 2, 8), some(3, 2, 8), some(6, 8), some(6), some(3, 2, 6)
    q, k, v = some(2, 2, 3, 8), some(2, 1, 5, 8), some(2, 1, 5, 8)
    packed = {"q": some(1, 2, 7, 8), "k": some(1, 1, 9, 8), "v": some(1, 1, 9, 8)}
    edges = {"cu_q": _int32(0, 3, 3, 5), "cu_k": _int32(0, 2, 4, 8)}
    rows, targets = some(4, 8), torch.tensor([5, 0, -100, 2])
    mask = torch.rand(2, 5, generator=generator) > 0.4
    drop = kernels.Dropout(3, 1, 2, 0.3, torch.arange(2), (0, 2))
    all_options = {"causal": True, "dropout": drop, "window": 2, "softcap": 3.0}

    def norm(x, weight, residual=None, bias=None, **options):
        return kernels.add_norm(x, residual, weight, bias, **options)

    def head(x, weight, targets, bias=None, **options):
        return kernels.linear_cross_entropy(x, weight, bias, targets, **options)

    def part(x, weight, targets, bias=None):
        return kernels.partial_cross_entropy(x, weight, bias, targets)

    return [
        Call("rms", norm, {"x": x, "weight": b.new_ones(8)}),
        Call("add layer", norm, {"x": x, "residual": z, "weight": some(8), "bias": some(8)}, {"kind": "layer"}),
        Call("linear", kernels.linear, {"x": x, "weight": w}),
        Call("linear relu", kernels.linear, {"x": x, "weight": w, "bias": b, "residual": y}, {"activation": "relu"}),
        Call("glu", kernels.glu, {"x": x, "w_gate": w, "w_up": some(6, 8), "bias_gate": b, "bias_up": some(6)}),
        Call("gated", kernels.gated, {"gate": x, "up": z}),
        Call("relu", kernels.activate, {"x": x}, {"activation": "relu"}),
        Call("attention", kernels.attention, {"q_BHTK": q, "k_BGSK": k, "v_BGSK": v, "key_mask": mask}, all_options),
        Call("packed", lambda q, k, v, **o: kernels.attention(q, k, v, max_q=3, max_k=4, **o), {**packed, **edges}),
        Call("decode", kernels.decode, {"q_BHTK": q, "k_BGSK": k, "v_BGSK": v, "lengths": _int32(4, 2)}, {"window": 3}),
        Call("rotary", kernels.rotary, {"x_BHTK": q, "cosine_TK": some(3, 8), "sine_TK": some(3, 8)}),
        Call("head", head, {"x": rows, "weight": w, "targets": targets, "bias": b}),
        Call("part", part, {"x": rows, "weight": w, "targets": targets}),
    ]  # fmt: skip


CALLS = calls()


# --- odd tensors: of a tensor that fits ---
def _lazily_negated(x: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(x), -x).conj().imag if x.is_floating_point() else x


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


ODD: dict[str, Callable[[Tensor], Any]] = {
    "as it is": lambda x: x,
    "across": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x.repeat_interleave(2)[::2],
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "unaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "stride 0": lambda x: x[:1].expand(x.shape),
    "stride 0 last": lambda x: x[..., :1].expand(x.shape),
    "lazily negated": _lazily_negated,
    "float16": lambda x: x.half() if x.is_floating_point() else x,
    "NaN": lambda x: _first(x, torch.nan),
    "infinite": lambda x: _first(x, torch.inf),
    "inference": _inference,
    "none in the first dimension": lambda x: x[:0],
    "none in the last dimension": lambda x: x[..., :0],
    "meta": lambda x: x.to("meta"),
    "float64": lambda x: x.double() if x.is_floating_point() else x,
}
"""Of all tensors at once."""
ONE_ODD: dict[str, Callable[[Tensor], Any]] = {
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "int64": lambda x: x.long() if x.dtype != torch.int64 else x.int(),
    "int32": lambda x: x.int() if x.dtype != torch.int32 else x.long(),
    "uint8": lambda x: x.to(torch.uint8),
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "none in the first dimension": lambda x: x[:0],
    "none in the last dimension": lambda x: x[..., :0],
    "one less": lambda x: x[..., 1:],
    "one more": lambda x: torch.cat([x, x[..., :1]], -1),
    "another dimension": lambda x: x[None],
    "a dimension less": lambda x: x[0],
    "no dimension": lambda x: x.flatten()[0],
    "numpy": lambda x: x.numpy(),
    "a number": lambda x: 1.5,
    "a list": lambda x: x.tolist(),
    "text": lambda x: "x",
}
"""Of one tensor at a time, while the others fit."""


def _first(x: Tensor, value: float) -> Tensor:
    return x.clone().index_put_((torch.tensor(0),), torch.tensor(value)) if x.is_floating_point() else x


def outcome(call: Call, backend: Backend, inputs: dict[str, Any]) -> tuple[Any, list[Any]]:
    """(shape, dtype and device of outputs and gradients, these), or (its type, an error)."""
    leaves = {n: t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for n, t in inputs.items()}
    try:
        with kernels.backend(backend):
            outputs = call.function(**leaves, **call.options)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            tensors = list(outputs)
            wanted = [t for t in leaves.values() if isinstance(t, Tensor) and t.requires_grad]
            useful = [y for y in outputs if y.requires_grad]
            if wanted and useful:
                sums = [torch.where(y.isfinite(), y, 0.0).sum() for y in useful]
                tensors += torch.autograd.grad(sums, wanted, materialize_grads=True)
    except Exception as error:
        return type(error), [error]
    return [(t.shape, t.dtype, t.device) for t in tensors], tensors


def together(call: Call, inputs: dict[str, Any], values: bool = True) -> None:
    (eager, expected), (triton, found) = (outcome(call, backend, inputs) for backend in ("eager", "triton"))
    assert triton == eager, (found, expected)
    if isinstance(eager, type):
        # Those that torch names for all of its operations aside, errors are ours, from before a backend is chosen.
        assert eager is InvalidArgument and str(found[0]) == str(expected[0]), (found, expected)
        return
    for a, e in zip(found, expected, strict=True):
        if values and e.device.type != "meta":
            torch.testing.assert_close(a, e, rtol=2e-3, atol=2e-3, equal_nan=True)


def trained(x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if x.is_floating_point() and not x.is_inference() else x


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of what is infinite
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_all_are_odd(call: Call, odd: str) -> None:
    inputs = {n: trained(ODD[odd](x)) for n, x in call.tensors.items()}
    if odd == "float64":  # which the twins know and kernels do not
        assert outcome(call, "eager", inputs)[0][0][1] == torch.float64
        kind, (error,) = outcome(call, "triton", inputs)
        assert kind is Error and "torch.float64 has no kernel" in str(error)
        return
    # A key that nobody looks at has a weight of 0 or none; torch's erf of infinity depends on where a value lies.
    together(call, inputs, values=odd not in ("NaN", "infinite"))


@pytest.mark.parametrize("odd", ONE_ODD)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_one_is_odd(call: Call, odd: str) -> None:
    for name, x in call.tensors.items():
        if len(call.tensors) > 1 or odd not in ("float64", "bfloat16"):
            together(call, {n: trained(t) for n, t in call.tensors.items()} | {name: ONE_ODD[odd](x)})


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_one_requires_a_gradient(call: Call) -> None:
    for name, x in call.tensors.items():
        if x.is_floating_point() and len(call.tensors) > 1:
            together(call, call.tensors | {name: trained(x)})


@pytest.mark.parametrize("case", [case for case in CASES if "chunked" not in case.name], ids=str)
def test_second_derivatives(case: Case) -> None:
    """Of kernels in float32, against the twin's in float64 (of which gradgradcheck is in test_derivatives.py)."""
    found = []
    for backend, dtype in (("triton", torch.float32), ("eager", torch.float64)):
        inputs = case.inputs(dtype)
        with kernels.backend(backend):  # type: ignore[arg-type]
            outputs = case.function(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            firsts = torch.autograd.grad([y.sum() for y in outputs], inputs, create_graph=True)
            loss = sum(((g + 1) * torch.linspace(0.5, 2.0, g.numel()).view_as(g)).sum() for g in firsts)
            seconds = (None,) * len(inputs)
            if loss.requires_grad:  # type: ignore[union-attr]
                seconds = torch.autograd.grad(loss, inputs, allow_unused=True)  # type: ignore[arg-type]
        found.append([*firsts, *(x * 0 if s is None else s for x, s in zip(inputs, seconds, strict=True))])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", counterparts())
def test_autocast(name: str) -> None:
    for mixture in ("float32", "bfloat16 first"):
        check_autocast(name, mixture, "triton")


def test_autocast_leaves_lse_in_float32() -> None:
    check_lse("triton")


@pytest.mark.parametrize("check", LENGTHS)
def test_lengths(check) -> None:
    check("triton")
