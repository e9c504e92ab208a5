"""Attention's kernels under the law of twice, over tiles of 16: small shapes have full, masked and ragged ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from paracomm.errors import InvalidArgument
from paracomm.kernels import config, reference, select
from paracomm.kernels.attention import (
    Dropout,
    _backward_op,
    _forward_op,
    _Options,
    attention,
    attention_backward,
    keep_mask,
)
from tests.kernels.law import interpreted, twice

SMALL = {"BM": 16, "BN": 16, "warps": 4, "stages": 1}
WIDE = SMALL | {"BM": 32}
TALL = SMALL | {"BN": 32}
APART = SMALL | {"SPLIT": 1}
"""dk and dv by a program each."""


def configs(row: dict[str, int]) -> dict[str, dict[str, int]]:
    names = ("attention_forward", "attention_dkdv", "attention_dq")
    return dict.fromkeys((*names, *(f"{name}_heavy" for name in names), "attention_delta"), row)


@dataclass(frozen=True)
class Shape:
    """B sequences of T queries and S keys, H heads on G, of size K."""

    T: int = 37
    S: int = 37
    K: int = 16
    H: int = 2
    G: int = 2
    B: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    row: dict[str, int] = field(default_factory=lambda: SMALL)

    def inputs(self, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = ((self.H, self.T), (self.G, self.S), (self.G, self.S))
        return [torch.randn(self.B, h, n, self.K, generator=generator, dtype=torch.float64) for h, n in shapes]

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" if isinstance(v, (int, float)) else k for k, v in self.options.items())
        row = f"{self.row['BM']}x{self.row['BN']}" + " apart" * self.row.get("SPLIT", 0)
        return f"{self.T}x{self.S} K{self.K} H{self.H}/{self.G} {row} {options}"


def eager(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Everything in q's own dtype: what somebody writes without a kernel."""
    H, G, T, S = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    scores = (q @ k.mT) * options.get("scale", 1 / math.sqrt(q.shape[-1]))
    softcap = options.get("softcap")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    see = reference.attention_mask(T, S, options.get("causal", False), options.get("window"), q.device)
    if options.get("key_mask") is not None:
        mask = options["key_mask"][:, None, None, :]
        see = mask if see is None else see & mask
    if see is not None:
        scores = scores.masked_fill(~see, -torch.inf)
    lse = scores.float().logsumexp(-1) if q.dtype != torch.float64 else scores.logsumexp(-1)
    p = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1).to(q.dtype)).exp()
    dropout = options.get("dropout")
    if dropout is not None:
        p = p * reference.attention_keep(dropout, q.shape[0], H, T, S).to(p.dtype) / (1 - dropout.p)
    return p @ v, lse.detach()


def check(shape: Shape, dtype: torch.dtype) -> None:
    ours = interpreted(lambda q, k, v: attention(q, k, v, **shape.options), **configs(shape.row))
    twice(ours, lambda q, k, v: eager(q, k, v, **shape.options), shape.inputs(), dtype)


DROP = Dropout(0xF234567890ABCDEF, 3, 0x9ABCDEF0, 0.3, torch.tensor([7, 1 << 20]), (1, 5))
PLACED = replace(DROP, q_positions=torch.arange(37) * 3, k_positions=torch.arange(37).flip(0) * 5)
MASK = torch.rand(2, 37, generator=torch.Generator().manual_seed(5)) < 0.6
MASK[0, :20] = False

