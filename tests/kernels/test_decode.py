"""Decoding by its eager twin, which is what runs on a CPU, with or without Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from paracomm.errors import InvalidArgument
from paracomm.kernels import reference
from paracomm.kernels.decode import _decode_op, decode


def inputs(T: int = 2, S: int = 20, H: int = 4, G: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, H, T, 16), torch.randn(2, G, S, 16), torch.randn(2, G, S, 16)


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"softcap": 1.5}, {"scale": 0.8, "window": 30}], ids=str)
@pytest.mark.parametrize("lengths", [None, 13, torch.tensor([20, 1], dtype=torch.int32)], ids=str)
@pytest.mark.parametrize("T", [1, 3])
def test_is_attention_over_the_places_in_use(T: int, lengths: Any, options: dict[str, Any]) -> None:
    q, k, v = inputs(T)
    out, lse = decode(q, k, v, lengths, **options)
    fast, nothing = decode(q, k, v, lengths, **options, need_lse=False)
    torch.testing.assert_close(fast, out, rtol=1e-5, atol=1e-6)
    assert nothing.numel() == 0
    counts = lengths.tolist() if isinstance(lengths, Tensor) else [20 if lengths is None else lengths] * 2
    rest: dict[str, Any] = {"causal": True, "scale": 0.25, "window": None, "softcap": None} | options
    for b, n in enumerate(counts):
        expected, expected_lse = reference.attention(
            q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], key_mask=None, dropout=None, **rest
        )
        torch.testing.assert_close(out[b : b + 1], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse[b : b + 1], expected_lse, rtol=1e-5, atol=1e-6)


def test_nothing_to_see() -> None:
    q, k, v = inputs()
    for lengths in (0, torch.zeros(2, dtype=torch.int32)):
        for need_lse in (True, False):
            out, lse = decode(q, k, v, lengths, need_lse=need_lse)
            assert not out.any() and bool((lse == -torch.inf).all())
    out, lse = decode(q[:, :, :0], k, v)
    assert out.shape == (2, 4, 0, 16) and lse.shape == (2, 4, 0)


@pytest.mark.parametrize("lengths", [None, torch.tensor([20, 1], dtype=torch.int32)], ids=str)
def test_opcheck(lengths: Tensor | None) -> None:
    torch.library.opcheck(_decode_op, (*inputs(), lengths, 0.25, -1, 0.0))


def test_what_does_not_fit() -> None:
    q, k, v = inputs()
    wrong = {
        "expected q": (q[0], k, v),
        "multiple": (q[:, :3], k, v),
        "one dtype": (q, k.half(), v),
        "head size": (q[..., :0], k[..., :0], v[..., :0]),
    }
    for message, tensors in wrong.items():
        with pytest.raises(InvalidArgument, match=message):
            decode(*tensors)
    for lengths in (21, -1, torch.tensor([1, 2]), torch.tensor([1], dtype=torch.int32)):
        with pytest.raises(InvalidArgument, match="length"):
            decode(q, k, v, lengths)
    for options in ({"window": 0}, {"scale": -1.0}, {"softcap": 0.0}):
        with pytest.raises(InvalidArgument, match="expected more than 0"):
            decode(q, k, v, **options)
