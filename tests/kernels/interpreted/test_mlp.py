"""The MLP's kernels under the law of twice, over tiles of 16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paracomm.kernels import config, mlp, mlp_launch, select
from paracomm.kernels.reference import ACTIVATIONS
from tests.kernels.law import interpreted, twice

TILES = {"BM": 16, "BN": 16, "BK": 16, "GROUP": 2, "warps": 4, "stages": 1}
OTHER = TILES | {"BM": 32, "BN": 32, "GROUP": 3}
DESCRIBED = OTHER | {"BK": 32, "TMA": 1}
"""By tensor descriptors."""
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(37, 41, 40), (16, 32, 48), (1, 5, 7), (64, 16, 33), (3, 100, 16)]
"""(M, N, K)"""


def configs(row: dict[str, int]) -> dict[str, dict[str, int]]:
    return dict.fromkeys(("linear", "glu", "sum"), row)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def eager_activation(name: str | None) -> Callable[[Tensor], Tensor]:
    return (lambda x: x) if name is None else ACTIVATIONS[name]


def check_linear(
    size: tuple[int, int, int],
    activation: str | None,
    bias: bool,
    residual: bool,
    dtype: torch.dtype,
    row: dict[str, int] = TILES,
) -> None:
    M, N, K = size
    inputs = tensors((M, K), (N, K), *([(N,)] if bias else []), *([(M, N)] if residual else []))
    inputs[1] /= K**0.5

    def split(rest: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
        return rest[0] if bias else None, rest[-1] if residual else None

    def ours(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        return mlp.linear(x, w, split(rest)[0], activation, split(rest)[1])

    def eager(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        b, r = split(rest)
        y = eager_activation(activation)(F.linear(x, w, b))
        return y if r is None else y + r

    twice(interpreted(ours, **configs(row)), eager, inputs, dtype)


def check_glu(
    size: tuple[int, int, int], activation: str, bias: bool, dtype: torch.dtype, row: dict[str, int] = TILES
) -> None:
    M, N, K = size
    inputs = tensors((M, K), (N, K), (N, K), *([(N,), (N,)] if bias else []))
    inputs[1] /= K**0.5
    inputs[2] /= K**0.5

    def ours(x: Tensor, g: Tensor, u: Tensor, *biases: Tensor) -> Tensor:
        return mlp.glu(x, g, u, *(biases or (None, None)), activation=activation)

    def eager(x: Tensor, g: Tensor, u: Tensor, *biases: Tensor) -> Tensor:
        bg, bu = biases or (None, None)
        return ACTIVATIONS[activation](F.linear(x, g, bg)) * F.linear(x, u, bu)

    twice(interpreted(ours, **configs(row)), eager, inputs, dtype)


def check_gated(activation: str, dtype: torch.dtype) -> None:
    ours = interpreted(lambda g, u: mlp.gated(g, u, activation))
    twice(ours, lambda g, u: ACTIVATIONS[activation](g) * u, [x * 2 for x in tensors((5, 301), (5, 301))], dtype)


def check_active(activation: str, dtype: torch.dtype) -> None:
    wide = [
        torch.cat([x * 2, torch.tensor([-30.0, -9.0, -3.0, -1e-3, 0.0, 1e-3, 0.29, 0.31, 3.0, 9.0, 30.0]).double()])
        for x in tensors((1500,))
    ]
    twice(interpreted(lambda x: mlp.activate(x, activation)), ACTIVATIONS[activation], wide, dtype)


LINEARS: list[tuple[Any, ...]] = [
    (SIZES[0], None, True, False),
    (SIZES[0], "gelu", True, True),
    (SIZES[1], "gelu_tanh", False, False),
    (SIZES[2], "silu", True, True),
    (SIZES[3], "relu", False, True),
    (SIZES[4], None, False, True),
    (SIZES[4], "gelu_tanh", True, True),
    ((40, 48, 80), "gelu", True, True),
]
GLUS: list[tuple[Any, ...]] = [
    (SIZES[0], "silu", False),
    (SIZES[1], "gelu", True),
    (SIZES[2], "gelu_tanh", True),
    (SIZES[3], "relu", False),
    (SIZES[4], "silu", True),
    ((40, 48, 80), "silu", True),
]


@pytest.mark.parametrize("case", [LINEARS[1], LINEARS[3], LINEARS[5]], ids=str)
def test_linear(case: tuple[Any, ...]) -> None:
    check_linear(*case, torch.bfloat16, OTHER)


@pytest.mark.parametrize("case", [GLUS[0], GLUS[1]], ids=str)
def test_glu(case: tuple[Any, ...]) -> None:
    check_glu(*case, torch.bfloat16)


def test_by_tensor_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    described = []
    original = mlp_launch.TensorDescriptor.from_tensor
    monkeypatch.setattr(
        mlp_launch.TensorDescriptor, "from_tensor", lambda x, block: described.append(block) or original(x, block)
    )
    check_linear(*LINEARS[-1], torch.bfloat16, DESCRIBED)
    check_glu(*GLUS[-1], torch.bfloat16, DESCRIBED)
    assert len(described) == 2 + 3 + 4
    check_linear(*LINEARS[3], torch.bfloat16, DESCRIBED)
    assert len(described) == 11, "rows of 7 elements are copied to rows of 16"


@pytest.mark.slow
@pytest.mark.parametrize("row", [TILES, OTHER, DESCRIBED], ids=["16", "32", "TMA"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*LINEARS, *GLUS], ids=str)
def test_products_everywhere(case: tuple[Any, ...], dtype: torch.dtype, row: dict[str, int]) -> None:
    (check_linear if case in LINEARS else check_glu)(*case, dtype, row)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_elementwise(activation: str, dtype: torch.dtype) -> None:
    check_gated(activation, dtype)
    check_active(activation, dtype)


def test_any_leading_shape_and_strides() -> None:
    x, w = (t.float() for t in tensors((2, 3, 4, 24), (10, 24)))
    with select.backend("triton"), config.override(**configs(TILES)):
        y = mlp.linear(x.transpose(0, 1), w, activation="silu")
        assert y.shape == (3, 2, 4, 10)
        torch.testing.assert_close(y, F.silu(F.linear(x.transpose(0, 1), w)), rtol=1e-5, atol=1e-5)
        assert mlp.glu(x[:0], w, w).shape == (0, 3, 4, 10)
        bias = tensors((20,))[0].float()[::2]
        others = torch.randn(7, 48)[:, ::2], torch.randn(24).expand(7, 24)
        for row in (TILES, DESCRIBED):
            for each in others:
                with config.override(**configs(row)):
                    found = mlp.linear(each, w, bias), mlp.glu(each, w, w, bias, bias, "relu")
                y = F.linear(each, w, bias)
                torch.testing.assert_close(found, (y, F.relu(y) * y), rtol=1e-5, atol=1e-5)


def test_descriptors_have_no_strides_of_0(monkeypatch: pytest.MonkeyPatch) -> None:
    strides = []
    original = mlp_launch.TensorDescriptor.from_tensor

    def described(x: Tensor, block: list[int]) -> Any:
        strides.append(x.stride())
        return original(x, block)

    monkeypatch.setattr(mlp_launch.TensorDescriptor, "from_tensor", described)
    with select.backend("triton"), config.override(**configs(DESCRIBED)):
        mlp.linear(torch.randn(32).expand(7, 32), torch.randn(16, 32))
    assert strides == [(32, 1), (32, 1)]


def test_only_what_is_needed_is_kept() -> None:
    """Without gradients nothing but y is written; with frozen weights no gradient of theirs is made."""
    x, w = (t.float() for t in tensors((8, 16), (16, 16)))
    with select.backend("triton"), config.override(**configs(TILES)):
        y, gate, up = mlp._glu_op(x, w, w, None, None, "silu", False)
        assert gate.numel() == up.numel() == 0
        with torch.no_grad():
            assert torch.equal(mlp.glu(x, w, w), y)
        x.requires_grad_()
        mlp.glu(x, w, w).sum().backward()
        assert x.grad is not None and w.grad is None


def test_opcheck() -> None:
    """By the kernels: schemas, fakes and autograd registrations are right."""
    x, w, v, r = (t.float().requires_grad_() for t in tensors((6, 16), (8, 16), (8, 16), (6, 8)))
    with select.backend("triton"), config.override(**configs(TILES)):
        torch.library.opcheck(mlp._linear_op, (x, w, None, "gelu", r, True))
        torch.library.opcheck(mlp._glu_op, (x, w, v, None, None, "silu", True))
        torch.library.opcheck(mlp._gated_op, (r, r.detach().clone().requires_grad_(), "gelu"))
        torch.library.opcheck(mlp._active_op, (r, "relu"))
        torch.library.opcheck(mlp._sum_op, tuple(t.detach() for t in (r, w, r, v)))
