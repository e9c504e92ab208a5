"""`paracomm verify` and `paracomm simulate`, as a user calls them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from paracomm.cli.main import build_app


def call(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(arguments), list(arguments))


def test_verify() -> None:
    result = call("verify", "--worlds", "1-5,8", "--jobs", "1")
    assert result.exit_code == 0, result.output
    assert "0 failed" in result.output and "dissemination" in result.output


def test_verify_prints_tables_and_json() -> None:
    result = call("verify", "--table", "-c", "all_reduce", "-a", "ring", "--worlds", "3")
    assert "2>+1" in result.output
    result = call("verify", "--json", "--jobs", "1", "-a", "ring", "--worlds", "4")
    assert [json.loads(line)["failed"] for line in result.output.splitlines()] == [0, 0, 0]


def test_verify_judges_mutants() -> None:
    result = call("verify", "--mutants", "40", "--seed", "3", "--json")
    assert result.exit_code == 0 and json.loads(result.output)["missed"] == 0


def test_verify_fails_on_a_wrong_algorithm_of_a_users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paracomm.schedule.registry import forget

    (tmp_path / "half_a_broadcast.py").write_text(
        "from paracomm.schedule import algorithm\n"
        "@algorithm('broadcast', 'half')\n"
        "def half(s):\n"
        "    for peer in range(1, s.world_size // 2):\n"
        "        s.copy(s.at(0), s.at(peer))\n"
    )
    monkeypatch.chdir(tmp_path)
    try:
        result = call("verify", "--import", "half_a_broadcast", "-a", "half", "--worlds", "4", "--jobs", "1")
    finally:
        forget("broadcast", "half")
    assert result.exit_code == 1 and "FAILED" in result.output


@pytest.mark.parametrize("worlds", ["0", "x", "3-1"])
def test_verify_refuses_odd_world_sizes(worlds: str) -> None:
    assert call("verify", "--worlds", worlds).exit_code == 2


def test_simulate() -> None:
    result = call("simulate", "all_reduce", "-a", "ring", "--ranks", "4", "--sizes", "1M", "--json")
    line = json.loads(result.output)
    assert line["time_us"] == pytest.approx(6 * (5 + (1 << 18) / 1e4))
    assert call("simulate", "all_reduce", "--ranks", "8", "--ranks-per-host", "2").exit_code == 0
    assert call("simulate", "all_sum").exit_code == 2
    assert call("simulate", "--sizes", "1Q").exit_code == 2


def test_commands_are_listed() -> None:
    result = call("--help")
    assert result.exit_code == 0 and "verify" in result.output and "simulate" in result.output
