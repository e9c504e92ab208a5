"""Kernels on a GPU, in their shipped configurations: the law of twice, dropout's bits, models that wait for nothing.

Everywhere else each of these is a skip that says so. bench/gpu_check.sh runs them, and times the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paracomm import kernels
from paracomm.kernels import reference
from paracomm.kernels.select import _too_old, interpreted, triton_missing
from paracomm.models import Decoder, DecoderConfig, generate
from paracomm.parallel import rng
from tests.kernels.law import interpreted as by_kernels
from tests.kernels.law import twice


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU: nothing here ran on one"
    if interpreted():
        return "kernels are interpreted in this process"
    return triton_missing() or _too_old(0)


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """What float32 is compared with is not rounded to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).cuda() for shape in shapes]


# --- attention ---
DROP = {"p": 0.3, "seed": 2**63 + 5, "step": 3, "stream": 99}
OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 100},
    "softcap": {"causal": True, "softcap": 3.0},
    "key mask": {"key_mask": True},
    "dropout": {"causal": True, "dropout": True},
}


def eager_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """In q's dtype throughout."""
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    see = reference.attention_mask(T, S, options.get("causal", False), options.get("window"), q.device)
    scores = reference.attention_scores(q, k, K**-0.5, options.get("softcap"), see, options.get("key_mask"))
    p = scores.softmax(-1)
    if options.get("dropout") is not None:
        p = p * reference.attention_keep(options["dropout"], B, H, T, S).to(p.dtype) / (1 - DROP["p"])
    return p @ v, scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1).detach()


# Each is four kernels to compile, 1 to 2 s each: gpu_check.sh gives all tests 5 minutes.
ATTENTIONS = [(name, K, torch.bfloat16) for name in OPTIONS for K in (64, 80, 128, 256)] + [
    (name, 64, dtype) for name in ("all", "causal", "dropout") for dtype in (torch.float16, torch.float32)
]


@pytest.mark.parametrize("name, K, dtype", ATTENTIONS, ids=str)
def test_attention(name, K, dtype):
    B, H, G, T = 2, 4, 2, 333
    options = dict(OPTIONS[name])
    if options.get("dropout"):
        options["dropout"] = kernels.Dropout(rows=torch.tensor([5, 70], device="cuda"), heads=(4, 12), **DROP)
    if options.get("key_mask"):
        options["key_mask"] = torch.rand(B, T, generator=torch.Generator().manual_seed(1)).cuda() < 0.7
    inputs = drawn((B, H, T, K), (B, G, T, K), (B, G, T, K))
    ours = by_kernels(lambda q, k, v: kernels.attention(q, k, v, **options))
    twice(ours, lambda q, k, v: eager_attention(q, k, v, **options), inputs, dtype)


@DTYPES
@pytest.mark.parametrize("K", [64, 128])
def test_decode(K, dtype):
    q, k, v = (x.to(dtype) for x in drawn((3, 8, 1, K), (3, 2, 1000, K), (3, 2, 1000, K)))
    with kernels.backend("triton"):
        out, lse = kernels.decode(q, k, v)
    exact, exact_lse = eager_attention(*(x.double() for x in (q, k, v)))
    rounded, rounded_lse = eager_attention(q, k, v)
    for found, eager, right in ((out, rounded, exact), (lse, rounded_lse, exact_lse)):
        allowed = 2 * (eager.double() - right).abs().max() + 2 * torch.finfo(found.dtype).eps * right.abs().max().clamp(
            1
        )
        assert (found.double() - right).abs().max() <= allowed


