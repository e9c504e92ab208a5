"""`paracomm bench ddp`: its table, its JSON and its errors, on a model that is small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paracomm.cli.ddp.case import Arrangement, Outcome
from paracomm.cli.ddp.run import picture
from paracomm.cli.main import build_app

SMALL = ["--width", "32", "--depth", "1", "--context", "16", "--batch", "2", "--steps", "2"]


def bench(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(build_app(["bench", "ddp"]), ["bench", "ddp", *options], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_table_and_json(tmp_path: Path) -> None:
    file = tmp_path / "found.jsonl"
    code, output = bench("--engines", "paracomm,ddp+paracomm", "--hooks", "plain,int8", "--json", str(file), *SMALL)
    assert code == 0, output
    rows = {(row["engine"], row["hook"]): row for row in map(json.loads, file.read_text().splitlines())}
    assert len(rows) == 4
    for engine in ("paracomm", "ddp+paracomm"):
        plain, int8 = rows[engine, "plain"], rows[engine, "int8"]
        assert plain["step_s"] > 0 and plain["final_loss"] == pytest.approx(int8["final_loss"], rel=0.01)
        assert 3.5 < plain["bytes_per_step"] / int8["bytes_per_step"] < 4
        assert plain["bytes_per_step"] >= 4 * plain["parameters"]  # 2 (n-1)/n of it, n = 2
        assert f"{plain['final_loss']:.4f}" in output


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--hooks", "int9"], "no hook 'int9'"),
        (["--engines", "mpi"], "no engine 'mpi'"),
        (["--batch", "3"], "does not divide by 2"),
        (["--hosts", "0"], "1 hosts are given for 2 ranks"),
    ],
)
def test_refusals(options: list[str], why: str) -> None:
    code, output = bench(*options)
    assert code == 2 and why in output


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, which --plot needs, is not installed")
    outcomes = [
        Outcome(Arrangement("gloo", "plain"), 0.2, 0.1, 1e6),
        Outcome(Arrangement("gloo", "int8"), trouble="no"),
    ]
    picture(outcomes, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
