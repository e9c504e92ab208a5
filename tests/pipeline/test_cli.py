"""`paracomm pipeline`, as a user calls it."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from paracomm.cli.main import build_app
from paracomm.pipeline import SCHEDULES, build


def call(*arguments, code=0):
    words = ["pipeline", *map(str, arguments)]
    result = CliRunner().invoke(build_app(words), words, env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return re.sub(r"\s*│\n│\s*", " ", result.output)


def lines(*arguments, code=0):
    return [json.loads(line) for line in call(*arguments, "--json", code=code).splitlines()]


def test_a_table_a_verdict_and_what_it_costs():
    text = call("1f1b", "--ranks", 4, "--microbatches", 8)
    assert "rank 3              3F0 3B0 3F1" in text and "!" not in text
    assert "right: 64 actions" in text
    assert "step 33 ms, bubble 27.3%" in text  # (8 + 3) (1 + 2) ms; 3 / 11
    assert "most activations kept: 4 3 2 1 microbatches" in text


def test_costs_are_a_ranks_whatever_its_stages():
    """Without a pipeline nothing is idle: the step is microbatches x (forward + backward), however it is cut."""
    for name in SCHEDULES:
        (line,) = lines(name, "--ranks", 1, "--microbatches", 6, "--forward-ms", 3, "--backward-ms", 5)
        assert line["step_s"] == pytest.approx(6 * 8e-3) and line["bubble"] == pytest.approx(0)


def test_options_reach_the_simulation():
    (line,) = lines("interleaved", "--ranks", 2, "--microbatches", 4, "--stages-per-rank", 3)
    assert line["stages"] == 6 and line["bubble"] == pytest.approx(1 / (3 * 4 + 1))
    (line,) = lines("gpipe", "--ranks", 2, "--microbatches", 1, "--link-ms", 10)
    assert line["step_s"] == pytest.approx(2 * 3e-3 + 2 * 10e-3)
    fast, slow = (lines("zb-h1", "--weight-ms", weight)[0]["bubble"] for weight in (1, 0.1))
    assert fast < slow
    assert lines("zbv", "--ranks", 4)[0]["peaks"] == [8, 8, 8, 8]


def test_memory_that_does_not_suffice_is_marked():
    text = call("gpipe", "--ranks", 2, "--microbatches", 4, "--memory", 2, code=1)
    assert "0F2!" in text and "wrong: 2 faults" in text and "expected at most 2" in text
    call("1f1b", "--ranks", 2, "--microbatches", 4, "--memory", 2)
    # In microbatches of a rank's layers, of which each of zbv's stages has half.
    call("zbv", "--ranks", 4, "--memory", 4)
    call("zbv", "--ranks", 4, "--memory", 3, code=1)


def test_a_file_is_read_and_judged(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text(str(build("zbv", ranks=2, microbatches=4)) + "\n")
    (line,) = lines("--file", file)
    assert (line["schedule"], line["ranks"], line["stages"], line["faults"]) == ("mine", 2, 4, [])

    file.write_text("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1\n")
    text = call("--file", file, code=1)
    assert "0B0!" in text and "deadlock" in text and "wrong: 2 faults" in text and "step" not in text
    (line,) = lines("--file", file, code=1)
    assert len(line["faults"]) == 2 and "step_s" not in line

    file.write_text("0F0 what\n")
    assert "'what' is no pipeline action" in call("--file", file, code=2)
    assert "cannot read" in call("--file", tmp_path / "none.txt", code=2)


def test_all_schedules_in_one_table():
    text = call("--all", "--ranks", 4, "--microbatches", 8)
    for name in SCHEDULES:
        assert name in text
    found = {line["schedule"]: line for line in lines("--all", "--ranks", 4, "--microbatches", 8)}
    assert list(found) == list(SCHEDULES)
    assert found["zbv"]["bubble"] < found["zb-h1"]["bubble"] < found["1f1b"]["bubble"] == found["gpipe"]["bubble"]


def test_all_says_what_is_refused_and_what_does_not_fit():
    refused = {line["schedule"]: line.get("refused") for line in lines("--all", "--stages-per-rank", 2)}
    assert "expected 1" in refused["gpipe"] and refused["interleaved"] is None
    assert "refused: gpipe with 2 stages a rank" in call("--all", "--stages-per-rank", 2)
    text = call("--all", "--memory", 4, code=1)
    assert "keeps 5 activations, expected at most 4" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no schedule is called 'nothing'"),
        (["gpipe", "--ranks", 0], "--ranks"),
        (["gpipe", "--stages-per-rank", 2], "2 stages a rank"),
        (["--forward-ms", -1], "--forward-ms"),
        (["--weight-ms", 3], "--weight-ms 3"),
        (["--memory", -1], "--memory"),
        (["--all", "--picture", "a.png"], "neither --file nor --picture"),
        (["--picture", "a.pdf"], "expected .png or .svg"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    assert message in call(*arguments, code=2)


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which --picture needs, is not installed")
    call("zb-h1", "--picture", tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 1000
