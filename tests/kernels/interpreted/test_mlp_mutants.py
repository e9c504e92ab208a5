"""Wrong kernels of the MLP: one change each, and the law of twice must fail."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from paracomm.kernels import activation, mlp_kernels, mlp_launch
from tests.kernels.interpreted.test_mlp import SIZES, check_active, check_gated, check_glu, check_linear
from tests.kernels.law import mutate

F32 = torch.float32
linear: Callable[[], None] = partial(check_linear, SIZES[0], "gelu", True, True, F32)
glu: Callable[[], None] = partial(check_glu, SIZES[0], "silu", True, F32)
gated: Callable[[], None] = partial(check_gated, "silu", F32)
MUTANTS = {
    "K's tail is dropped": ("if end < K:", "if end < 0:", linear),
    "the bias is forgotten": ("if HAS_BIAS:\n        acc", "if False:\n        acc", linear),
    "the residual is forgotten": ("if HAS_R:", "if False:", linear),
    "nothing is activated": ("    acc = activated(acc, ACTIVATION)\n", "", linear),
    "what is kept is activated": ("tl.store(Z + at, acc", "tl.store(Z + at, activated(acc, ACTIVATION)", linear),
    "gate and up change places": ("activated(gate, ACTIVATION) * up", "activated(up, ACTIVATION) * gate", glu),
    "the second product is forgotten": ("acc = tl.dot(b, w, acc", "tl.dot(b, w, acc", glu),
    "the gate is not differentiated": ("grad * up * slope(gate, ACTIVATION)", "grad * up", gated),
    "the gate's gradient forgets up": ("grad * up * slope(gate, ACTIVATION)", "grad * slope(gate, ACTIVATION)", gated),
}  # fmt: skip
NAMES = [name for name in vars(mlp_kernels) if name.endswith("_kernel")]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, check = MUTANTS[name]
    monkeypatch.setattr(mlp_launch, "kernels", mutate(mlp_kernels, old, new))
    with pytest.raises(AssertionError, match="error"):
        check()


SLOPES = {
    "silu": ("d = s * (1.0 + x * (1.0 - s))", "d = s"),
    "gelu": ("* DENSITY", "* 0.5 * DENSITY"),
    "gelu_tanh": ("(3.0 * CUBIC)", "CUBIC"),
    "relu": ("tl.where(x <= 0.0, 0.0, 1.0)", "tl.where(x <= -1.0, 0.0, 1.0)"),
}


@pytest.mark.parametrize("name", SLOPES)
def test_a_wrong_derivative_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = mutate(activation, *SLOPES[name])
    changed = mutate(mlp_kernels, "from paracomm.kernels.activation import", f"from {wrong.__name__} import")
    monkeypatch.setattr(mlp_launch, "kernels", changed)
    with pytest.raises(AssertionError, match="gradient"):
        check_active(name, F32)


def test_the_right_kernels_pass() -> None:
    linear()
    glu()
    gated()
