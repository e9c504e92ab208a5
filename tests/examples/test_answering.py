"""examples/answering.py: stories that have one right answer, which a reader of our own finds as well."""

from __future__ import annotations

import re
from itertools import islice

import answering
import pytest
from answering import Story, stories

from tests.examples.runs import expect_beaten, few_steps, whole_run


def read(story: Story) -> str:
    """The answer, by patterns that know the wordings but not the program that made the story."""
    facts: dict[str, dict[str, str]] = {}
    for sentence in re.findall(r"[^.]+\.", story.text):
        for kind, wordings in answering.SAID.items():
            for wording in wordings:
                pattern = (
                    re.escape(wording).replace(r"\{who\}", "(?P<who>[A-Z]\\w+)").replace(r"\{what\}", "(?P<what>\\w+)")
                )
                found = re.fullmatch(pattern, sentence.strip())
                if found and found["what"] in answering.VALUES[kind]:
                    facts.setdefault(found["who"], {})[kind] = found["what"]
    named = set(re.findall(r"\w+", story.question))
    (who,) = (name for name, known in facts.items() if name in named or named & set(known.values()))
    return who if story.question.startswith("Who ") else facts[who][story.kind]


def test_every_answer_follows_from_its_story() -> None:
    found = list(islice(stories(7, unseen=False), 600))
    assert [read(story) for story in found] == [story.answer for story in found]
    assert all(answering.answer_in(story.says, story) == story.answer for story in found)
    assert {story.asks for story in found} == {"fact", "person", "both"}
    assert all(story.answer in story.choices for story in found)
    assert {len(story.choices) for story in found} == {1, 2, 3}
    assert {len(story.choices) for story in islice(stories(7, unseen=True), 50)} == {3}


def test_no_story_is_on_both_sides() -> None:
    train = {story.text for story in islice(stories(0, unseen=False), 4000)}
    unseen = {story.text for story in islice(stories(1, unseen=True), 200)}
    assert len(train) == 4000 and len(unseen) == 200 and train.isdisjoint(unseen)
    assert train.isdisjoint({story.text for story in islice(stories(0, unseen=True), 200)})


def test_baselines_know_little_and_a_reader_passes() -> None:
    train, unseen = list(islice(stories(0, unseen=False), 3000)), list(islice(stories(1, unseen=True), 600))
    verdict = answering.right_beside(train, unseen, [read(story) for story in unseen])
    frequent, first = (bar.value for bar in verdict.bars)
    assert verdict.value == 100 and verdict.passed
    assert frequent < 15 and 25 < first < 42
    assert not answering.right_beside(train, unseen, [story.choices[1] for story in unseen]).passed


SMALL = {"batch": 16, "width": 16, "encoder_depth": 1, "heads": 2, "stories": 300, "questions": 20}


def test_a_few_steps_do_not_pass() -> None:
    (verdict, said), (other, _) = few_steps(answering.answering, answering.DEFAULTS | SMALL, steps=3)
    expect_beaten(verdict)
    assert verdict == other and any("asked for both" in line for line in said)


@pytest.mark.slow
def test_it_beats_its_baselines() -> None:
    whole_run("answering")
