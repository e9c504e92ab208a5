"""examples/summaries.py: what it reads out of sources, how it splits and measures, and a run of a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import summaries

from tests.examples.runs import expect_beaten, few_steps

SOURCE = '''
class Rows:
    def takeRow_index(self, row: int) -> int:
        """Return the index of a row. It must exist.

        More about it.
        """
        return self.rows.index(row)

async def fetch(url):
    "Fetch what lies at an address"
    return await get(url)

def bare(x):
    return x

def terse(x):
    """Two words."""
'''


def test_functions_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "rows.py").write_text(SOURCE)
    assert sorted(summaries.functions(tmp_path / "rows.py")) == [
        ("fetch(url): return await get(url)", "fetch what lies at an address"),
        ("take row index(self, row: int) -> int: return self.rows.index(row)", "return the index of a row"),
    ]
    (tmp_path / "broken.py").write_text("def (:")
    assert summaries.functions(tmp_path / "broken.py") == []


def test_the_sentence_is_not_in_the_code() -> None:
    for code, sentence in summaries.functions(Path(json.__file__).with_name("decoder.py")):
        assert sentence not in code and '"""' not in code


def test_no_sentence_and_no_code_is_on_both_sides() -> None:
    pairs = [(f"f{i}(x): return {i % 700}", f"return the number {i % 500}") for i in range(2000)]
    train, unseen = summaries.split([*pairs, *pairs])
    assert {sentence for _, sentence in train}.isdisjoint({sentence for _, sentence in unseen})
    assert len(train) + len(unseen) == 500 * summaries.ALIKE
    same = [("g(x): return 1", f"say it in way {i}") for i in range(200)]
    train, unseen = summaries.split(same)
    assert len(train) > 150 and unseen == [], "its code is on the other side"


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
    train = [(f"get row {i}(self): return a b c d", f"get row {i}") for i in range(50)]
    assert summaries.best_lead(train) == 3 and summaries.lead(train[7][0], 3) == "get row 7"


SMALL = {"batch": 16, "width": 16, "depth": 1, "heads": 2, "vocabulary": 400, "code": 24, "longest": 16, "questions": 9}


def test_a_few_steps_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    standard = [file for file in summaries.sources() if file.parent.name in ("json", "email", "asyncio")]
    assert len(standard) > 20
    monkeypatch.setattr(summaries, "sources", lambda: standard)
    (verdict, said), (other, _) = few_steps(summaries.summaries, summaries.DEFAULTS | SMALL, steps=3)
    expect_beaten(verdict)
    assert verdict == other and "held out" in said[0]
