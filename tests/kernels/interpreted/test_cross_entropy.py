"""Cross-entropy of a linear head under the law of twice: tiles of 16, ragged parts and chunks of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paracomm.errors import InvalidArgument
from paracomm.kernels import config, cross_entropy_kernels, select
from paracomm.kernels.cross_entropy import _forward_op, linear_cross_entropy, partial_cross_entropy
from tests.kernels.law import interpreted, mutate, twice

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def configs(BM: int = 16, BN: int = 16, BK: int = 16, parts: int = 2, chunk: int = 32) -> dict[str, dict[str, int]]:
    row = {"BM": BM, "BN": BN, "BK": BK, "warps": 1, "stages": 1, "parts": parts, "chunk": chunk}
    return {"cross_entropy_forward": row, "cross_entropy_backward": row}


@dataclass(frozen=True)
class Shape:
    N: int
    D: int
    V: int
    bias: bool = False
    softcap: float | None = None
    ignored: str = "none"
    parts: int = 2
    chunk: int = 32
    tile: tuple[int, int, int] = (16, 16, 16)

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.V)
        shapes = [(self.N, self.D), (self.V, self.D)] + [(self.V,)] * self.bias
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    @property
    def targets(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.N)
        targets = torch.randint(0, self.V, (self.N,), generator=generator)
        targets[-1:] = self.V - 1
        if self.ignored == "some":
            targets[::3] = -100
        elif self.ignored == "all":
            targets[:] = -100
        return targets

    @property
    def configs(self) -> dict[str, dict[str, int]]:
        return configs(*self.tile, parts=self.parts, chunk=self.chunk)

    def __str__(self) -> str:
        extras = "+bias" * self.bias + (f" cap {self.softcap}" if self.softcap else "") + f" ignored {self.ignored}"
        return f"{self.N}x{self.D}x{self.V}{extras} {self.parts} {self.chunk} {self.tile}"


SHAPES = [
    Shape(16, 16, 32),
    Shape(19, 21, 50, ignored="some"),
    Shape(37, 33, 67, bias=True),
    Shape(1, 16, 40, bias=True, parts=4),
    Shape(5, 8, 1),
    Shape(20, 24, 50, ignored="all", bias=True),
    Shape(20, 40, 50, softcap=3.0),
    Shape(9, 20, 33, softcap=0.7, bias=True, ignored="some", chunk=16),
    Shape(33, 16, 100, parts=1, chunk=48, tile=(16, 32, 16)),
    Shape(40, 37, 21, tile=(32, 16, 32), ignored="some"),
    Shape(70, 16, 45, parts=3, chunk=100, bias=True),
    Shape(10, 24, 139, chunk=16, parts=4),
]


def logits_of(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = F.linear(x, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def eager(shape: Shape) -> Any:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = logits_of(x, weight, bias, shape.softcap).to(wide)
        return F.cross_entropy(logits, shape.targets, ignore_index=-100, reduction="sum")

    return run


def ours(shape: Shape) -> Any:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        total, count = linear_cross_entropy(x, weight, bias, shape.targets, softcap=shape.softcap)
        assert int(count) == int((shape.targets != -100).sum()) and count.dtype == torch.int64
        return total

    return interpreted(run, **shape.configs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_law_of_twice(shape: Shape, dtype: torch.dtype) -> None:
    twice(ours(shape), eager(shape), shape.inputs(), dtype)


def eager_partial(shape: Shape, targets: Tensor) -> Any:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits = logits_of(x, weight, bias, shape.softcap).to(torch.promote_types(x.dtype, torch.float32))
        here = (targets >= 0) & (targets < shape.V)
        logit = logits.gather(1, targets.clamp(0, shape.V - 1)[:, None])[:, 0]
        return logits.logsumexp(1), logit.masked_fill(~here, 0.0)

    return run


PARTIAL = [Shape(20, 16, 50), Shape(9, 20, 33, softcap=1.5, bias=True), Shape(33, 37, 18, bias=True, chunk=16)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PARTIAL, ids=str)
def test_pieces_under_the_law(shape: Shape, dtype: torch.dtype) -> None:
    """Both outputs with gradients of their own; targets on either side of what lies here, just beyond its end too."""
    targets = torch.arange(shape.N) * 3 - 4
    targets[-2:] = torch.tensor([shape.V, -100])
    mine = interpreted(
        lambda *t: partial_cross_entropy(t[0], t[1], t[2] if shape.bias else None, targets, softcap=shape.softcap),
        **shape.configs,
    )
    twice(mine, eager_partial(shape, targets), shape.inputs(), dtype)


@pytest.mark.parametrize("sizes", [(20, 13, 17), (16, 0, 34)], ids=str)
def test_a_vocabulary_in_parts_is_the_whole(sizes: tuple[int, ...]) -> None:
    """As ranks combine it (parallel/loss.py): maximum, sum of exponentials, the target's logit."""
    shape = Shape(19, 21, 50, bias=True, ignored="some")
    leaves = [t.float().requires_grad_() for t in shape.inputs()]
    x, weight, bias = leaves
    with select.backend("triton"), config.override(**shape.configs):
        whole, _ = linear_cross_entropy(x, weight, bias, shape.targets)
        expected = torch.autograd.grad(whole, leaves)
        first, parts = 0, []
        for size in sizes:
            own = slice(first, first + size)
            parts.append(partial_cross_entropy(x, weight[own], bias[own], shape.targets - first))
            first += size
        lse = torch.stack([lse for lse, _ in parts])
        most = lse.detach().amax(0)
        loss = most + (lse - most).exp().sum(0).log() - sum(logit for _, logit in parts)
        total = loss.masked_fill(shape.targets == -100, 0.0).sum()
        found = torch.autograd.grad(total, leaves)
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_a_bias_of_minus_infinity_hides_tokens() -> None:
    """A whole part of the vocabulary, as padding of a table is hidden."""
    shape = Shape(5, 16, 60, bias=True)
    x, weight, bias = (t.float() for t in shape.inputs())
    bias[:32] = -torch.inf
    targets = torch.full((5,), 40)
    with select.backend("triton"), config.override(**shape.configs):
        total, _ = linear_cross_entropy(x.requires_grad_(), weight, bias, targets)
        (grad,) = torch.autograd.grad(total, x)
    expected = F.cross_entropy(F.linear(x, weight, bias), targets, reduction="sum")
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x)[0])


