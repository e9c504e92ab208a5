"""Questions about short made-up stories, answered by reading them: the share of right answers on stories never seen.

make example-answering
torchrun --standalone --nproc-per-node 2 examples/answering.py --tp 2       # the same run, a layer on two ranks

Up to three people, three facts about each, in any order and in several wordings. A question asks for one fact of a
person, for the person of a fact, or, over both, for one fact by another ("Where does the potter live?"). Which person
has which fact is drawn anew for every story, so that nothing but the story says it.
The answer is a sentence, of which one word counts: the person or the fact that was asked for.

Beside it: the answer that is most often right for such a question, and the best that goes without understanding who is
who, an answer of the right kind from the story (the first one; each of three is as likely).
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from learning import (
    Bar,
    Learner,
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
    "steps": 2000, "batch": 64, "width": 96, "depth": 1, "encoder_depth": 3, "heads": 4, "lr": 2e-3, "seed": 0,
    "stories": 40000, "questions": 1000,
}  # fmt: skip
FREQUENT_MARGIN, FIRST_MARGIN = 40.0, 25.0
"""In points of a hundred."""
PEOPLE, ONE_IN, LONGEST_ANSWER = 3, 20, 8
"""Stories to learn from have one person to three: the short ones soon teach that the answer is in the text."""

NAMES = tuple(
    name
    for line in (
        "Ada Boris Clara Dario Elsa Fabian Greta Hugo Ines Jonas Kira Lukas",
        "Mira Nils Olga Pavel Rosa Stefan Tilda Viktor Wanda Xaver Yara Zeno",
    )
    for name in line.split()
)
WORDS = {
    "town": "Arbel Borun Caldis Dremo Eskar Falun Gorin Hestia Ilmar Jorat Kelven Lorna Mardel Norwik Ostan Pirel",
    "job": "baker potter tailor miller joiner painter sailor doctor teacher farmer singer printer weaver smith",
    "pet": "cat dog parrot goat turtle rabbit pony hamster lizard canary donkey ferret",
}
VALUES = {kind: words.split() for kind, words in WORDS.items()}
SAID = {
    "town": ("{who} lives in {what}.", "The home of {who} is in {what}.", "In {what} stands the house of {who}."),
    "job": ("{who} is a {what}.", "{who} earns a living as a {what}.", "By trade {who} is a {what}."),
    "pet": ("{who} keeps a {what}.", "There is a {what} in the care of {who}.", "A {what} belongs to {who}."),
}
ASKED_OF_PERSON = {
    "town": "Where does {who} live?",
    "job": "What is the trade of {who}?",
    "pet": "Which animal does {who} keep?",
}
ASKED_FOR_PERSON = {
    "town": "Who lives in {what}?",
    "job": "Who is the {what}?",
    "pet": "Who keeps the {what}?",
}
ANSWERED = {"town": "{who} lives in {what}", "job": "{who} is a {what}", "pet": "{who} keeps a {what}"}
SOMEONE = {
    "town": "the one from {what}",
    "job": "the {what}",
    "pet": "the one with the {what}",
}


@dataclass(frozen=True)
class Story:
    """`answer`: the one word that counts; `says`: the sentence it stands in; `asks`: "fact", "person" or "both".

    `kind`: of the answer; `choices`: what the story has of it, in order.
    """

    text: str
    question: str
    answer: str
    says: str
    asks: str
    kind: str
    choices: tuple[str, ...]

    @property
    def source(self) -> str:
        return f"{self.question} {self.text}"


# --- data ---
def stories(seed: int, unseen: bool) -> Iterator[Story]:
    """Without end: those that are held out, or those to learn from; which is which, the hash of a story's text says."""
    draws = random.Random(seed)
    while True:
        story = _story(draws, PEOPLE if unseen else draws.randint(1, PEOPLE))
        if held_out(story.text, ONE_IN) == unseen:
            yield story


