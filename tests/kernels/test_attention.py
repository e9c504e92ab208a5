"""Attention by its eager twin, which runs on a CPU: torch's own attention, the formula of backward, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paracomm.errors import InvalidArgument
from paracomm.kernels import reference, select
from paracomm.kernels.attention import (
    Dropout,
    _backward_op,
    _forward_op,
    _Options,
    attention,
    attention_backward,
    attention_forward,
    keep_mask,
)
from paracomm.parallel import rng

T, S, K = 7, 9, 8
DROP = Dropout((1 << 64) - 3, 11, 0xFFFF0001, 0.3, torch.tensor([5, 2]), (1, 9))
MASK = torch.tensor([[True] * S, [True, False, True] * 3])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "softcap": {"softcap": 1.5, "scale": 0.7},
    "key mask": {"key_mask": MASK},
    "dropout": {"dropout": DROP},
    "places": {"dropout": replace(DROP, q_positions=torch.arange(T) * 3, k_positions=torch.arange(S).flip(0))},
    "all": {"causal": True, "window": 4, "softcap": 2.0, "key_mask": MASK, "dropout": DROP},
}
PACKED = {
    "cu_q": torch.tensor([0, 3, 3, 7], dtype=torch.int32),
    "cu_k": torch.tensor([0, 4, 5, 9], dtype=torch.int32),
    "max_q": 4,
    "max_k": 4,
}


def inputs(dtype: torch.dtype = torch.float32, B: int = 2, H: int = 4, G: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((B, H, T, K), (B, G, S, K), (B, G, S, K))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def flat(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Any, ...]:
    """An operation's arguments after q, k and v."""
    names = ("causal", "scale", "window", "softcap", "key_mask", "dropout", "cu_q", "cu_k", "max_q", "max_k")
    given = {"causal": False, **given}
    return _Options.of(q, k, v, *(given.get(name) for name in names)).flat()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_formula_of_backward_is_autograds(options: dict[str, Any]) -> None:
    q, k, v = inputs(torch.float64)
    out, lse = attention(q, k, v, **options)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), grad)
    for ours, twin in zip(attention_backward(grad, q, k, v, out, lse, **options), expected, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_operation_is_the_twin(options: dict[str, Any]) -> None:
    q, k, v = inputs()
    grad = torch.randn(q.shape)
    results = []
    for out, lse in (attention(q, k, v, **options), _forward_op(q, k, v, *flat(q, k, v, **options))):
        assert not lse.requires_grad
        results.append((out, lse, *torch.autograd.grad(out, (q, k, v), grad)))
    for ours, twin in zip(*results, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_the_twin_is_torchs_own(causal: bool) -> None:
    q, k, v = inputs(torch.float64)
    k, v = k[:, :, :T], v[:, :, :T]
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, causal=causal)[0], expected, rtol=1e-12, atol=1e-12)


def test_lse_puts_blocks_of_keys_together() -> None:
    q, k, v = (x.detach() for x in inputs(torch.float64))
    whole, total = attention_forward(q, k, v)
    parts = [attention_forward(q, k[:, :, s], v[:, :, s]) for s in (slice(0, 4), slice(4, S))]
    torch.testing.assert_close(torch.logaddexp(parts[0][1], parts[1][1]), total, rtol=1e-10, atol=1e-10)
    together = sum((out * (lse - total).exp()[..., None] for out, lse in parts), torch.zeros(()))
    torch.testing.assert_close(together, whole, rtol=1e-10, atol=1e-10)


def test_variable_lengths_are_each_alone() -> None:
    q, k, v = inputs(torch.float64, B=1)
    drop = replace(DROP, rows=torch.tensor([4, 0, 8]))
    out, lse = attention(q, k, v, causal=True, dropout=drop, **PACKED)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    alone = replace(drop, rows=drop.rows[2:])
    expected = attention(q[:, :, 3:], k[:, :, 5:], v[:, :, 5:], causal=True, dropout=alone)
    assert torch.equal(out[:, :, 3:], expected[0]) and torch.equal(lse[:, :, 3:], expected[1])