# --- products, norms, rotary, cross-entropy ---
Pair = tuple[Callable[..., Any], Callable[..., Any], list[tuple[int, ...]]]
N, D, HIDDEN = 333, 256, 720
OPERATIONS: dict[str, Pair] = {
    "linear": (
        lambda x, w, b, r: kernels.linear(x, w, b, "gelu", r), lambda x, w, b, r: F.gelu(F.linear(x, w, b)) + r,
        [(N, D), (HIDDEN, D), (HIDDEN,), (N, HIDDEN)],
    ),
    "glu": (
        lambda x, g, u: kernels.glu(x, g, u), lambda x, g, u: F.silu(x @ g.mT) * (x @ u.mT),
        [(N, D), (HIDDEN, D), (HIDDEN, D)],
    ),
    "gated": (lambda g, u: kernels.gated(g, u), lambda g, u: F.silu(g) * u, [(N, HIDDEN), (N, HIDDEN)]),
    "activate": (
        lambda x: kernels.activate(x, "gelu_tanh"), lambda x: F.gelu(x, approximate="tanh"), [(N, HIDDEN)],
    ),
    "rms": (
        lambda x, r, w: kernels.add_norm(x, r, w, eps=1e-5),
        lambda x, r, w: (F.rms_norm(x + r, (D,), w, 1e-5), x + r), [(N, D), (N, D), (D,)],
    ),
    "layer": (
        lambda x, r, w, b: kernels.add_norm(x, r, w, b, kind="layer"),
        lambda x, r, w, b: (F.layer_norm(x + r, (D,), w, b, 1e-5), x + r), [(N, D), (N, D), (D,), (D,)],
    ),
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name, dtype):
    ours, eager, shapes = OPERATIONS[name]
    twice(by_kernels(ours), eager, [x / x.shape[-1] ** 0.5 for x in drawn(*shapes)], dtype)


@DTYPES
def test_rotary(dtype):
    T, K = 77, 64
    angles = torch.rand(T, K // 2).repeat(1, 2).cuda().double() * 6
    cosine, sine = angles.cos(), angles.sin()

    def eager(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cosine.to(x.dtype) + torch.cat([-high, low], -1) * sine.to(x.dtype)

    def ours(x: Tensor) -> Tensor:
        return kernels.rotary(x, cosine.to(x.dtype), sine.to(x.dtype))

    twice(by_kernels(ours), eager, drawn((2, 3, T, K)), dtype)


@DTYPES
def test_cross_entropy(dtype):
    V = 1000
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2)).cuda()
    targets[::5] = -100

    def eager(x: Tensor, w: Tensor) -> Tensor:
        logits = (x @ w.mT).to(torch.promote_types(x.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="sum") / 100

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return kernels.linear_cross_entropy(x, w, None, targets)[0] / 100

    inputs = [x / D**0.25 for x in drawn((N, D), (V, D))]
    twice(by_kernels(ours), eager, inputs, dtype)


def test_masks_are_the_cpus_bits():
    base = torch.randint(-(2**62), 2**62, (40, 3))
    offsets = torch.cat([torch.arange(101), torch.tensor([1 << 41])])
    at = rng.Place(2**64 - 3, 7, torch.arange(1), torch.arange(1))
    assert torch.equal(
        rng.keep_mask(5, base.cuda(), offsets.cuda(), 0.3, at).cpu(), rng.keep_mask(5, base, offsets, 0.3, at)
    )


# --- models ---
SHAPE = DecoderConfig(width=128, depth=2, heads=4, context=64, dropout=0.1)
MODELS = {"gpt": SHAPE, "llama": replace(SHAPE, kv_heads=2, positions="rotary", norm="rms", mlp="swiglu", tied=False)}


def step(model: Decoder, tokens: Tensor) -> Tensor:
    with rng.at(rng.Place(0, 0, torch.arange(len(tokens)), torch.arange(tokens.shape[1]))):
        total, count = model(tokens, tokens)
    loss: Tensor = total / count
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_cpus(name):
    tokens = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(3))
    here, there = Decoder(MODELS[name]), Decoder(MODELS[name]).cuda()
    expected, found = step(here, tokens), step(there, tokens.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=0)
    for (which, p), (_, q) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        assert (q.grad.cpu() - p.grad).abs().max() <= 1e-3 * p.grad.abs().max(), which
    with torch.no_grad():
        text = generate(here, tokens[:, :5], 20, temperature=0)
        assert (generate(there, tokens[:, :5].cuda(), 20, temperature=0).cpu() == text).float().mean() > 0.9


@pytest.mark.parametrize("name", MODELS)
def test_a_step_waits_for_nothing(name):
    tokens = torch.randint(256, (4, 64), device="cuda")
    model = Decoder(MODELS[name]).cuda()
    step(model, tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
