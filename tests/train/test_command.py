"""`paracomm train` as it is typed."""

from __future__ import annotations

import os

import pytest
import typer
from ranks import Rank, run_ranks
from typer.testing import CliRunner

from paracomm.cli.train import train

SMALL = {"width": 16, "depth": 1, "heads": 2, "context": 16, "steps": 4, "batch": 4, "warmup": 1, "sample-bytes": 8}


@pytest.fixture
def options(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(bytes(range(32, 127)) * 30)
    shape = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    return [*shape, "--data", str(text), "--runs", str(tmp_path / "runs")]


def on_rank(rank: Rank, options: list[str]) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(train)
    result = CliRunner().invoke(app, options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_ddp_over_gloo_trains_and_reports_on_rank_0_alone(options, tmp_path):
    (code, said), (other_code, other_said) = run_ranks(2, on_rank, [*options, "--reducer", "ddp"])
    assert code == other_code == 0
    assert "held-out" in said and "wait n/a" in said and "a sample:" in said
    assert other_said == ""
    assert (tmp_path / "runs/gpt/checkpoints/step-00000004/model.safetensors").exists()


@pytest.mark.parametrize("reducer", ["ddp", "paracomm"])
def test_check_prints_a_table(options, reducer):
    (code, said), _ = run_ranks(2, on_rank, [*options, "--check", "--check-steps", "2", "--reducer", reducer])
    assert code == 0, said
    assert said.count(" ok ") == 4 and "losses and gradients agree" in said


def without_launcher(rank: Rank, options: list[str]) -> tuple[int, str]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return on_rank(rank, options)


def test_one_process_needs_no_launcher(options):
    ((code, said),) = run_ranks(1, without_launcher, options)
    assert code == 0 and "1 x paracomm" in said


def test_errors_are_one_line(options):
    ((code, said),) = run_ranks(1, on_rank, [*options, "--batch", "0"])
    assert code == 1
    assert said == "error: train: batch is 0, expected at least 1\n"