def test_a_query_that_sees_nothing() -> None:
    q, k, v = inputs()
    out, lse = attention(q, k[:, :, :4], v[:, :, :4], causal=True)
    assert torch.equal(lse[:, :, :3], torch.full((2, 4, 3), -torch.inf)) and not out[:, :, :3].any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("options", [*OPTIONS.values(), PACKED], ids=[*OPTIONS, "lengths"])
def test_opcheck(options: dict[str, Any]) -> None:
    q, k, v = inputs(B=1 if "cu_q" in options else 2)
    arguments = flat(q, k, v, **options)
    torch.library.opcheck(_forward_op, (q, k, v, *arguments))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = _forward_op(q, k, v, *arguments)
    torch.library.opcheck(_backward_op, (torch.randn(out.shape), q, k, v, out, lse, *arguments))


@pytest.mark.slow
def test_torch_compile_sees_through() -> None:
    q, k, v = inputs()

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=True)[0].sin().sum()

    def by_operation(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _forward_op(q, k, v, True, 0.3, *flat(q, k, v)[2:])[0].sin().sum()

    for function in (step, by_operation):
        expected = torch.autograd.grad(function(q, k, v), (q, k, v))
        ours = torch.autograd.grad(torch.compile(function, fullgraph=True)(q, k, v), (q, k, v))
        for a, e in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.999])
def test_dropouts_bits_are_those_of_rng(p: float) -> None:
    """The extension's Philox, torch's operations, attention's element numbers: one and the same mask."""
    place = rng.Place(DROP.seed, DROP.step, DROP.rows, torch.arange(T))
    base = torch.tensor([[0, 5, -7], [1 << 40, (1 << 63) - 2, 3]])
    offsets = torch.tensor([0, 1, 2, 3, 4, 9, 1 << 33])
    with select.backend("eager"):
        expected = rng.keep_mask(DROP.stream, base, offsets, p, place)
    assert torch.equal(keep_mask(DROP.seed, DROP.stream, DROP.step, base, offsets, p), expected)
    drop = replace(DROP, p=p)
    lines = (DROP.rows[:, None] * 9 + torch.arange(1, 5)) << 40
    with select.backend("eager"):
        expected = rng.keep_mask(
            DROP.stream, lines[..., None] + (torch.arange(T) << 20), torch.arange(S), p, place
        )  # fmt: skip
    assert torch.equal(reference.attention_keep(drop, 2, 4, T, S), expected)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "window 0": ({"window": 0}, "window is 0"),
    "scale": ({"scale": -1.0}, "scale is -1.0"),
    "softcap": ({"softcap": 0.0}, "softcap is 0.0"),
    "key mask's shape": ({"key_mask": MASK[:1]}, "key_mask"),
    "key mask's dtype": ({"key_mask": MASK.int()}, "key_mask"),
    "p": ({"dropout": replace(DROP, p=1.0)}, "p is 1.0"),
    "rows": ({"dropout": replace(DROP, rows=DROP.rows[:1])}, "rows"),
    "one kind of positions": ({"dropout": replace(DROP, q_positions=torch.arange(T))}, "both or none"),
    "lengths without the longest": ({"cu_q": PACKED["cu_q"], "cu_k": PACKED["cu_k"]}, "max_q"),
    "lengths of int64": ({**PACKED, "cu_q": torch.tensor([0, 3, 3, 7])}, "int32"),
    "lengths of a batch": (PACKED, "with cu_q"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    options, words = REFUSED[name]
    with pytest.raises(InvalidArgument, match=words):
        attention(*inputs(), **options)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v = inputs()
    for bad, words in (
        ((q[0], k, v), "expected q"),
        ((q, k, v[..., :4]), "expected q"),
        ((q[:1], k, v), "expected q"),
        ((q[:, :3], k, v), "not a multiple"),
        ((q, k.double(), v.double()), "one dtype"),
        (tuple(torch.zeros(1, 1, 2, 257) for _ in range(3)), "head size 257"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            attention(*bad)
