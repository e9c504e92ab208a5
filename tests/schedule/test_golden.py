"""Schedules are what they were: `python -m paracomm.schedule.golden` rewrites the files after a wanted change."""

from pathlib import Path

import pytest

from paracomm.schedule.golden import dumps

FOLDER = Path(__file__).resolve().parent.parent / "golden"
DUMPS = dumps()


@pytest.mark.parametrize("name", DUMPS)
def test_dump_is_the_golden_one(name: str) -> None:
    assert (FOLDER / name).exists(), f"{name} is missing: run `python -m paracomm.schedule.golden`"
    assert (FOLDER / name).read_text() == DUMPS[name]


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in FOLDER.glob("*.*.txt")} == set(DUMPS)
