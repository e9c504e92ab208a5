"""Decoding under the law of twice, over tiles of 16 and several parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from paracomm.kernels import config, decode_kernels, decode_launch, select
from paracomm.kernels.decode import _decode_op, decode
from tests.kernels.interpreted.test_attention import eager
from tests.kernels.law import interpreted, mutate, twice

SMALL = {"BM": 16, "BN": 16, "warps": 4, "stages": 1}
TALL = SMALL | {"BN": 32}


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass(frozen=True)
class Shape:
    """B sequences of T new tokens over S places, H heads on G, of size K; `processors` decides the number of parts."""

    T: int = 1
    S: int = 100
    lengths: Any = None
    K: int = 16
    H: int = 4
    G: int = 2
    B: int = 2
    processors: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    row: dict[str, int] = field(default_factory=lambda: SMALL)

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        shapes = ((self.H, self.T), (self.G, self.S), (self.G, self.S))
        return [torch.randn(self.B, h, n, self.K, generator=generator, dtype=torch.float64) for h, n in shapes]

    def __str__(self) -> str:
        lengths = self.lengths.tolist() if isinstance(self.lengths, Tensor) else self.lengths
        heads = f"K{self.K} H{self.H}/{self.G}"
        return f"{self.T}x{self.S} {lengths} {heads} p{self.processors} {self.row['BN']} {self.options}"


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Each sequence by itself, by the plain version of test_attention.py."""
    counts = (
        [k.shape[2] if lengths is None else int(lengths)] * len(q)
        if not isinstance(lengths, Tensor)
        else lengths.tolist()
    )
    found = [
        eager(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], causal=True, **options)
        for b, n in enumerate(counts)
    ]
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])


def check(shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_launch, "processors", lambda _: shape.processors)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return decode(q.detach(), k.detach(), v.detach(), shape.lengths, **shape.options)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return one_by_one(q, k, v, shape.lengths, **shape.options)

    twice(interpreted(ours, decode=shape.row, decode_odd=shape.row), plain, shape.inputs(), dtype)


SHAPES = [
    Shape(),
    Shape(processors=1),
    Shape(S=1),
    Shape(S=33, lengths=20, row=TALL),
    Shape(T=3, S=64, processors=16),
    Shape(T=3, lengths=int32(100, 41)),
    Shape(T=4, lengths=int32(2, 0)),
    Shape(T=16, S=50, H=6, G=1, B=1),
    Shape(H=6, G=3, lengths=int32(99, 17), row=TALL),
    Shape(options={"window": 9}),
    Shape(T=3, lengths=int32(70, 5), options={"window": 40}),
    Shape(T=2, options={"softcap": 1.5}, processors=20),
    Shape(T=2, K=24, options={"scale": 0.7}),
    Shape(S=40, K=80, B=1),
    Shape(T=2, S=40, K=21),
]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_law_of_twice(shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(shape, dtype, monkeypatch)


def test_parts() -> None:
    """Never more than there are tiles for, enough for all processors where there are; the example is an H100's."""
    assert decode_launch.parts_of(tiles=1, programs=1, count=132) == 1
    assert decode_launch.parts_of(tiles=64, programs=8, count=132) == 32
    assert decode_launch.parts_of(tiles=2048, programs=8, count=132) == 33
    assert decode_launch.parts_of(tiles=100000, programs=1, count=132) == decode_launch.PARTS
    assert decode_launch.parts_of(tiles=2048, programs=1000, count=132) == 1


def test_places_beyond_the_length_are_not_read() -> None:
    q, k, v = (x.float() for x in Shape(T=2).inputs())
    lengths = int32(50, 31)
    with select.backend("triton"), config.override(decode=SMALL):
        expected = decode(q, k, v, lengths)
        for b, n in enumerate(lengths):
            k[b, :, n:] = v[b, :, n:] = torch.nan
        found = decode(q, k, v, lengths)
        above = decode(q, k[:, :, :50], v[:, :, :50], int32(60, 31))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(above, expected, strict=True))


def test_strides_and_the_same_bits_each_time() -> None:
    """A cache [B, S, G, K] in memory; queries as they come out of a projection."""
    q, k, v = (x.bfloat16() for x in Shape(T=3).inputs())
    with select.backend("triton"), config.override(decode=SMALL):
        expected = decode(q, k, v, 90)
        other = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        for tensors in ((q, k, v), other):
            assert all(torch.equal(a, b) for a, b in zip(decode(*tensors, 90), expected, strict=True))
        assert decode(q, k, v, 90, need_lse=False)[1].numel() == 0


@pytest.mark.parametrize("lengths", [None, int32(40, 7)])
def test_opcheck(lengths: Tensor | None) -> None:
    q, k, v = (x.float() for x in Shape(T=2, S=40).inputs())
    with select.backend("triton"), config.override(decode=SMALL):
        torch.library.opcheck(_decode_op, (q, k, v, lengths, 0.25, 9, 0.0))


LENGTHS, WINDOW = {"lengths": int32(100, 41)}, {"options": {"window": 9}}
MUTANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a token does not see itself": ("<= last[:, None]", "< last[:, None]", {}),
    "the window is one longer": ("> (last - window)[:, None]", ">= (last - window)[:, None]", WINDOW),
    "the window begins a tile late": ("- window + 1, 0) // BN", "- window + 1, 0) // BN + 1", WINDOW),
    "the last part is short": ("begin + share * BN, length)", "begin + share * BN, length // BN * BN)", {}),
    "lengths are not looked at": ("tl.minimum(tl.load(LENGTHS + b), S)", "S", LENGTHS),
    "acc is not faded": ("acc * fade[:, None]", "acc", {}),
    "the wrong key-value head": ("K_ + b * k_b + g * k_h", "K_ + b * k_b + (1 - g) * k_h", {}),
    "parts are added as they are": ("values * weight[:, None]", "values", {}),
    "all parts but the first few are dropped": ("tl.range(0, parts, BP)", "tl.range(0, BP, BP)", {"S": 700}),
    "lse forgets the maximum": ("reference + tl.log2(safe) * LN2", "tl.log2(safe) * LN2", {}),
}


def mutant_shape(choices: dict[str, Any]) -> Shape:
    return Shape(**({"T": 2, "B": 2, "processors": 60} | choices))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, choices = MUTANTS[name]
    mutant = mutate(decode_kernels, old, new)
    for kernel in ("decode_kernel", "merge_kernel"):
        monkeypatch.setattr(decode_launch, kernel, getattr(mutant, kernel))
    with pytest.raises(AssertionError, match=r"error|infinities"):
        check(mutant_shape(choices), torch.float32, monkeypatch)


def test_the_right_kernel_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for choices in {str(choices): choices for _, _, choices in MUTANTS.values()}.values():
        check(mutant_shape(choices), torch.float32, monkeypatch)