SHAPES = [
    Shape(),
    Shape(16, 16),
    Shape(1, 1),
    Shape(33, 48, row=WIDE),
    Shape(48, 33, row=TALL),
    Shape(37, 37, options={"causal": True}),
    Shape(32, 32, options={"causal": True}, row=WIDE),
    Shape(64, 64, options={"causal": True}, row=TALL, B=1),
    Shape(20, 45, options={"causal": True}),
    Shape(45, 20, options={"causal": True}),
    Shape(5, 40, options={"causal": True}, row=TALL),
    Shape(37, 37, options={"causal": True, "window": 7}),
    Shape(64, 64, options={"causal": True, "window": 20}, B=1),
    Shape(50, 40, options={"window": 9}),
    Shape(30, 52, options={"causal": True, "window": 17}, row=WIDE),
    Shape(37, 37, options={"window": 2, "causal": True}),
    Shape(37, 37, options={"softcap": 2.0}),
    Shape(40, 30, options={"softcap": 0.7, "causal": True}),
    Shape(37, 37, options={"scale": 0.9}),
    Shape(37, 37, H=4, G=2, options={"causal": True}),
    Shape(20, 33, H=6, G=1),
    Shape(37, 37, K=24),
    Shape(20, 20, K=80, B=1, options={"causal": True}),
    Shape(20, 20, K=96, B=1),
    Shape(20, 36, K=128, B=1, options={"causal": True}),
    Shape(18, 20, K=256, B=1, H=1, G=1, options={"causal": True}),
    Shape(37, 37, options={"dropout": DROP}),
    Shape(37, 37, H=4, options={"dropout": DROP, "causal": True}, row=WIDE),
    Shape(37, 37, options={"dropout": PLACED}),
    Shape(37, 37, options={"key_mask": MASK}),
    Shape(37, 37, options={"key_mask": MASK, "causal": True}, row=TALL),
    Shape(37, 37, options={"key_mask": MASK, "window": 9, "softcap": 3.0}),
    Shape(37, 40, H=4, G=2, options={"causal": True}, row=APART),
    Shape(37, 37, options={"dropout": DROP, "softcap": 2.0, "causal": True, "window": 20}, row=APART),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
QUICK = (0, 4, 5, 8, 9, 13, 17, 19, 22, 27, 31, 32, 33)


@pytest.mark.parametrize("shape", [SHAPES[i] for i in QUICK], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_law_of_twice(shape: Shape, dtype: torch.dtype) -> None:
    check(shape, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_law_of_twice_everywhere(shape: Shape, dtype: torch.dtype) -> None:
    check(shape, dtype)


def behind_each_other(lengths: list[tuple[int, int]]) -> dict[str, Any]:
    queries, keys = zip(*lengths, strict=True)
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (queries, keys))
    return {"cu_q": cu_q, "cu_k": cu_k, "max_q": max(queries), "max_k": max(keys)}


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 6, "dropout": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_variable_lengths(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Sequences behind each other are as each alone; one has no query, one no key."""
    lengths = [(17, 17), (0, 5), (1, 30), (20, 9), (4, 0)]
    packed, options = behind_each_other(lengths), dict(options)
    if options.get("dropout"):
        options["dropout"] = replace(DROP, rows=torch.arange(5) + 3, heads=(0, 2))
    shape = Shape(sum(t for t, _ in lengths), sum(s for _, s in lengths), B=1, H=2, G=1)

    def each(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        parts, t0, s0 = [], 0, 0
        for b, (t, s) in enumerate(lengths):
            own = dict(options)
            if own.get("dropout") is not None:
                own["dropout"] = replace(own["dropout"], rows=own["dropout"].rows[b : b + 1])
            parts.append(eager(q[:, :, t0 : t0 + t], k[:, :, s0 : s0 + s], v[:, :, s0 : s0 + s], **own))
            t0, s0 = t0 + t, s0 + s
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)

    ours = interpreted(lambda q, k, v: attention(q, k, v, **packed, **options), **configs(SMALL))
    twice(ours, each, shape.inputs(), dtype)


def test_a_block_of_keys_given_the_lse_of_all() -> None:
    """Context parallelism: two blocks' gradients, given out and lse over both, are those of the whole."""
    q, k, v = (x.float() for x in Shape(20, 40, options={}).inputs())
    grad = torch.randn_like(q)
    with select.backend("triton"), config.override(**configs(SMALL)):
        out, lse = attention(q, k, v)
        whole = attention_backward(grad, q, k, v, out, lse)
        parts = [attention_backward(grad, q, k[:, :, s], v[:, :, s], out, lse) for s in (slice(0, 24), slice(24, 40))]
    with select.backend("eager"):
        twins = [attention_backward(grad, q, k[:, :, s], v[:, :, s], out, lse) for s in (slice(0, 24), slice(24, 40))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0], rtol=0, atol=2e-6)
    for index in (1, 2):
        torch.testing.assert_close(torch.cat([part[index] for part in parts], 2), whole[index], rtol=0, atol=2e-6)
    for part, twin in zip(parts, twins, strict=True):
        for a, b in zip(part, twin, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_the_same_bits_each_time() -> None:
    q, k, v = (x.bfloat16().requires_grad_() for x in Shape(options={}).inputs())
    runs = []
    with select.backend("triton"), config.override(**configs(SMALL)):
        for _ in range(2):
            out, _ = attention(q, k, v, causal=True)
            runs.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_nothing_to_see_and_nothing_to_do() -> None:
    with select.backend("triton"), config.override(**configs(SMALL)):
        for T, S in ((0, 5), (5, 0), (0, 0)):
            q, k = torch.randn(2, 2, T, 16, requires_grad=True), torch.randn(2, 2, S, 16, requires_grad=True)
            out, lse = attention(q, k, k)
            assert out.shape == q.shape and torch.equal(lse, torch.full((2, 2, T), -torch.inf))
            assert not out.detach().any()
            dq, dk = torch.autograd.grad(out.sum(), (q, k))
            assert not dq.any() and not dk.any() and dk.shape == k.shape


def test_who_sees_one_key_has_its_value() -> None:
    q, k, v = (x.float() for x in Shape(options={}).inputs())
    with select.backend("triton"), config.override(**configs(SMALL)):
        out, _ = attention(q, k, v, causal=True, window=1)
    torch.testing.assert_close(out, v, rtol=1e-6, atol=1e-6)


def test_strides() -> None:
    """[B, T, H, K] in memory, as models have it; a last dimension that is not contiguous is copied."""
    q, k, v = (x.float().transpose(1, 2).contiguous().transpose(1, 2) for x in Shape(options={}).inputs())
    with select.backend("triton"), config.override(**configs(SMALL)):
        expected, _ = attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
        assert torch.equal(attention(q, k, v, causal=True)[0], expected)
        odd = q.mT.contiguous().mT
        assert odd.stride(-1) != 1 and torch.equal(attention(odd, k, v, causal=True)[0], expected)


@pytest.mark.parametrize("seed", [0, 5, (1 << 64) - 1])
def test_keep_mask_is_that_of_the_twin(seed: int) -> None:
    base = torch.tensor([[0, 1, 2, 3], [1 << 40, (1 << 62) + 5, -4, 77]])
    offsets = torch.tensor([0, 1, 2, 3, 4, 100, 1 << 33])
    with select.backend("triton"):
        ours = keep_mask(seed, 0xFFFFFFFF, 12, base, offsets, 0.3)
    assert torch.equal(ours, reference.keep_mask(seed, 0xFFFFFFFF, 12, base, offsets, round(0.3 * 2**32)))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"causal": True, "dropout": DROP, "softcap": 2.0}], ids=["plain", "dropout"])
