"""Every differentiable operation with inputs for each of its options: what tests of all operations walk over."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paracomm import kernels
from paracomm.errors import InvalidArgument
from paracomm.kernels import reference_cross_entropy as twin

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """An operation of floating-point tensors, whose shapes these are; all its other arguments are fixed."""

    name: str
    function: Function
    shapes: tuple[tuple[int, ...], ...]
    batched: tuple[int, ...] = (0,)
    """Inputs that torch.vmap may map over while the others stay."""

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for shape in self.shapes
        ]

    def __str__(self) -> str:
        return self.name


def _norms() -> list[Case]:
    x, d = (2, 3, 5), (5,)
    return [
        case
        for kind in ("rms", "layer")
        for case in (
            Case(f"{kind}", lambda x, w, kind=kind: kernels.add_norm(x, None, w, kind=kind)[0], (x, d)),
            Case(f"{kind} bias", lambda x, w, b, kind=kind: kernels.add_norm(x, None, w, b, kind=kind)[0], (x, d, d)),
            Case(f"add {kind}", lambda x, r, w, kind=kind: kernels.add_norm(x, r, w, kind=kind), (x, x, d), (0, 1)),
            Case(f"add {kind} bias", lambda x, r, *wb, kind=kind: kernels.add_norm(x, r, *wb, kind=kind), (x, x, d, d)),
        )
    ]  # fmt: skip


def _mlps() -> list[Case]:
    x, w, b, y = (2, 3, 4), (5, 4), (5,), (2, 3, 5)
    found = [
        Case("linear", kernels.linear, (x, w)),
        Case("linear bias residual", lambda x, w, b, r: kernels.linear(x, w, b, None, r), (x, w, b, y), (0, 3)),
    ]
    for name in ("gelu", "gelu_tanh", "relu", "silu"):
        found += [
            Case(f"linear {name}", lambda x, w, b, r, a=name: kernels.linear(x, w, b, a, r), (x, w, b, y)),
            Case(f"glu {name}", lambda x, g, u, a=name: kernels.glu(x, g, u, activation=a), (x, w, w)),
            Case(f"glu {name} bias", lambda x, g, u, b, c, a=name: kernels.glu(x, g, u, b, c, a), (x, w, w, b, b)),
            Case(f"gated {name}", lambda g, u, a=name: kernels.gated(g, u, a), (y, y), (0, 1)),
            Case(f"activate {name}", lambda x, a=name: kernels.activate(x, a), (y,)),
        ]
    return found


def _heads() -> list[Case]:
    q, k = (2, 4, 3, 4), (2, 2, 5, 4)
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    drop = kernels.Dropout(3, 1, 2, 0.3, torch.arange(2), (0, 4))
    options: dict[str, dict] = {
        "attention": {},
        "attention causal": {"causal": True},
        "attention window softcap": {"window": 2, "softcap": 2.0, "scale": 0.7},
        "attention mask": {"key_mask": mask},
        "attention dropout": {"dropout": drop},
    }
    found = [
        Case(name, lambda q, k, v, o=o: kernels.attention(q, k, v, **o)[0], (q, k, k)) for name, o in options.items()
    ]
    blind = (2, 4, 7, 4)
    found.append(Case("attention blind", lambda q, k, v: kernels.attention(q, k, v, causal=True)[0], (blind, k, k)))
    edges = {
        "cu_q": torch.tensor([0, 2, 2, 5], dtype=torch.int32), "cu_k": torch.tensor([0, 1, 3, 7], dtype=torch.int32),
        "max_q": 3, "max_k": 4,
    }  # fmt: skip
    packed = ((1, 4, 7, 4), (1, 2, 8, 4), (1, 2, 8, 4))
    found.append(
        Case("attention packed", lambda q, k, v: kernels.attention(q, k, v, causal=True, **edges)[0], packed, ())
    )
    lengths = torch.tensor([4, 1], dtype=torch.int32)
    for name, o in {"decode": {}, "decode softcap": {"softcap": 2.0}, "decode window": {"window": 2}}.items():
        found.append(Case(name, lambda q, k, v, o=o: kernels.decode(q, k, v, lengths, **o)[0], (q, k, k)))
    whole: dict = {"need_lse": False}
    found.append(Case("decode out", lambda q, k, v: kernels.decode(q, k, v, lengths, **whole)[0], (q, k, k)))
    angles = torch.outer(torch.arange(3.0), torch.tensor([1.0, 0.1])).repeat(1, 2)
    found.append(
        Case("rotary", lambda x: kernels.rotary(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype)), ((2, 2, 3, 4),))
    )
    found.append(Case("rotary tables", kernels.rotary, ((2, 2, 3, 4), (3, 4), (3, 4))))
    return found


TARGETS = torch.tensor([3, -100, 0, 6, 2, -100])


def _heads_of_models() -> list[Case]:
    x, w, b = (6, 4), (7, 4), (7,)

    def chunked(x: Tensor, w: Tensor, b: Tensor | None, softcap: float | None) -> Tensor:
        return twin._Chunked.apply(x, w, b, TARGETS, TARGETS != -100, softcap, 4)

    def head(x: Tensor, w: Tensor, b: Tensor | None = None, softcap: float | None = None) -> Tensor:
        return kernels.linear_cross_entropy(x, w, b, TARGETS, softcap=softcap)[0]

    def part(x: Tensor, w: Tensor, b: Tensor | None = None, softcap: float | None = None) -> tuple[Tensor, ...]:
        return kernels.partial_cross_entropy(x, w, b, TARGETS - 2, softcap=softcap)

    return [
        Case("head", head, (x, w)),
        Case("head bias softcap", lambda x, w, b: head(x, w, b, 2.0), (x, w, b)),
        Case("head chunked", lambda x, w: chunked(x, w, None, None), (x, w), ()),
        Case("head chunked bias softcap", lambda x, w, b: chunked(x, w, b, 2.0), (x, w, b), ()),
        Case("part", part, (x, w)),
        Case("part bias softcap", lambda x, w, b: part(x, w, b, 2.0), (x, w, b)),
    ]


CASES = [*_norms(), *_mlps(), *_heads(), *_heads_of_models()]


# --- autocast ---
def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cosine + torch.cat([-high, low], -1) * sine


def counterparts() -> dict[str, tuple[Function, Function, tuple[tuple[int, ...], ...]]]:
    """By name: ours, the same of torch's operations, and shapes."""
    x, w, b, y, d, q = (2, 3, 16), (8, 16), (8,), (2, 3, 8), (16,), (1, 2, 4, 16)
    targets = torch.tensor([0, 3, -100, 7, 1, 2])

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w, b), targets, reduction="sum")

    def part(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, w)
        return logits.float().logsumexp(1), logits.float().gather(1, targets.clamp(min=0)[:, None])[:, 0]

    def add_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return F.layer_norm(x + r, d, w, b), x + r

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    return {
        "linear": (
            lambda x, w, b, r: kernels.linear(x, w, b, "gelu", r), lambda x, w, b, r: F.gelu(F.linear(x, w, b)) + r,
            (x, w, b, y),
        ),
        "glu": (kernels.glu, lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x, u), (x, w, w)),
        "gated": (kernels.gated, lambda g, u: F.silu(g) * u, (y, y)),
        "activate": (lambda x: kernels.activate(x, "silu"), F.silu, (x,)),
        "add rms": (kernels.add_norm, lambda x, r, w: (F.rms_norm(x + r, d, w, 1e-5), x + r), (x, x, d)),
        "add layer": (lambda x, r, w, b: kernels.add_norm(x, r, w, b, kind="layer"), add_norm, (x, x, d, d)),
        "rms": (lambda x, w: kernels.add_norm(x, None, w)[0], lambda x, w: F.rms_norm(x, d, w, 1e-5), (x, d)),
        "rotary": (kernels.rotary, _rotated, (q, (4, 16), (4, 16))),
        "attention": (lambda q, k, v: kernels.attention(q, k, v)[0], attention, (q, q, q)),
        "decode": (lambda q, k, v: kernels.decode(q, k, v, 4, need_lse=False)[0], attention, ((1, 2, 1, 16), q, q)),
        "head": (lambda x, w, b: kernels.linear_cross_entropy(x, w, b, targets)[0], loss, ((6, 16), w, b)),
        "part": (lambda x, w: kernels.partial_cross_entropy(x, w, None, targets.clamp(min=0)), part, ((6, 16), w)),
    }  # fmt: skip


