"""A byte-level language model of the Python standard library's own sources, in bits a byte of files that it never saw.

make example-language
torchrun --standalone --nproc-per-node 2 examples/language.py --tp 2        # the same run, a layer on two ranks

Beside it: how often each byte occurs; an order-2 model, which knows what follows each two bytes, falling back on one
and on none; gzip and lzma, which compress the held-out text by itself; and lzma again, which first has seen the end of
the text to train on, as much as its window holds.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import math
from collections.abc import Callable

import numpy as np
from learning import Bar, Batch, Learner, Recipe, Verdict, layout_of, options_of, run
from torch import Tensor

from paracomm.comm import Communicator
from paracomm.models import Decoder, DecoderConfig
from paracomm.train.data import Corpus, batch, evaluation_batches, load_corpus

DEFAULTS = {
    "steps": 1200, "batch": 32, "context": 128, "width": 128, "depth": 4, "heads": 4, "lr": 3e-3, "seed": 0,
    "windows": 1024,
}  # fmt: skip
FREQUENCIES_MARGIN, ORDER_2_MARGIN, GZIP_MARGIN = 2.0, 0.6, 0.15
"""In bits a byte."""


def order_2_bits(train: Tensor, held_out: Tensor) -> float:
    """Bits a byte on `held_out` of the counts in `train`: p(c | ab) = (n(abc) + k p(c | b)) / (n(ab) + k), and so on.

    Each order is smoothed by the one below it (Witten-Bell): k is how many different bytes were seen to follow.
    """
    known, unknown = train.numpy().astype(np.int64), held_out.numpy().astype(np.int64)
    p = np.full(len(unknown) - 2, 1 / 256)
    for order in range(3):
        contexts, asked = np.zeros(len(known) - 2, np.int64), np.zeros(len(unknown) - 2, np.int64)
        for back in range(order, 0, -1):
            contexts = contexts * 256 + known[2 - back : len(known) - back]
            asked = asked * 256 + unknown[2 - back : len(unknown) - back]
        counts = np.bincount(contexts * 256 + known[2:], minlength=256 ** (order + 1)).reshape(-1, 256)
        kinds, total = np.maximum(1, (counts > 0).sum(1)), counts.sum(1)
        p = (counts[asked, unknown[2:]] + kinds[asked] * p) / (total[asked] + kinds[asked])
    return float(-np.log2(p).mean())


def compressed_bits(corpus: Corpus) -> dict[str, float]:
    """Bits a byte that gzip and lzma need for the held-out text."""
    known, text = corpus.train.numpy().tobytes(), corpus.held_out.numpy().tobytes()
    window = known[-(7 << 20) :]

    def squeezed(data: bytes) -> int:
        return len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=6))

    return {
        "gzip": 8 * len(gzip.compress(text, 9)) / len(text),
        "lzma": 8 * squeezed(text) / len(text),
        "lzma behind 7 MiB of the training text": 8 * (squeezed(window + text) - squeezed(window)) / len(text),
    }


def bits_beside(corpus: Corpus, value: float) -> Verdict:
    squeezed = compressed_bits(corpus)
    bars = [
        Bar("byte frequencies", corpus.unigram_bits(), FREQUENCIES_MARGIN),
        Bar("order-2 model", order_2_bits(corpus.train, corpus.held_out), ORDER_2_MARGIN),
        Bar("gzip", squeezed.pop("gzip"), GZIP_MARGIN),
        *(Bar(name, bits) for name, bits in squeezed.items()),
    ]
    return Verdict("bits a byte", value, bars, less=True)


def language(comm: Communicator, options: argparse.Namespace, say: Callable[[str], None]) -> Verdict:
    corpus = load_corpus()
    files, unseen_files = corpus.files
    say(f"{len(corpus.train):,} bytes in {files} files, {len(corpus.held_out):,} held out in {unseen_files}")
    config = DecoderConfig(
        width=options.width, depth=options.depth, heads=options.heads, context=options.context, positions="rotary",
        norm="rms", mlp="swiglu",
    )  # fmt: skip
    learner = Learner(
        comm, layout_of(options), Decoder(config, options.seed), Recipe(options.steps, options.lr, seed=options.seed)
    )
    say(f"{learner.parameters:,} parameters, {options.batch} x {options.context} bytes a step")

    def batch_of(step: int) -> Batch:
        tokens, targets = batch(corpus.train, options.context, options.batch, seed=options.seed, step=step)
        return {"tokens": tokens, "targets": targets}

    learner.train(batch_of, say)
    windows = evaluation_batches(corpus.held_out, options.context, options.windows, options.batch)
    nats = learner.nats({"tokens": tokens, "targets": targets} for tokens, targets in windows)
    return bits_beside(corpus, nats / math.log(2))


if __name__ == "__main__":
    raise SystemExit(run(language, options_of(__doc__, **DEFAULTS)))
