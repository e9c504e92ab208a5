"""examples/language.py: its baselines, and a run of a few steps."""

from __future__ import annotations

import math
from collections import Counter

import language
import numpy as np
import pytest
import torch

from paracomm.train.data import Corpus
from tests.examples.runs import expect_beaten, few_steps


def as_bytes(text: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(text, np.uint8).copy())


def plain_order_2(train: bytes, text: bytes) -> float:
    """As order_2_bits says, byte by byte."""
    counts = [Counter(train[i - order : i + 1] for i in range(2, len(train))) for order in range(3)]
    bits = 0.0
    for i in range(2, len(text)):
        p = 1 / 256
        for order in range(3):
            before = text[i - order : i]
            follow = {key: n for key, n in counts[order].items() if key[:-1] == before}
            kinds = max(1, len(follow))
            p = (counts[order][text[i - order : i + 1]] + kinds * p) / (sum(follow.values()) + kinds)
        bits -= math.log2(p)
    return bits / (len(text) - 2)


def test_the_order_2_model() -> None:
    train, text = b"abracadabra abra cadabra", b"a cadabra zabra"
    assert language.order_2_bits(as_bytes(train), as_bytes(text)) == pytest.approx(plain_order_2(train, text))
    assert language.order_2_bits(as_bytes(b"ab" * 500), as_bytes(b"ab" * 50)) < 0.02


def made_up(bytes_: int) -> Corpus:
    draws = np.random.default_rng(0)
    words = [b"for ", b"row ", b"in ", b"rows:\n", b"    ", b"return ", b"None\n", b"import "]
    text = b"".join(words[i] for i in draws.integers(0, len(words), bytes_ // 4))
    return Corpus(as_bytes(text[: bytes_ - 3000]), as_bytes(text[-3000:]), (1, 1), "made up", "0" * 64)


def test_compressors_are_measured_on_the_held_out_text() -> None:
    bits = language.compressed_bits(made_up(40000))
    # Eight words, equally likely, of 5.1 bytes: 3 bits a word.
    assert 0.55 < bits["lzma behind 7 MiB of the training text"] < bits["lzma"] < 1.8
    assert 0.55 < bits["gzip"] < 1.8


SMALL = {"batch": 4, "context": 32, "width": 16, "depth": 1, "heads": 2, "windows": 16}


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"cp": 2}], ids=str)
def test_a_few_steps_do_not_pass(layout: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "load_corpus", lambda: made_up(40000))
    (verdict, said), (other, _) = few_steps(language.language, language.DEFAULTS | SMALL, steps=3, **layout)
    expect_beaten(verdict)
    assert 4 < verdict.value < 9 and verdict == other
    assert any("held out" in line for line in said)
