"""Cross-entropy of a linear head by the eager twin, which is what runs on a CPU, with or without Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from paracomm.errors import InvalidArgument
from paracomm.kernels import reference_cross_entropy
from paracomm.kernels.cross_entropy import _backward_op, _forward_op, linear_cross_entropy, partial_cross_entropy


def inputs(N: int = 37, D: int = 12, V: int = 50, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    shapes = ((N, D), (V, D), (V,))
    leaves = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[::5] = -100
    return *leaves, targets


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None) -> Tensor:
    logits = F.linear(x, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("ignored", ["some", "all"])
def test_chunks_are_the_whole(
    softcap: float | None, has_bias: bool, ignored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large heads go by chunks of rows; here of 16, the last of 5."""
    monkeypatch.setattr(reference_cross_entropy, "WHOLE", 100)
    monkeypatch.setattr(reference_cross_entropy, "CHUNK", 800)
    x, weight, bias, targets = inputs(dtype=torch.float64)
    targets = targets.fill_(-100) if ignored == "all" else targets
    b = bias if has_bias else None
    leaves = [x, weight, *([bias] if has_bias else [])]
    total, count = linear_cross_entropy(x, weight, b, targets, softcap=softcap)
    assert total.dtype == torch.float64 and int(count) == int((targets != -100).sum())
    expected = plain(x, weight, b, targets, softcap)
    torch.testing.assert_close(total, expected)
    found, exact = (torch.autograd.grad(y * 0.3, leaves) for y in (total, expected))
    torch.testing.assert_close(found, exact)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, b, targets, softcap=softcap)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_chunks_in_16_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are summed over chunks in float32: as near to the exact ones as those of the whole."""
    x, weight, bias, targets = inputs(dtype=dtype)
    exact = torch.autograd.grad(
        plain(*(t.double() for t in (x, weight, bias)), targets, None), (x, weight, bias), retain_graph=True
    )
    errors = []
    for chunk in (1 << 24, 100):
        monkeypatch.setattr(reference_cross_entropy, "WHOLE", 100 if chunk == 100 else 1 << 24)
        monkeypatch.setattr(reference_cross_entropy, "CHUNK", chunk)
        total, _ = linear_cross_entropy(x, weight, bias, targets)
        assert total.dtype == torch.float32
        grads = torch.autograd.grad(total, (x, weight, bias))
        errors.append([(a.double() - e.double()).abs().max() for a, e in zip(grads, exact, strict=True)])
    for whole, chunked, e in zip(*errors, exact, strict=True):
        assert chunked <= 2 * whole + torch.finfo(dtype).eps * e.abs().max()


def test_only_what_needs_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen table."""
    monkeypatch.setattr(reference_cross_entropy, "WHOLE", 100)
    x, weight, _, targets = inputs()
    total, _ = linear_cross_entropy(x, weight.detach(), None, targets)
    expected = plain(x, weight, None, targets, None)
    torch.testing.assert_close(torch.autograd.grad(total, x), torch.autograd.grad(expected, x))


def test_other_numbers_are_ignored() -> None:
    x, weight, _, targets = inputs()
    targets[targets == -100] = 7
    total, count = linear_cross_entropy(x, weight, None, targets, ignore=7)
    expected = F.cross_entropy(F.linear(x, weight), targets, ignore_index=7, reduction="sum")
    torch.testing.assert_close(total, expected)
    assert int(count) == int((targets != 7).sum())


def test_pieces_make_the_whole() -> None:
    x, weight, bias, targets = inputs(dtype=torch.float64)
    parts = [
        partial_cross_entropy(x, weight[a:b], bias[a:b], targets - a, softcap=3.0)
        for a, b in ((0, 20), (20, 20), (20, 50))
    ]
    lse = torch.stack([lse for lse, _ in parts]).logsumexp(0)
    loss = lse - sum(logit for _, logit in parts)
    total = loss.masked_fill(targets == -100, 0.0).sum()
    expected = plain(x, weight, bias, targets, 3.0)
    torch.testing.assert_close(total, expected)
    leaves = (x, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(total, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("V", [50, 1])
def test_the_operation_is_the_twin(softcap: float | None, V: int) -> None:
    """What the kernels are called by, on a CPU; targets on either side of what lies here."""
    *leaves, _ = inputs(37, 12, V, torch.float64)
    targets = torch.arange(37) - 5
    expected = partial_cross_entropy(*leaves, targets, softcap=softcap)
    found = _forward_op(*leaves, targets, softcap or 0.0)[:2]
    torch.testing.assert_close(found, expected)
    grads, exact = (torch.autograd.grad((a * a.detach() + 3 * b.sin()).sum(), leaves) for a, b in (found, expected))
    torch.testing.assert_close(grads, exact)


@pytest.mark.parametrize(("softcap", "has_bias"), [(0.0, True), (2.0, False)])
def test_opcheck(softcap: float, has_bias: bool) -> None:
    x, weight, bias, targets = inputs(5, 8, 20)
    torch.library.opcheck(_forward_op, (x, weight, bias if has_bias else None, targets, softcap))
    x, weight, bias = x.detach(), weight.detach(), bias.detach() if has_bias else None
    rows = torch.rand(4, 5).unbind()
    torch.library.opcheck(_backward_op, (*rows[:2], x, weight, bias, targets, *rows[2:], softcap))


def peak(run: Any) -> int:
    """Bytes that torch held at most at a time, beyond what there was."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    held = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_memory() -> None:
    """Beside the inputs: C V + N D + V D numbers and the gradients again as backward scales them; not 3 N V."""
    N, D, V, C = 1024, 16, 8192, 256
    x, weight, _, targets = inputs(N, D, V)
    assert N * V > reference_cross_entropy.WHOLE and C * V <= reference_cross_entropy.CHUNK

    def ours() -> None:
        torch.autograd.grad(linear_cross_entropy(x, weight, None, targets)[0], (x, weight))

    def theirs() -> None:
        torch.autograd.grad(plain(x, weight, None, targets, None), (x, weight))

    mine = peak(ours)
    assert 4 * C * V <= mine <= 4 * (C * V + 2 * (N + V) * D + C * V // 8)
    assert peak(theirs) >= 4 * 2 * N * V > 6 * mine


def test_what_does_not_fit() -> None:
    x, weight, bias, targets = (t.detach() for t in inputs())
    targets[2] = 50
    wrong: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        r"x \[37, 11\] and weight \[50, 12\], expected \[N, D\] and \[V, D\]": ((x[:, 1:], weight, None, targets), {}),
        r"x \[12\] and weight": ((x[0], weight, None, targets), {}),
        r"bias \[49\], expected \[50\]": ((x, weight, bias[1:], targets), {}),
        r"targets torch.int32 \[37\], expected int64 \[37\]": ((x, weight, None, targets.int()), {}),
        r"targets torch.int64 \[36\], expected int64 \[37\]": ((x, weight, None, targets[1:]), {}),
        r"weight is torch.float16 on cpu, expected torch.float32": ((x, weight.half(), None, targets), {}),
        r"softcap is 0, expected more than 0": ((x, weight, None, targets), {"softcap": 0}),
        r"target 50 of row 2, expected 0 to 49 or -100 \(ignored\)": ((x, weight, None, targets), {}),
    }
    for message, (arguments, options) in wrong.items():
        with pytest.raises(InvalidArgument, match=message):
            linear_cross_entropy(*arguments, **options)
