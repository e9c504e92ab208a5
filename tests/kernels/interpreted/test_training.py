"""Small models trained by interpreted kernels, on one process and on ranks, are the eager ones up to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks
from torch import Tensor, nn

from paracomm import kernels
from paracomm.kernels import config
from paracomm.models import generate
from paracomm.parallel import rng
from paracomm.parallel.attention import POSITION_BITS, Attention, HeadDropout, attention
from tests.parallel import training
from tests.parallel.layouts import VARIANTS, Case
from tests.parallel.training import (
    ADAMW,
    BOUNDS,
    MAX_NORM,
    Trainer,
    apart,
    backward,
    expect_same_masks,
    recorded_masks,
)

STEPS = 2
QUICK = [Case("gpt"), Case("llama", tp=2), Case("llama", cp=2)]
SLOW = [
    Case("llama"),
    Case("gpt", dp=2, zero=3, recompute="full"),
    Case("gpt", tp=2),
    Case("gpt", tp=2, sequence=True, recompute="selective"),
    Case("gpt", cp=2, context="ulysses"),
    Case("mixed", dp=2, zero=1, accumulate=2),
    Case("seq2seq", tp=2),
    Case("translator", cp=2),
    Case("translator", dp=2, zero=2),
]


TILE = {"BM": 16, "BN": 16, "warps": 4, "stages": 1}
PRODUCT = {"BM": 64, "BN": 32, "BK": 32, "GROUP": 2, "warps": 4, "stages": 1}
TILES = {
    f"attention_{part}{heavy}": TILE for part in ("forward", "delta", "dkdv", "dq") for heavy in ("", "_heavy")
} | dict.fromkeys(("linear", "glu", "sum", "cross_entropy_forward", "cross_entropy_backward"), PRODUCT)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of everything several tiles, and few rows: an interpreted program takes milliseconds."""
    monkeypatch.setattr(training, "ROWS", 4)
    with config.override(**TILES):
        yield


# --- what computed ---
@contextmanager
def counted(name: str) -> Iterator[list[int]]:
    """How often a launcher of attention_launch ran."""
    from paracomm.kernels import attention_launch

    times, original = [0], getattr(attention_launch, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        times[0] += 1
        return original(*args, **kwargs)

    setattr(attention_launch, name, count)
    try:
        yield times
    finally:
        setattr(attention_launch, name, original)


# --- training ---
@cache
def eager(name: str) -> tuple[list[float], list[float], dict[str, Tensor], dict[int, Tensor]]:
    """(losses, norms, weights in the end, masks of step 0) on one process, in float32."""
    variant = VARIANTS[name]
    model, losses, norms = variant.build(), [], []
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    with kernels.backend("eager"), recorded_masks() as masks:
        for step in range(STEPS):
            losses.append(backward(model, variant, step))
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
            optimizer.step()
            if step == 0:
                drawn = masks()
    return losses, norms, {n: p.detach() for n, p in model.named_parameters()}, drawn


def by_kernels(rank: Rank, case: Case) -> None:
    losses, norms, weights, expected = eager(case.variant)
    comm = rank.connect()
    trainer = Trainer(comm, case, torch.float32, torch.optim.AdamW, **ADAMW)
    cores = {core.stream for core in trainer.parallel.module.modules() if isinstance(core, Attention)}
    with kernels.backend("triton"), recorded_masks() as masks:
        for step in range(STEPS):
            with counted("launch_forward") as forward, counted("launch_backward") as backward:
                loss, norm = trainer.step(step)
            assert forward[0] and backward[0], "attention was not the kernels'"
            assert abs(loss / losses[step] - 1) < BOUNDS[torch.float32], step
            assert abs(norm / norms[step] - 1) < BOUNDS[torch.float32], step
            if step == 0:  # attention draws its own, inside of the kernels
                outside = {stream: bits for stream, bits in expected.items() if stream not in cores}
                assert outside
                expect_same_masks(comm, masks(), outside, set())
    worst, where = apart(trainer.weights(), weights)
    assert worst < BOUNDS[torch.float32], where
    trainer.close()
    comm.close()


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=lambda case: case.name
)
def test_kernels_train_as_eager(case):
    run_ranks(case.world, by_kernels, case, timeout_s=300)


@pytest.mark.parametrize("name", ["llama", pytest.param("translator", marks=pytest.mark.slow)])
def test_kernels_write_as_eager(name):
    variant = VARIANTS[name]
    model = variant.build()
    prompt = torch.arange(6).view(2, 3)
    extra = {"source_BS": torch.arange(8).view(2, 4)} if variant.source else {}
    text = generate(model, prompt, 6, temperature=0, **extra)
    with kernels.backend("triton"), counted("launch_forward") as forward:
        assert torch.equal(generate(model, prompt, 6, temperature=0, **extra), text)
    assert forward[0]


# --- masks ---
@pytest.mark.parametrize("seed, stream, step", [(7, 3, 1), (2**64 - 1, 2**32 - 1, 2**32 - 2)])
def test_masks_are_the_extensions_bits(seed, stream, step):
    base = torch.randint(-(2**62), 2**62, (3, 5))
    base[0, 0], base[0, 1] = 2**63 - 3, 2**32 - 2
    for offsets in (torch.arange(9), torch.tensor([5, 0, 1, 2, 3, 1 << 41])):
        at = rng.Place(seed, step, torch.arange(1), torch.arange(1))
        expected = rng.keep_mask(stream, base, offsets, 0.3, at)
        for backend in ("triton", "eager"):
            with kernels.backend(backend):
                assert torch.equal(kernels.keep_mask(seed, stream, step, base, offsets, 0.3), expected), backend


@pytest.mark.parametrize("positions", [torch.arange(16), torch.tensor([*range(4, 8), *range(24, 28), *range(40, 48)])])
def test_attention_drops_the_extensions_elements(positions):
    """Scores of 0 and values of 1 in one feature each: out is the mask."""
    B, H, T, p = 2, 3, 16, 0.4
    at = rng.Place(11, 5, torch.tensor([9, 2]), positions)
    zeros, ones = torch.zeros(B, H, T, T), torch.eye(T).expand(B, H, T, T)
    with rng.at(at), kernels.backend("triton"):
        out, _ = attention(
            zeros, zeros, ones, q_positions=positions, k_positions=positions, causal=False,
            dropout=HeadDropout(77, p, 1, 8),
        )  # fmt: skip
    lines = at.rows[:, None] * 8 + torch.arange(1, 1 + H)
    base = (lines[:, :, None] << 2 * POSITION_BITS) + (positions << POSITION_BITS)
    assert torch.equal(out != 0, rng.keep_mask(77, base, positions, p, at))
