"""examples/translation.py: what it reads, how it splits and measures, and a run of a few steps."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest
import translation
from learning import Vocabulary

from paracomm.errors import InvalidArgument
from tests.examples.runs import expect_beaten, few_steps

WORDS = {"event": "Veranstaltung", "order": "Bestellung", "user": "Benutzer", "ticket": "Karte", "page": "Seite"}
VERBS = {"Delete": "löschen", "Change": "ändern", "Print": "drucken", "Open": "öffnen", "Copy": "kopieren"}
COLOURS = {"red": "rot", "blue": "blau", "green": "grün", "old": "alt", "new": "neu", "last": "letzt"}


def compiled(messages: dict[str, str]) -> bytes:
    """A .mo file (the GNU gettext manual, "MO Files"), without a hash table."""
    entries = [(key.encode(), value.encode()) for key, value in sorted(messages.items())]
    begin = 28 + 16 * len(entries)
    tables: list[list[int]] = [[], []]
    text = b""
    for side in (0, 1):
        for entry in entries:
            tables[side] += [len(entry[side]), begin + len(text)]
            text += entry[side] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, 0)
    return head + struct.pack(f"<{4 * len(entries)}I", *tables[0], *tables[1]) + text


@pytest.fixture
def catalogues(tmp_path: Path) -> Path:
    messages = {
        f"{verb} the {colour} {word}": f"{WORDS[word]} ({COLOURS[colour]}) {VERBS[verb]}"
        for verb in VERBS for colour in COLOURS for word in WORDS
    }  # fmt: skip
    special = {
        "": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n != 1;\n",
        "a page\0%d pages": "eine Seite\0%d Seiten",
        "button\x04Go": "Los",
        "_File": "_Datei",
        "no translation": "",
        "two\nlines": "zwei\nZeilen",
        "%(a)s_%(b)s": "%(b)s_%(a)s",
    }
    with zipfile.ZipFile(tmp_path / "shop-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("shop/locale/de/LC_MESSAGES/django.mo", compiled(messages | special))
        wheel.writestr("shop/locale/fr/LC_MESSAGES/django.mo", compiled({"page": "une page"}))
    return tmp_path


def test_messages_of_a_wheel(catalogues: Path) -> None:
    found = dict(translation.messages(catalogues))
    assert len(found) == 150 + 5
    assert found["a page"] == "eine Seite" and found["Go"] == "Los" and found["File"] == "Datei"
    assert found["two lines"] == "zwei Zeilen" and found["%(a)s_%(b)s"] == "%(b)s_%(a)s"
    assert found["Delete the red event"] == "Veranstaltung (rot) löschen"


def test_a_folder_without_catalogues(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no catalogues"):
        translation.messages(tmp_path)


def test_no_message_is_on_both_sides() -> None:
    pairs = [(f"{shape} item {chr(97 + i)}{chr(97 + j)}", "x") for i in range(26) for j in range(26) for shape in "ab"]
    same = [(text.upper() + " %(count)s!", "y") for text, _ in pairs]
    train, unseen = translation.split([*pairs, *same, ("%s: 12", "z")])
    assert len(train) + len(unseen) == 2 * len(pairs), "a message without a word is left out"
    assert 0.02 < len(unseen) / len(pairs) / 2 < 0.09
    keys = [{translation.key_of(english) for english, _ in side} for side in (train, unseen)]
    assert keys[0].isdisjoint(keys[1]) and len(keys[0] | keys[1]) == len(pairs)


@pytest.mark.parametrize(
    ("found", "expected", "order", "value"),
    [
        (["Karte drucken"], ["Karte drucken"], 6, 100.0),
        (["abc"], ["xyz"], 6, 0.0),
        ([""], ["xyz"], 6, 0.0),
        (["a b c"], ["abc"], 6, 100.0),  # spaces do not count
        # Of "abd" and "abcd": letters 3/3 and 3/4, pairs ab of {ab, bd} and {ab, bc, cd}: 1/2 and 1/3.
        (["abd"], ["abcd"], 2, 100 * 5 * 0.75 * (13 / 24) / (4 * 0.75 + 13 / 24)),
        # Counts are those of the corpus: 1 letter of 3 is right, not half of the messages.
        (["a", "xx"], ["a", "yy"], 1, 100 / 3),
    ],
)
def test_chrf(found: list[str], expected: list[str], order: int, value: float) -> None:
    assert translation.chrf(found, expected, order) == pytest.approx(value)


def test_pieces_of_words_hold_any_text(catalogues: Path) -> None:
    from ranks import run_ranks

    train, unseen = translation.split(translation.messages(catalogues))
    for texts in run_ranks(2, read_back, train, [*(german for _, german in unseen), "Größe 7½ „Ω“ 漢字"]):
        assert texts[0] == texts[1]


def read_back(rank, train: translation.Messages, texts: list[str]) -> tuple[list[str], list[str]]:
    with rank.connect() as comm:
        words = Vocabulary(comm, (text for pair in train for text in pair), 400)
        return texts, words.decode(words.encode(texts))


SMALL = {"batch": 16, "width": 16, "depth": 1, "heads": 2, "vocabulary": 320, "longest": 40}


def test_a_few_steps_do_not_pass(catalogues: Path) -> None:
    found = few_steps(translation.translation, translation.DEFAULTS | SMALL, steps=3, catalogues=str(catalogues))
    verdict, said = found[0]
    expect_beaten(verdict)
    assert found[1][0] == verdict, "ranks disagree"
    assert any("held out" in line for line in said)


def test_more_steps_do_better(catalogues: Path) -> None:
    options = {"catalogues": str(catalogues), "lr": 1e-2, "dropout": 0.0}
    learned = few_steps(translation.translation, translation.DEFAULTS | SMALL, steps=150, tp=2, **options)
    verdict = learned[0][0]
    assert verdict.value > verdict.bars[0].value + 15, "\n".join(verdict.lines())
