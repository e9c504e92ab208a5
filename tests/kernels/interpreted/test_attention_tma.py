"""The sm_90 kernel under the law of twice, interpreted: what it computes. That its warps are specialised, and rightly,
is seen in what it compiles to: tests/kernels/test_specialised.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from paracomm.kernels import attention_launch, attention_tma, config
from paracomm.kernels.attention import Dropout, _Options, attention
from paracomm.kernels.attention_tma import fits_tma, forward_tma
from tests.kernels.interpreted.test_attention import Shape, configs, eager
from tests.kernels.law import interpreted, mutate, twice

SMALL = {"BM": 16, "BN": 16, "warps": 4, "stages": 2, "SPECIALISED": 1}
TALL, WIDE = SMALL | {"BN": 32}, SMALL | {"BM": 32}
CAUSAL, WINDOW = {"causal": True}, {"causal": True, "window": 7}


def options_of(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> _Options:
    given: dict[str, Any] = dict.fromkeys(("scale", "window", "softcap", "key_mask", "dropout"))
    return _Options.of(q, k, v, **{"causal": False, **given, **options})


def ours(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    o = options_of(q, k, v, **options)
    assert fits_tma(q, k, v, o)
    return forward_tma(q, k, v, attention_launch.Attention(q, k, v, o))


def check(shape: Shape, dtype: torch.dtype) -> None:
    function = interpreted(lambda q, k, v: ours(q, k, v, **shape.options), attention_forward_tma=shape.row)
    twice(function, lambda q, k, v: eager(q, k, v, **shape.options), shape.inputs(), dtype)


SHAPES = [
    Shape(row=SMALL),
    Shape(1, 1, row=SMALL),
    Shape(32, 32, row=TALL),
    Shape(33, 48, row=WIDE),
    Shape(20, 33, H=6, G=1, row=SMALL),
    Shape(options=CAUSAL, row=SMALL),
    Shape(32, 64, options=CAUSAL, row=WIDE),
    Shape(45, 20, options=CAUSAL, row=SMALL),
    Shape(5, 40, H=4, options=CAUSAL, row=TALL),
    Shape(options=WINDOW, row=SMALL),
    Shape(50, 40, options={"window": 9}, row=SMALL),
    Shape(30, 52, options={"causal": True, "window": 17}, row=TALL),
    Shape(options={"softcap": 2.0}, row=SMALL),
    Shape(40, 30, options={"softcap": 0.7, "causal": True, "window": 20}, row=SMALL),
    Shape(options={"scale": 0.9}, row=SMALL),
    Shape(K=24, options=CAUSAL, row=SMALL),
    Shape(20, 40, K=80, B=1, options=CAUSAL, row=TALL),
    Shape(20, 20, K=128, B=1, options={"causal": True}, row=SMALL),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_law_of_twice(shape: Shape, dtype: torch.dtype) -> None:
    check(shape, dtype)


def test_strides() -> None:
    """[B, T, H, K] in memory, as models have it; a batch of one may have any stride."""
    q, k, v = (x.bfloat16().transpose(1, 2).contiguous().transpose(1, 2) for x in Shape().inputs())
    with config.override(attention_forward_tma=SMALL):
        expected, _ = ours(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
        assert torch.equal(ours(q, k, v, causal=True)[0], expected)
        odd = torch.as_strided(k[:1], (1, *k.shape[1:]), (7, *k.stride()[1:]))
        assert torch.equal(ours(q[:1], odd, v[:1], causal=True)[0], expected[:1])


def test_what_does_not_fit() -> None:
    q = torch.randn(2, 2, 20, 16).bfloat16()
    assert fits_tma(q, q, q, options_of(q, q, q))
    wide = torch.randn(2, 2, 20, 20).bfloat16()
    moved = torch.randn(2 * 2 * 20 * 16 + 1).bfloat16()[1:].view(q.shape)
    same = q[:1].expand(2, -1, -1, -1)
    for each in (wide, moved, same, q.float(), q[:, :, :0]):
        assert not fits_tma(each, each, each, options_of(each, each, each))
    dropout = Dropout(1, 2, 3, 0.1, torch.tensor([0, 1]), (0, 2))
    mask = torch.ones(2, 20, dtype=torch.bool)
    assert not fits_tma(q, q, q, options_of(q, q, q, dropout=dropout))
    assert not fits_tma(q, q, q, options_of(q, q, q, key_mask=mask))


def test_attention_takes_it_and_goes_back_by_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(33, 40, H=4, options=CAUSAL)
    taken = []

    def fits(*arguments: Any) -> bool:
        taken.append(fits_tma(*arguments))
        return taken[-1]

    monkeypatch.setattr(attention_launch, "can_tma", fits)
    rows = configs(shape.row) | {"attention_forward_tma": SMALL}
    function = interpreted(lambda q, k, v: attention(q, k, v, **shape.options), **rows)
    twice(function, lambda q, k, v: eager(q, k, v, **shape.options), shape.inputs(), torch.bfloat16)
    assert taken == [True]


def test_nobody_else_loses_an_allocator() -> None:
    from triton.runtime import _allocation

    q = torch.randn(1, 1, 16, 16).bfloat16()
    before = _allocation._allocator.get()
    with config.override(attention_forward_tma=SMALL):
        ours(q, q, q)
    assert _allocation._allocator.get() is before


MUTANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "the diagonal hides a key": ("q_index + shift + 1)", "q_index + shift)", CAUSAL),
    "the diagonal shows a key more": ("q_index + shift + 1)", "q_index + shift + 2)", CAUSAL),
    "the window is one longer": ("first = q_index + shift - window + 1", "first = q_index + shift - window", WINDOW),
    "keys beyond the end count": ("tl.int32) + S", "tl.int32) + S + 64", {}),
    "acc is not faded": ("acc * fade[:, None]", "acc", {}),
    "the sum is not faded": ("total = total * fade + tl.sum(p, 1)", "total = total + tl.sum(p, 1)", {}),
    "the last tile is dropped": ("    end = S\n", "    end = S // BN * BN\n", {}),
    "the wrong key-value head": ("KEYS.load([b, h // R, start, 0])", "KEYS.load([b, h % (H // R), start, 0])", {}),
    "the window begins a tile late": ("- window + 1, 0) // BN * BN", "- window + 1, 0) // BN * BN + BN", WINDOW),
    "the cap is halved": ("cap_log2 - 2.0 * cap_log2 /", "cap_log2 - cap_log2 /", {"softcap": 2.0}),
    "queries are one off": ("tl.arange(0, BM) - before", "tl.arange(0, BM) - before + 1", CAUSAL),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, options = MUTANTS[name]
    mutant = mutate(attention_tma, old, new)
    monkeypatch.setattr(attention_tma, "attention_forward_tma_kernel", mutant.attention_forward_tma_kernel)
    with pytest.raises(AssertionError, match=r"error|infinities"):
        check(Shape(37, 37, H=4, G=2, options=options, row=SMALL), torch.float16)


def test_the_right_kernel_passes() -> None:
    for options in {str(options): options for _, _, options in MUTANTS.values()}.values():
        check(Shape(37, 37, H=4, G=2, options=options, row=SMALL), torch.float16)
