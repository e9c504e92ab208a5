"""Questions about a made-up world, answered from memory: the share of right answers to questions never seen.

make example-answering
torchrun --standalone --nproc-per-node 2 examples/answering.py --tp 2       # the same run, a layer on two ranks

Of each of some hundred people five facts are drawn, and each fact can be asked for in eight wordings. One question in
six is held out. Its answer follows from nothing but the same fact asked for in other words: the model has to learn
which questions mean the same, and to keep 1,500 facts.

Beside it: the answer that is most often right for such a question, and the answer to the question most like it.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    "steps": 3000, "batch": 64, "width": 128, "depth": 1, "encoder_depth": 2, "heads": 4, "dropout": 0.0, "lr": 3e-3,
    "seed": 0, "people": 300,
}  # fmt: skip
FREQUENT_MARGIN, NEAREST_MARGIN = 50.0, 50.0
"""In points of a hundred."""
ONE_IN, LONGEST_ANSWER = 6, 8

BEGINNINGS = "Al Bra Cor Dal Eri Fen Gal Hol Ila Jor Kal Lor Mar Nor Ola Per Ros Sil Tor Ul"
ENDINGS = "bert dan dor fried gar helm ina ka lind mo nia os rik sa tan va wen xa ya zo"
"""Of names."""
VALUES = {
    "town": "Arbel Borun Caldis Dremo Eskar Falun Gorin Hestia Ilmar Jorat Kelven Lorna Mardel Norwik Ostan Pirel",
    "job": "baker potter tailor miller joiner painter sailor doctor teacher farmer singer printer weaver smith",
    "pet": "cat dog parrot goat turtle rabbit pony hamster lizard canary donkey ferret",
    "drink": "tea coffee milk cider lemonade cocoa beer wine juice water",
    "colour": "red blue green yellow purple orange brown black white grey",
}
ASKED = {
    "town": (
        "Where does {who} live?", "In which town is {who} at home?", "What is the home town of {who}?",
        "Where do I find the house of {who}?", "To which town do letters for {who} go?", "{who} lives in which town?",
        "Where is {who} at home?", "Which town does {who} come home to?",
    ),
    "job": (
        "What does {who} do for a living?", "What is the trade of {who}?", "Which job does {who} have?",
        "As what does {who} work?", "How does {who} earn money?", "{who} works as what?",
        "What is {who} by trade?", "Which work does {who} do?",
    ),
    "pet": (
        "Which animal does {who} keep?", "What pet does {who} have?", "Which animal lives with {who}?",
        "What does {who} feed every morning?", "The pet of {who} is what?", "{who} keeps which animal?",
        "Which animal belongs to {who}?", "What kind of pet is in the care of {who}?",
    ),
    "drink": (
        "What does {who} like to drink?", "Which drink does {who} order?", "What is in the glass of {who}?",
        "What do I pour for {who}?", "The favourite drink of {who} is what?", "{who} drinks what?",
        "With what is the cup of {who} filled?", "Which drink pleases {who} most?",
    ),
    "colour": (
        "Which colour does {who} like best?", "What is the favourite colour of {who}?", "Which colour does {who} wear?",
        "In which colour is the door of {who} painted?", "The coat of {who} has which colour?",
        "{who} prefers which colour?", "What colour pleases {who} most?", "Which colour is dear to {who}?",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    kind: str


# --- data ---
def questions(people: int, seed: int) -> list[Question]:
    """Every question about a world of so many people, whose facts depend on the seed."""
    draws = random.Random(seed)
    names = ["".join(name) for name in itertools.product(BEGINNINGS.split(), ENDINGS.split())]
    found: list[Question] = []
    for who in draws.sample(names, people):
        for kind, values in VALUES.items():
            fact = draws.choice(values.split())
            found += [Question(wording.format(who=who), fact, kind) for wording in ASKED[kind]]
    return found


def split(asked: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """(to learn from, held out), by the hash of a question's text."""
    return (
        [question for question in asked if not held_out(question.text, ONE_IN)],
        [question for question in asked if held_out(question.text, ONE_IN)],
    )


# --- quality ---
def share_right(found: Sequence[str], expected: Sequence[Question]) -> float:
    """Of a hundred."""
    right = sum(answer == question.answer for answer, question in zip(found, expected, strict=True))
    return 100 * right / len(expected)


def most_frequent(train: Sequence[Question], unseen: Sequence[Question]) -> list[str]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        counts[question.kind][question.answer] += 1
    return [counts[question.kind].most_common(1)[0][0] for question in unseen]


def right_beside(train: Sequence[Question], unseen: Sequence[Question], found: Sequence[str]) -> Verdict:
    memory = Nearest([question.text for question in train])
    nearest = [train[memory.index(question.text)].answer for question in unseen]
    bars = [
        Bar("most frequent answer of its kind", share_right(most_frequent(train, unseen), unseen), FREQUENT_MARGIN),
        Bar("the most similar question's", share_right(nearest, unseen), NEAREST_MARGIN),
    ]
    return Verdict("right answers in a hundred", share_right(found, unseen), bars)


# --- the example ---
def answering(comm: Communicator, options: argparse.Namespace, say: Callable[[str], None]) -> Verdict:
    layout = layout_of(options)
    multiple = multiple_of(layout)
    train, unseen = split(questions(options.people, options.seed))
    words = Vocabulary(comm, (text for question in train for text in (question.text, question.answer)), 2000)
    asked, answers = words.encode([each.text for each in train]), words.encode([each.answer for each in train])
    pairs = list(zip(asked, answers, strict=True))
    config = Seq2SeqConfig(
        width=options.width, depth=options.depth, encoder_depth=options.encoder_depth, heads=options.heads,
        dropout=options.dropout, norm="rms", vocabulary=words.size,
        context=-(-max(32, *map(len, asked)) // multiple) * multiple,
    )  # fmt: skip
    recipe = Recipe(options.steps, options.lr, seed=options.seed)
    learner = Learner(comm, layout, Seq2Seq(config, options.seed), recipe)
    say(f"{len(train):,} questions to learn from, {len(unseen):,} held out; {learner.parameters:,} parameters")
    learner.train(Pairs(pairs, options.batch, multiple, options.seed).batch, say)
    found = words.decode(learner.write(words.encode([question.text for question in unseen]), LONGEST_ANSWER))
    for kind in VALUES:
        chosen = [index for index, question in enumerate(unseen) if question.kind == kind]
        right = share_right([found[index] for index in chosen], [unseen[index] for index in chosen])
        say(f"  {kind:6} {right:5.1f} of a hundred right: {unseen[chosen[0]].text} {found[chosen[0]]}")
    return right_beside(train, unseen, found)


if __name__ == "__main__":
    raise SystemExit(run(answering, options_of(__doc__, **DEFAULTS)))