def test_opcheck(options: dict[str, Any]) -> None:
    """Results are contiguous, whatever the strides that kernels wrote with (K 24: rows of 32)."""
    q, k, v = (x.float().requires_grad_() for x in Shape(20, 20, K=24, H=4, options={}).inputs())
    given = {"causal": False, **options}
    names = ("causal", "scale", "window", "softcap", "key_mask", "dropout")
    arguments = _Options.of(q, k, v, *(given.get(name) for name in names)).flat()
    with select.backend("triton"), config.override(**configs(SMALL)):
        torch.library.opcheck(_forward_op, (q, k, v, *arguments))
        q, k, v = (x.detach() for x in (q, k, v))
        out, lse = _forward_op(q, k, v, *arguments)
        torch.library.opcheck(_backward_op, (torch.randn(out.shape), q, k, v, out, lse, *arguments))


def test_dropouts_bits_are_those_of_the_twin() -> None:
    """With v the unit matrix and all scores equal, out shows which elements are kept: in runs and by positions."""
    zero = torch.zeros(2, 2, 16, 16)
    for drop in (DROP, replace(DROP, q_positions=torch.arange(16) * 7, k_positions=torch.arange(16).flip(0) * 3)):
        with select.backend("triton"), config.override(**configs(SMALL)):
            out, _ = attention(zero, zero, torch.eye(16).expand(2, 2, 16, 16), dropout=drop)
        assert torch.equal(out != 0, reference.attention_keep(drop, 2, 2, 16, 16))


def test_more_heads_than_a_grid_has() -> None:
    q = torch.zeros(1, 1, 1, 16).expand(1 << 13, 8, 1, 16)
    with select.backend("triton"), pytest.raises(InvalidArgument, match="8192 sequences of 8 heads"):
        attention(q, q, q)