def _story(draws: random.Random, count: int) -> Story:
    people = draws.sample(NAMES, count)
    facts = {kind: dict(zip(people, draws.sample(values, count), strict=True)) for kind, values in VALUES.items()}
    told = [(kind, who) for kind in facts for who in people]
    draws.shuffle(told)
    text = " ".join(draws.choice(SAID[kind]).format(who=who, what=facts[kind][who]) for kind, who in told)
    who, asks = draws.choice(people), draws.choice(("fact", "person", "both"))
    known, wanted = draws.sample(list(VALUES), 2)
    named = SOMEONE[known].format(what=facts[known][who]) if asks == "both" else who
    if asks == "person":
        kind, answer, question = "name", who, ASKED_FOR_PERSON[known].format(what=facts[known][who])
        wanted, choices = known, [other for kind, other in told if kind == known]
    else:
        kind, answer, question = wanted, facts[wanted][who], ASKED_OF_PERSON[wanted].format(who=named)
        choices = [facts[wanted][other] for kind, other in told if kind == wanted]
    says = ANSWERED[wanted].format(who=who, what=facts[wanted][who])
    return Story(text, question, answer, says, asks, kind, tuple(choices))


# --- quality ---
def answer_in(sentence: str, story: Story) -> str:
    """Of a sentence that answers: the person, who comes first, or else the fact, which comes last."""
    words = sentence.split() or [""]
    return words[0] if story.asks == "person" else words[-1]


def share_right(found: Sequence[str], expected: Sequence[Story]) -> float:
    """Of a hundred."""
    right = sum(answer == story.answer for answer, story in zip(found, expected, strict=True))
    return 100 * right / len(expected)


def most_frequent(train: Sequence[Story], unseen: Sequence[Story]) -> list[str]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for story in train:
        counts[story.kind][story.answer] += 1
    return [counts[story.kind].most_common(1)[0][0] for story in unseen]


def right_beside(train: Sequence[Story], unseen: Sequence[Story], found: Sequence[str]) -> Verdict:
    bars = [
        Bar("most frequent answer", share_right(most_frequent(train, unseen), unseen), FREQUENT_MARGIN),
        Bar("first of its kind", share_right([story.choices[0] for story in unseen], unseen), FIRST_MARGIN),
    ]
    return Verdict("right answers in a hundred", share_right(found, unseen), bars)


# --- the example ---
def answering(comm: Communicator, options: argparse.Namespace, say: Callable[[str], None]) -> Verdict:
    layout = layout_of(options)
    train = list(islice(stories(options.seed, unseen=False), options.stories))
    unseen = list(islice(stories(options.seed + 1, unseen=True), options.questions))
    words = Vocabulary(comm, (text for story in train[:4000] for text in (story.source, story.says)), 1000)
    sources, answers = words.encode([story.source for story in train]), words.encode([story.says for story in train])
    pairs = list(zip(sources, answers, strict=True))
    multiple = multiple_of(layout)
    config = Seq2SeqConfig(
        width=options.width, depth=options.depth, encoder_depth=options.encoder_depth, heads=options.heads,
        positions="rotary", norm="rms", mlp="swiglu", vocabulary=words.size,
        context=(max(map(len, sources)) // multiple + 2) * multiple,
    )  # fmt: skip
    recipe = Recipe(options.steps, options.lr, seed=options.seed)
    learner = Learner(comm, layout, Seq2Seq(config, options.seed), recipe)
    say(f"{len(train):,} stories to learn from, {len(unseen):,} held out; {learner.parameters:,} parameters")
    learner.train(Pairs(pairs, options.batch, multiple, options.seed).batch, say)
    written = words.decode(learner.write(words.encode([story.source for story in unseen]), LONGEST_ANSWER))
    found = [answer_in(sentence, story) for sentence, story in zip(written, unseen, strict=True)]
    for asks in ("fact", "person", "both"):
        chosen = [index for index, story in enumerate(unseen) if story.asks == asks]
        right = share_right([found[index] for index in chosen], [unseen[index] for index in chosen])
        say(f"  asked for {asks:6} {right:5.1f} of a hundred right: {unseen[chosen[0]].question} {written[chosen[0]]}.")
    return right_beside(train, unseen, found)


if __name__ == "__main__":
    raise SystemExit(run(answering, options_of(__doc__, **DEFAULTS)))