MIXTURES = {"float32": (), "bfloat16 first": (0,), "bfloat16 second": (1,), "bfloat16": (0, 1, 2, 3)}
"""Inputs that are bfloat16 already."""


def check_autocast(name: str, mixture: str, backend: kernels.Backend) -> None:
    """Asserts dtypes as of the counterpart, of outputs and gradients, and values within a rounding of bfloat16."""
    ours, theirs, shapes = counterparts()[name]
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(shape, generator=generator) * 0.3 for shape in shapes]
    inputs = [x.bfloat16() if i in MIXTURES[mixture] else x for i, x in enumerate(inputs)]
    results = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with kernels.backend(backend), torch.autocast("cpu", torch.bfloat16):
            outputs = function(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = torch.autograd.grad([y.float().sin().sum() for y in outputs], leaves)
        results.append([*outputs, *grads])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        top = max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.04 * top)


def check_lse(backend: kernels.Backend) -> None:
    """Of bfloat16 inputs, but float32 and computed as such."""
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, 2, 5, 16, generator=generator) for _ in range(3))
    rounded = (q.bfloat16().double(), k.bfloat16().double())
    exact = ((rounded[0] @ rounded[1].mT) / 4).logsumexp(-1)
    edges = torch.tensor([0, 5], dtype=torch.int32)
    with kernels.backend(backend), torch.autocast("cpu", torch.bfloat16):
        found = [
            kernels.attention(q, k, v), kernels.attention(q, k, v, cu_q=edges, cu_k=edges, max_q=5, max_k=5),
        ]  # fmt: skip
        one = kernels.decode(q[:, :, -1:], k, v)
    for out, lse in (*found, one):
        assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(lse.double(), exact[:, :, -lse.shape[2] :], rtol=1e-5, atol=1e-5)


