"""Reports of a day in a made-up town, summed up in a sentence: ROUGE-L on reports of days never seen.

make example-summaries
torchrun --standalone --nproc-per-node 2 examples/summaries.py --tp 2       # the same run, a layer on two ranks

A report says where and when, then in any order, each in one of several wordings, how it was with the ferry, the
weather, the market, the school and the town hall, and something that matters to nobody. Its summary names the town and
at most three things that were out of the ordinary, the gravest first, in words of its own: what to leave out is to be
learned, and so is what a wording means. Days are held out by what was out of the ordinary on them, which is then, in
whatever town, order and wording, on one side of the split.

Beside it: lead-n, the first words of the report (n is what is best on the reports to learn from), the summary that is
most like all others, and that of the report that is most alike.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

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
from paracomm.models import Seq2Seq, Seq2SeqConfig

DEFAULTS = {
    "steps": 800, "batch": 64, "width": 96, "depth": 1, "encoder_depth": 2, "heads": 4, "dropout": 0.0, "lr": 3e-3,
    "seed": 0, "vocabulary": 1000, "reports": 12000, "questions": 500,
}  # fmt: skip
LEAD_MARGIN, CONSTANT_MARGIN, NEAREST_MARGIN = 40.0, 30.0, 10.0
"""In points of ROUGE-L."""
ONE_IN, MENTIONED, LONGEST = 8, 3, 40

TOWNS = (
    "Arbel", "Borun", "Caldis", "Dremo", "Eskar", "Falun", "Gorin", "Hestia", "Ilmar", "Jorat", "Kelven", "Lorna",
    "Mardel", "Norwik", "Ostan", "Pirel",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
OPENINGS = ("News from {town}, {day}.", "This is what {day} brought to {town}.", "{day} in {town} is over.")
ASIDES = (
    "A cat sat on the steps of the library.",
    "The clock on the tower was wound up.",
    "Two boys flew a kite behind the mill.",
    "The baker tried a new kind of bread.",
    "Somebody had lost a glove near the well.",
)
# What can be, the gravest first: (what the summary says; "": nothing, it is as ever) and the wordings of the report.
ASPECTS: tuple[tuple[tuple[str, tuple[str, ...]], ...], ...] = (
    (
        ("", ("The boat crossed as planned.", "Nobody waited long at the pier.", "The crossing was smooth.")),
        ("the ferry did not run", ("The boat stayed tied up all day.", "No crossing was possible.")),
        ("the ferry was late", ("At the pier one stood for an hour.", "The boat came long after noon.")),
    ),
    (
        ("", ("The air was soft and calm.", "A few clouds passed.", "It was neither warm nor cold.")),
        ("a storm broke", ("Roofs lost tiles to the gusts.", "The wind tore at every tree.")),
        ("it froze hard", ("Ice lay on every puddle.", "Breath turned white at once.")),
        ("it was very hot", ("People kept to the shade.", "The tar on the road went soft.")),
    ),
    (
        ("", ("The stalls sold what they always sell.", "Trade went on as usual.", "Buyers came and went.")),
        ("the market was packed", ("One could hardly move between the stalls.", "Every basket was sold by ten.")),
        ("the market stood empty", ("Most traders packed up early.", "Not a buyer was seen.")),
    ),
    (
        ("", ("The children had lessons.", "The bell rang at eight as ever.", "Classes were held.")),
        ("the school stayed shut", ("The children were sent home again.", "The classrooms were locked.")),
    ),
    (
        ("", ("The council did not meet.", "At the town hall all was quiet.", "The clerk sorted his papers.")),
        ("a new mayor was chosen", ("The votes were counted, and one man beamed.", "The chain went to other hands.")),
        ("taxes were raised", ("Everyone will pay more from spring.", "The council wants more coins from us.")),
    ),
)

Examples = list[tuple[str, str]]
"""Reports and their summaries."""


# --- data ---
def day(dice: random.Random) -> tuple[str, str, str]:
    """(report, summary, what happened)."""
    town, chosen = dice.choice(TOWNS), [dice.randrange(len(aspect)) for aspect in ASPECTS]
    for index in range(len(chosen)):  # half of all things are as ever
        chosen[index] *= dice.random() < 0.7
    wordings = [dice.choice(aspect[which][1]) for aspect, which in zip(ASPECTS, chosen, strict=True)]
    sentences = [*wordings, dice.choice(ASIDES)]
    dice.shuffle(sentences)
    opening = dice.choice(OPENINGS).format(town=town, day=dice.choice(DAYS))
    notable = [aspect[which][0] for aspect, which in zip(ASPECTS, chosen, strict=True) if aspect[which][0]]
    return " ".join([opening, *sentences]), summary(town, notable[:MENTIONED]), repr(notable)


def summary(town: str, notable: Sequence[str]) -> str:
    if not notable:
        return f"{town} had a quiet day."
    *before, last = notable
    return f"In {town} {', '.join(before)}{' and ' if before else ''}{last}."


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def split(count: int, seed: int) -> tuple[Examples, Examples]:
    """(to learn from, held out) of `count` days: what happened on one of the one kind happened on none of the other."""
    dice = random.Random(seed)
    sides: tuple[Examples, Examples] = ([], [])
    for report, summed_up, happened in (day(dice) for _ in range(count)):
        sides[held_out(happened, ONE_IN)].append((report, summed_up))
    return sides


# --- quality ---
def rouge_l(found: Sequence[str], expected: Sequence[str]) -> float:
    """The mean F1 of the longest common subsequence of words, 0 to 100 (Lin, "ROUGE", 2004, section 3)."""
    scores = [_rouge_l(words_of(ours), words_of(theirs)) for ours, theirs in zip(found, expected, strict=True)]
    return 100 * sum(scores) / len(scores)


def _rouge_l(found: list[str], expected: list[str]) -> float:
    row = [0] * (len(expected) + 1)  # of the words so far: the longest common subsequence with each beginning
    for word in found:
        before = row
        row = [0]
        for index, other in enumerate(expected):
            row.append(before[index] + 1 if word == other else max(row[-1], before[index + 1]))
    return 2 * row[-1] / (len(found) + len(expected)) if found and expected else 0.0


def lead(report: str, count: int) -> str:
    return " ".join(words_of(report)[:count])


def best_lead(train: Examples) -> int:
    """The number of words that lead-n does best with, of a sample to learn from."""
    sample = train[:: max(1, len(train) // 1000)]
    reports, sentences = zip(*sample, strict=True)
    return max(range(1, 16), key=lambda n: rouge_l([lead(report, n) for report in reports], sentences))


def most_central(train: Examples) -> str:
    """Of the sentences that occur most often, the one that is most like a sample of all."""
    sample = [sentence for _, sentence in train[:: max(1, len(train) // 500)]]
    common = [sentence for sentence, _ in Counter(sentence for _, sentence in train).most_common(50)]
    return max(common, key=lambda sentence: rouge_l([sentence] * len(sample), sample))


def rouge_beside(train: Examples, unseen: Examples, found: Sequence[str]) -> Verdict:
    reports, expected = zip(*unseen, strict=True)
    count, constant = best_lead(train), most_central(train)
    memory = Nearest([report for report, _ in train])
    nearest = [train[memory.index(report)][1] for report in reports]
    bars = [
        Bar(f"lead-{count}", rouge_l([lead(report, count) for report in reports], expected), LEAD_MARGIN),
        Bar(f'always "{constant}"', rouge_l([constant] * len(reports), expected), CONSTANT_MARGIN),
        Bar("the most similar report's", rouge_l(nearest, expected), NEAREST_MARGIN),
    ]
    return Verdict("ROUGE-L", rouge_l(found, expected), bars)


# --- the example ---
def summaries(comm: Communicator, options: argparse.Namespace, say: Callable[[str], None]) -> Verdict:
    layout = layout_of(options)
    multiple = multiple_of(layout)
    train, unseen = split(options.reports, options.seed)
    unseen = unseen[: options.questions]
    words = Vocabulary(comm, chain.from_iterable(train), options.vocabulary)
    pairs = list(zip(*(words.encode(side) for side in zip(*train, strict=True)), strict=True))
    asked = words.encode([report for report, _ in unseen])
    longest = max(LONGEST, *map(len, asked), *(len(report) for report, _ in pairs))
    config = Seq2SeqConfig(
        width=options.width, depth=options.depth, encoder_depth=options.encoder_depth, heads=options.heads,
        dropout=options.dropout, positions="rotary", norm="rms", vocabulary=words.size,
        context=-(-longest // multiple) * multiple,
    )  # fmt: skip
    learner = Learner(
        comm, layout, Seq2Seq(config, options.seed), Recipe(options.steps, options.lr, seed=options.seed)
    )  # fmt: skip
    say(f"{len(pairs):,} reports to learn from, {len(unseen):,} held out; {learner.parameters:,} parameters")
    learner.train(Pairs(pairs, options.batch, multiple, options.seed).batch, say)
    written = words.decode(learner.write(asked, LONGEST))
    for (report, expected), ours in list(zip(unseen, written, strict=True))[:3]:
        say(f"  {report}\n    {ours}\n    ({expected})")
    return rouge_beside(train, unseen, written)


if __name__ == "__main__":
    raise SystemExit(run(summaries, options_of(__doc__, **DEFAULTS)))