def test_the_same_bits_each_time() -> None:
    shape = Shape(37, 33, 67, bias=True)
    leaves = [t.bfloat16().requires_grad_() for t in shape.inputs()]
    runs = []
    with select.backend("triton"), config.override(**shape.configs):
        for _ in range(2):
            total, _ = linear_cross_entropy(*leaves, shape.targets)
            runs.append((total, *torch.autograd.grad(total, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_strides_and_nothing_to_do() -> None:
    shape = Shape(19, 21, 50)
    x, weight = (t.float() for t in shape.inputs())
    with select.backend("triton"), config.override(**shape.configs):
        expected, _ = linear_cross_entropy(x, weight, None, shape.targets)
        wide = torch.cat([weight, weight], 1)[:, :21]
        turned, _ = linear_cross_entropy(x.mT.contiguous().mT, wide, None, shape.targets)
        assert torch.equal(turned, expected)
        empty = torch.empty(0, 21, requires_grad=True)
        total, count = linear_cross_entropy(empty, weight.requires_grad_(), None, torch.empty(0, dtype=torch.int64))
        assert total == 0 and count == 0
        assert not torch.autograd.grad(total, weight)[0].any()


@pytest.mark.parametrize("shape", [Shape(5, 16, 20, bias=True, softcap=2.0), Shape(5, 16, 20)], ids=str)
def test_opcheck(shape: Shape) -> None:
    x, weight, *bias = (t.float().requires_grad_() for t in shape.inputs())
    arguments = (x, weight, bias[0] if bias else None, shape.targets, shape.softcap or 0.0)
    with select.backend("triton"), config.override(**shape.configs):
        torch.library.opcheck(_forward_op, arguments)


@pytest.mark.slow
def test_compile_sees_through() -> None:
    """One graph, the same bits; a target beyond the vocabulary makes the loss NaN there, as on a GPU."""
    shape = Shape(5, 16, 20)
    x, weight = (t.float().requires_grad_() for t in shape.inputs())
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    with select.backend("triton"), config.override(**shape.configs):
        runs = []
        for function in (linear_cross_entropy, compiled):
            total, count = function(x, weight, None, shape.targets)
            runs.append((total, count, *torch.autograd.grad(total, (x, weight))))
        assert compiled(x, weight, None, torch.tensor([0, 20, 1, -100, 2]))[0].isnan()
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_target_beyond_the_vocabulary() -> None:
    x, weight = (t.float() for t in Shape(4, 16, 20).inputs())
    with select.backend("triton"):
        for bad in (20, -1):
            with pytest.raises(InvalidArgument, match=f"target {bad} of row 2, expected 0 to 19 or -100"):
                linear_cross_entropy(x, weight, None, torch.tensor([0, 19, bad, -100]))


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(made):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return made


def test_no_tensor_has_the_size_of_the_logits() -> None:
    """64 rows, 16 features, 512 tokens: nothing larger than weight, or N C."""
    x, weight = (t.float().requires_grad_() for t in Shape(64, 16, 512).inputs())
    targets = torch.arange(64)
    with select.backend("triton"), config.override(**configs(32, 32, 16, parts=4, chunk=64)), Largest() as largest:
        total, _ = linear_cross_entropy(x, weight, None, targets)
        total.backward()
    assert largest.elements <= max(weight.numel(), 64 * 64) < 64 * 512


MUTANTS = {
    "the maximum is not carried over": ("total = total * tl.exp2((top - reference) * LOG2E) + ", "total = total + "),
    "a part forgets its last tile": ("tl.minimum(p * part + part, V)", "tl.minimum(p * part + part - BN, V)"),
    "the tail of the vocabulary counts": ("real = (col < V)[None, :]", "real = (col < V + BN)[None, :]"),
    "a target beyond the end is taken for the last": (
        "tl.where((col[None, :] == target[:, None]) & real", "tl.where((col[None, :] == target[:, None])"
    ),
    "the tail of D is dropped": ("for start in tl.range(0, D, BK)", "for start in tl.range(0, D // BK * BK, BK)"),
    "no bias": ("logits += tl.load(BIAS + col)", "logits += 0.0 * tl.load(BIAS + col)"),
    "targets of a chunk are not moved": ("(first + col)[None, :]", "col[None, :]"),
    "the softcap has no derivative": ("grad *= 1.0 - bend * bend", "grad *= 1.0"),
    "dx of the last chunk only": ("dx.addmm_(dlogits, own)", "dx = dlogits @ own"),
    "dlse is left out": ("* LOG2E) * dlse[:, None]", "* LOG2E)"),
    "parts are not brought to one maximum": ("total * (top - most).exp()", "total"),
}  # fmt: skip


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_kernel_breaks_the_law(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = mutate(cross_entropy_kernels, *change)
    monkeypatch.setattr(cross_entropy_kernels, "launch_forward", mutant.launch_forward)
    monkeypatch.setattr(cross_entropy_kernels, "launch_backward", mutant.launch_backward)
    with pytest.raises((AssertionError, IndexError)):
        test_pieces_under_the_law(Shape(9, 20, 50, softcap=1.5, bias=True, chunk=16), torch.float32)
        test_law_of_twice(Shape(37, 33, 67, bias=True, ignored="some"), torch.float32)