# --- lengths ---
def check_tokens_of_no_sequence(backend: kernels.Backend) -> None:
    """Before the first, after the last, and where there is no sequence: zeros, -inf, gradients of zero."""
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, heads, 12, 8, generator=generator) for heads in (4, 2, 2))
    for edges in ([2, 5, 5, 9], [0, 9], [0], [3]):
        cu = torch.tensor(edges, dtype=torch.int32)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        most = max((b - a for a, b in itertools.pairwise(edges)), default=0)
        with kernels.backend(backend):
            out, lse = kernels.attention(*leaves, causal=True, cu_q=cu, cu_k=cu, max_q=most, max_k=most)
            grads = torch.autograd.grad(out.sum(), leaves)
        outside = torch.ones(12, dtype=torch.bool)
        outside[edges[0] : edges[-1]] = False
        assert out.shape == q.shape and lse.shape == q.shape[:3]
        assert not out[:, :, outside].any() and bool((lse[:, :, outside] == -torch.inf).all())
        assert not any(grad[:, :, outside].any() for grad in grads)
        for begin, end in itertools.pairwise(edges):
            own = [x[:, :, begin:end].clone().requires_grad_() for x in (q, k, v)]
            expected = F.scaled_dot_product_attention(*own, is_causal=True, enable_gqa=True)
            torch.testing.assert_close(out[:, :, begin:end], expected, rtol=1e-4, atol=1e-5)
            for grad, e in zip(grads, torch.autograd.grad(expected.sum(), own), strict=True):
                torch.testing.assert_close(grad[:, :, begin:end], e, rtol=1e-4, atol=1e-5)


def check_edges_that_do_not_rise(backend: kernels.Backend) -> None:
    q = torch.randn(1, 2, 12, 8)
    fits = torch.tensor([0, 4, 12], dtype=torch.int32)
    wrong = {
        r"cu_q has 7, 4 at sequence 1, a length of -3, expected 0 to 9": [0, 7, 4],
        r"cu_q is 0\.\.13, expected within 0\.\.12": [0, 4, 13],
        r"cu_q is -1\.\.12, expected within 0\.\.12": [-1, 4, 12],
        r"cu_q has 2, 12 at sequence 1, a length of 10, expected 0 to 9, which is max_q": [0, 2, 12],
    }
    for words, edges in wrong.items():
        with kernels.backend(backend), pytest.raises(InvalidArgument, match=words):
            kernels.attention(q, q, q, cu_q=torch.tensor(edges, dtype=torch.int32), cu_k=fits, max_q=9, max_k=9)


def check_lengths_above_the_cache(backend: kernels.Backend) -> None:
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(3, heads, t, 8, generator=generator) for heads, t in ((4, 2), (2, 10), (2, 10)))
    given, meant = torch.tensor([10, 11, 2**31 - 1], dtype=torch.int32), torch.full((3,), 10, dtype=torch.int32)
    every: list[dict] = [{}, {"window": 3}, {"softcap": 2.0}, {"need_lse": False}]
    for options in every:
        with kernels.backend(backend):
            found = kernels.decode(q, k, v, given, **options)
            expected = kernels.decode(q, k, v, meant, **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        options = {name: value for name, value in options.items() if name != "need_lse"}
        exact, _ = kernels.attention(q.double(), k.double(), v.double(), causal=True, **options)
        torch.testing.assert_close(found[0].double(), exact, rtol=1e-5, atol=1e-5)


LENGTHS = [check_tokens_of_no_sequence, check_edges_that_do_not_rise, check_lengths_above_the_cache]
