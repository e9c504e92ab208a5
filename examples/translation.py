"""English to German, learned from the message catalogues of programs, in chrF on messages that it never saw.

make example-translation
torchrun --standalone --nproc-per-node 2 examples/translation.py --tp 2     # the same run, a layer on two ranks

The catalogues are those of requirements/catalogues.txt, read out of the wheels that make has downloaded: nothing of
them is installed. Messages that differ in capitals, digits, punctuation and placeholders only are on one side of the
split.

Beside it: the English text as it is; and a translation memory, which gives the translation of the message it knows that
is most like the one asked for.
"""

from __future__ import annotations

import argparse
import gettext
import io
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from learning import (
    Bar,
    Learner,
    Nearest,
    Pairs,
    Recipe,
    Verdict,
    Vocabulary,
    held_out,
    layout_of,
    multiple_of,
    options_of,
    run,
)

from paracomm.comm import Communicator
from paracomm.errors import InvalidArgument
from paracomm.models import Seq2Seq, Seq2SeqConfig

DEFAULTS = {
    "steps": 2000, "batch": 64, "width": 160, "depth": 2, "heads": 4, "dropout": 0.1, "lr": 3e-3, "seed": 0,
    "vocabulary": 3000, "longest": 40, "catalogues": str(Path(sys.prefix) / "catalogues"),
}  # fmt: skip
COPY_MARGIN = 15.0
"""In points of chrF. Of the translation memory nothing is asked: it knows a near twin of many messages."""
ONE_IN = 20

Messages = list[tuple[str, str]]
"""English, German."""


# --- data ---
def messages(folder: Path) -> Messages:
    """Every message of the wheels under `folder`, once. Raises InvalidArgument where there are none."""
    found: dict[str, str] = {}
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as opened:
            for name in sorted(opened.namelist()):
                if "/de/LC_MESSAGES/" in name and name.endswith(".mo"):
                    for english, german in _catalogue(opened.read(name)):
                        found.setdefault(english, german)
    if not found:
        raise InvalidArgument(
            f"translation: no catalogues in '{folder}'; `make example-translation` downloads those of "
            "requirements/catalogues.txt"
        )
    return sorted(found.items())


def _catalogue(data: bytes) -> Iterator[tuple[str, str]]:
    """Of a message with forms for numbers, the first."""
    # What gettext has parsed it keeps to itself; its methods only look up messages that one knows.
    catalogue = gettext.GNUTranslations(io.BytesIO(data))._catalog
    for key, german in catalogue.items():
        english, form = key if isinstance(key, tuple) else (key, 0)
        english = english.rpartition("\x04")[2]  # a context stands before it
        if form == 0 and english and german:
            yield _plain(english), _plain(german)


def _plain(text: str) -> str:
    """One line, without the mark of the letter that opens a menu's entry."""
    if text.count("_") == 1 and not set("%{<") & set(text):
        text = text.replace("_", "")
    return " ".join(text.split())


def key_of(english: str) -> str:
    """What messages that say the same have in common."""
    without = re.sub(r"%\(\w+\)\w|%\w|\{[^}]*\}|<[^>]*>", " ", english.lower())
    return " ".join(re.findall(r"[^\W\d_]+", without))


def split(pairs: Messages) -> tuple[Messages, Messages]:
    """(to train on, held out), with no key on both sides; messages without a word are left out."""
    keyed = [(key_of(english), (english, german)) for english, german in pairs]
    return (
        [pair for key, pair in keyed if key and not held_out(key, ONE_IN)],
        [pair for key, pair in keyed if key and held_out(key, ONE_IN)],
    )


# --- quality ---
def chrf(found: Sequence[str], expected: Sequence[str], order: int = 6, beta: float = 2.0) -> float:
    """chrF of a corpus, 0 to 100 (Popović, "chrF", 2015): F_beta of the n-grams of characters, spaces left out.

    Precision and recall are means over the n from 1 to `order` that occur at all.
    """
    shares: list[tuple[float, float]] = []
    for n in range(1, order + 1):
        matches = of_found = of_expected = 0
        for ours, theirs in zip(found, expected, strict=True):
            mine, right = _grams(ours, n), _grams(theirs, n)
            matches += (mine & right).total()
            of_found, of_expected = of_found + mine.total(), of_expected + right.total()
        if of_found and of_expected:
            shares.append((matches / of_found, matches / of_expected))
    if not shares:
        return 0.0
    precision, recall = (sum(share) / len(shares) for share in zip(*shares, strict=True))
    weighted = beta**2 * precision + recall
    return 100 * (1 + beta**2) * precision * recall / weighted if weighted else 0.0


def _grams(text: str, n: int) -> Counter[str]:
    squeezed = "".join(text.split())
    return Counter(squeezed[i : i + n] for i in range(len(squeezed) - n + 1))


def chrf_beside(train: Messages, unseen: Messages, found: Sequence[str]) -> Verdict:
    sources, expected = zip(*unseen, strict=True)
    memory = Nearest([english for english, _ in train])
    remembered = [train[memory.index(source)][1] for source in sources]
    bars = [
        Bar("the English text", chrf(sources, expected), COPY_MARGIN),
        Bar("translation memory", chrf(remembered, expected)),
    ]
    return Verdict("chrF", chrf(found, expected), bars)


# --- the example ---
def translation(comm: Communicator, options: argparse.Namespace, say: Callable[[str], None]) -> Verdict:
    layout = layout_of(options)
    train, unseen = split(messages(Path(options.catalogues)))
    words = Vocabulary(comm, chain.from_iterable(train), options.vocabulary)
    encoded = zip(*(words.encode(side) for side in zip(*train, strict=True)), strict=True)
    pairs = [pair for pair in encoded if max(map(len, pair)) < options.longest]
    unseen = [pair for pair in unseen if max(map(len, words.encode(pair))) < options.longest]
    say(f"{len(pairs):,} messages to learn from, {len(unseen):,} held out, {words.size:,} pieces of words")
    config = Seq2SeqConfig(
        width=options.width, depth=options.depth, heads=options.heads, dropout=options.dropout, positions="rotary",
        norm="rms",
        context=-(-options.longest // multiple_of(layout)) * multiple_of(layout), vocabulary=words.size,
    )  # fmt: skip
    recipe = Recipe(options.steps, options.lr, seed=options.seed)
    learner = Learner(comm, layout, Seq2Seq(config, options.seed), recipe)
    say(f"{learner.parameters:,} parameters, {options.batch} messages a step")
    learner.train(Pairs(pairs, options.batch, multiple_of(layout), options.seed).batch, say)
    found = words.decode(learner.write(words.encode([english for english, _ in unseen]), options.longest))
    for (english, german), ours in list(zip(unseen, found, strict=True))[:: max(1, len(unseen) // 5)]:
        say(f"  {english}\n    {ours}\n    ({german})")
    return chrf_beside(train, unseen, found)


if __name__ == "__main__":
    raise SystemExit(run(translation, options_of(__doc__, **DEFAULTS)))
