"""examples/answering.py: a world in which every question has one answer, and a split that leaves each fact a way in."""

from __future__ import annotations

import answering
from answering import questions, split

from tests.examples.runs import expect_beaten, few_steps


def test_wordings_of_one_fact_have_one_answer_and_worlds_differ() -> None:
    found = questions(60, seed=0)
    assert len({question.text for question in found}) == len(found) == 60 * sum(map(len, answering.ASKED.values()))
    facts: dict[tuple[str, str], set[str]] = {}
    for question in found:
        (wording,) = (each for each in answering.ASKED[question.kind] if name_in(question.text, each))
        facts.setdefault((name_in(question.text, wording), question.kind), set()).add(question.answer)
    assert len(facts) == 60 * len(answering.VALUES) and all(len(answers) == 1 for answers in facts.values())
    assert found == questions(60, seed=0) != questions(60, seed=1)


def name_in(text: str, wording: str) -> str:
    """ "Aldor" of "{who} drinks what?" and "Aldor drinks what?"; "" where the wording is another."""
    before, after = wording.split("{who}")
    name = text.removeprefix(before).removesuffix(after)
    return name if before + name + after == text and name.isalpha() else ""


def test_no_question_is_on_both_sides_and_its_fact_is_asked_for_in_other_words() -> None:
    found = questions(300, seed=0)
    train, unseen = split(found)
    assert len(train) + len(unseen) == len(found) and 0.14 < len(unseen) / len(found) < 0.19
    assert {question.text for question in train}.isdisjoint({question.text for question in unseen})
    known = set().union(*map(asked_by, train))
    reachable = [question for question in unseen if known & asked_by(question)]
    assert len(reachable) > 0.999 * len(unseen)


def asked_by(question: answering.Question) -> set[tuple[str, str, str]]:
    """(name, kind, answer) by each wording that the text can be read as."""
    names = (name_in(question.text, wording) for wording in answering.ASKED[question.kind])
    return {(name, question.kind, question.answer) for name in names if name}


def test_baselines_know_little() -> None:
    train, unseen = split(questions(300, seed=0))
    verdict = answering.right_beside(train, unseen, [question.answer for question in unseen])
    assert verdict.value == 100 and verdict.passed
    assert verdict.bars[0].value < 16
    guessed = answering.most_frequent(train, unseen)
    assert not answering.right_beside(train, unseen, guessed).passed


SMALL = {"batch": 16, "width": 16, "encoder_depth": 1, "heads": 2, "people": 20}


def test_a_few_steps_do_not_pass() -> None:
    (verdict, said), (other, _) = few_steps(answering.answering, answering.DEFAULTS | SMALL, steps=3)
    expect_beaten(verdict)
    assert verdict == other and any("town" in line for line in said)
