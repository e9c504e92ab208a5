"""Wrong kernels: one change each, and the law of twice must fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paracomm.kernels import attention_backward_kernels as attention_backward
from paracomm.kernels import attention_forward_kernels as attention_forward
from paracomm.kernels import attention_launch
from tests.kernels.interpreted.test_attention import DROP, MASK, SMALL, Shape, check
from tests.kernels.law import mutate

CAUSAL, WINDOW = {"causal": True}, {"causal": True, "window": 7}
MUTANTS = {
    "the diagonal hides a key": (
        attention_forward,
        "<= q_index[:, None] + shift)",
        "< q_index[:, None] + shift)",
        CAUSAL,
    ),
    "the window is one longer": (
        attention_forward,
        "> q_index[:, None] + shift - window)",
        ">= q_index[:, None] + shift - window)",
        WINDOW,
    ),
    "keys beyond the end count": (
        attention_forward,
        "see = (k_index < S)[None, :]",
        "see = (k_index < S + 64)[None, :]",
        {},
    ),
    "acc is not faded": (attention_forward, "acc * fade[:, None]", "acc", {}),
    "the sum is not faded": (
        attention_forward,
        "total = total * fade + tl.sum(p, 1)",
        "total = total + tl.sum(p, 1)",
        {},
    ),
    "lse forgets the maximum": (attention_forward, "(top + tl.log2(safe)) * LN2", "tl.log2(safe) * LN2", {}),
    "lse in log2": (attention_forward, "(top + tl.log2(safe)) * LN2", "(top + tl.log2(safe))", {}),
    "the last full tile is dropped": (attention_forward, "end = tl.cdiv(S, BN)", "end = tl.cdiv(S, BN) - 1", {}),
    "the wrong key-value head": (attention_forward, "K_ + h // R * k_h", "K_ + h % (H // R) * k_h", CAUSAL),
    "the cap does not bend": (
        attention_forward,
        "cap_log2 * tanh(scores * to_cap)",
        "cap_log2 * (scores * to_cap)",
        {"softcap": 2.0},
    ),
    "dropout drops what it should keep": (
        attention_forward,
        "words.to(tl.int64) >= threshold",
        "words.to(tl.int64) < threshold",
        {"dropout": DROP},
    ),
    "dropout forgets the scale": (attention_forward, "(keep_scale if DROPOUT else 1.0)", "1.0", {"dropout": DROP}),
    "the key mask is not looked at": (
        attention_forward,
        "other=False)[None, :]\n            scores",
        "other=False)[None, :] | True\n            scores",
        {"key_mask": MASK},
    ),
    "dk without the scale": (attention_backward, "dk = dk * scale", "dk = dk", {}),
    "dq without the scale": (attention_backward, "(dq * scale).to", "dq.to", {}),
    "delta is not subtracted": (attention_backward, "ds = p * (dp - delta[None, :])", "ds = p * dp", {}),
    "the cap is not differentiated": (
        attention_backward,
        "return 1.0 - bend * bend",
        "return 1.0 + 0.0 * bend",
        {"softcap": 2.0},
    ),
    "one head of a group is forgotten": (attention_backward, "R * (last - first)", "(R - 1) * (last - first)", CAUSAL),
    "dkdv begins a tile late": (
        attention_backward,
        "begin = tl.minimum(tl.maximum(first_key - shift, 0) // BM, end)",
        "begin = tl.minimum(tl.maximum(first_key - shift, 0) // BM + 1, end)",
        CAUSAL,
    ),
    "dropout is not in dv": (attention_backward, "tl.where(keep, p, 0.0) if DROPOUT else p", "p", {"dropout": DROP}),
}


def shape(options: dict[str, Any]) -> Shape:
    batch = 2 if {"dropout", "key_mask"} & set(options) else 1
    return Shape(37, 37, H=4, G=2, B=batch, options=options, row=SMALL)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, old, new, options = MUTANTS[name]
    mutant = mutate(module, old, new)
    forward = attention_forward if module is attention_backward else mutant
    backward = mutant if module is attention_backward else attention_backward
    monkeypatch.setattr(attention_launch, "attention_forward_kernel", forward.attention_forward_kernel)
    for kernel in ("attention_dkdv_kernel", "attention_dq_kernel"):
        monkeypatch.setattr(attention_launch, kernel, getattr(backward, kernel))
    with pytest.raises(AssertionError, match="error"):
        check(shape(options), torch.float32)


def test_the_right_kernel_passes() -> None:
    for options in {str(options): options for _, _, _, options in MUTANTS.values()}.values():
        check(shape(options), torch.float32)
