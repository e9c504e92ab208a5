"""examples/summaries.py: its made-up days, how they are split and measured, and a run of a few steps."""

from __future__ import annotations

import random

import pytest
import summaries

from tests.examples.runs import expect_beaten, few_steps


def test_a_report_says_what_its_summary_does_and_more() -> None:
    dice = random.Random(1)
    lengths = set()
    for _ in range(300):
        report, summed_up, happened = summaries.day(dice)
        towns = [town for town in summaries.TOWNS if town in report]
        assert len(towns) == 1 and towns[0] in summed_up
        notable = [said for aspect in summaries.ASPECTS for said, wordings in aspect if said and said in happened]
        lengths.add(len(notable))
        for aspect in summaries.ASPECTS:  # one wording of one case of each
            assert sum(wording in report for _, wordings in aspect for wording in wordings) == 1
        mentioned = [said for said in notable if said in summed_up]
        assert mentioned == notable[: summaries.MENTIONED], "the gravest, and no more than three"
        assert not any(said in report for said in notable), "a summary has words of its own"
    assert {0, 1, 2, 3, 4} <= lengths


def test_what_happened_on_a_held_out_day_happened_on_no_other() -> None:
    train, unseen = summaries.split(4000, seed=3)
    assert len(train) + len(unseen) == 4000 and 200 < len(unseen) < 1200

    def without_town(summed_up: str) -> str:
        return " ".join(word for word in summed_up.split() if word.strip(",.") not in summaries.TOWNS)

    few = {without_town(summed_up) for _, summed_up in unseen if summed_up.count(" and ") + summed_up.count(",") < 2}
    assert few and few.isdisjoint({without_town(summed_up) for _, summed_up in train})
    assert summaries.split(50, 3) == summaries.split(50, 3) != summaries.split(50, 4)


@pytest.mark.parametrize(
    ("found", "expected", "value"),
    [
        ("return the index", "Return the index.".lower(), 100.0),
        ("return the index", "nothing alike here", 0.0),
        ("", "return the index", 0.0),
        # Lin's example: "police kill the gunman" shares "police the gunman" with "police killed the gunman".
        ("police kill the gunman", "police killed the gunman", 75.0),
        ("the gunman kill police", "police killed the gunman", 50.0),
        ("return a", "return the index of a row", 100 * 2 * 2 / (2 + 6)),
    ],
)
def test_rouge_l(found: str, expected: str, value: float) -> None:
    assert summaries.rouge_l([found], [expected]) == pytest.approx(value)
    assert summaries.rouge_l([found, "x"], [expected, "x"]) == pytest.approx((value + 100) / 2)


def test_lead_takes_as_many_words_as_are_best() -> None:
    train = [(f"Row {i} was there: a b c d", f"row {i} was") for i in range(50)]
    assert summaries.best_lead(train) == 3 and summaries.lead(train[7][0], 3) == "row 7 was"


SMALL = {"batch": 16, "width": 16, "depth": 1, "encoder_depth": 1, "heads": 2, "vocabulary": 400, "reports": 400,
         "questions": 9}  # fmt: skip


def test_a_few_steps_do_not_pass() -> None:
    (verdict, said), (other, _) = few_steps(summaries.summaries, summaries.DEFAULTS | SMALL, steps=3)
    expect_beaten(verdict)
    assert verdict == other and "held out" in said[0]
