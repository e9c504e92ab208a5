"""The C++ tests run the programs of today: `python tests/golden/programs/write.py` rewrites what should change."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "golden" / "programs"
FILES = runpy.run_path(str(FOLDER / "write.py"))["files"]()


@pytest.mark.parametrize("name", FILES)
def test_program_is_the_golden_one(name: str) -> None:
    assert (FOLDER / name).exists(), f"{name} is missing: run `python {FOLDER}/write.py`"
    assert (FOLDER / name).read_text() == FILES[name]


def test_no_program_is_left_over() -> None:
    assert {path.name for path in FOLDER.glob("*.txt")} == set(FILES)
