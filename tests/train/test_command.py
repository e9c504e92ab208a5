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
    assert (tmp_path / "runs/gpt/checkpoints/step-00000004/.metadata").exists()


@pytest.mark.parametrize("reducer", ["ddp", "paracomm"])
def test_check_prints_a_table(options, reducer):
    (code, said), _ = run_ranks(2, on_rank, [*options, "--check", "--check-steps", "2", "--reducer", reducer])
    assert code == 0, said
    assert said.count(" ok ") == 4 and "losses and weights agree" in said


def without_launcher(rank: Rank, options: list[str]) -> tuple[int, str]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return on_rank(rank, options)


def test_one_process_needs_no_launcher(options):
    ((code, said),) = run_ranks(1, without_launcher, options)
    assert code == 0 and "1 x paracomm" in said


def test_a_mesh_trains_by_flags(options, tmp_path):
    flags = ["--tp", "2", "--sequence", "--zero", "2", "--recompute", "full", "--precision", "bfloat16"]
    (code, said), (other_code, other_said) = run_ranks(2, on_rank, [*options, *flags])
    assert code == other_code == 0
    assert "2 x paracomm (tp 2, zero 2, sequence, recompute full, precision bfloat16)" in said
    assert "a sample:" in said and other_said == ""
    assert (tmp_path / "runs/gpt/checkpoints/step-00000004/.metadata").exists()


def test_a_run_goes_on_from_a_folder_in_another_layout(options, tmp_path):
    kept = ["--checkpoint", str(tmp_path / "kept")]
    first = [*options, *kept, "--tp", "2", "--steps", "2"]
    assert [code for code, _ in run_ranks(2, on_rank, first)] == [0, 0]
    assert not (tmp_path / "runs/gpt/checkpoints").exists()
    ((code, said),) = run_ranks(1, on_rank, [*options, *kept, "--name", "other", "--resume"])
    assert code == 0 and "resumed at step 2 of 4" in said
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["step-00000002", "step-00000004"]
    ((code, said),) = run_ranks(1, on_rank, [*options, *kept, "--steps", "1"])  # a fresh run keeps what was there
    assert code == 0 and [path.name for path in (tmp_path / "kept").iterdir()] == ["step-00000001"]
    assert len(list((tmp_path / "kept.1").iterdir())) == 2


REFUSED = {
    "--tp 4": "tp 4 does not divide the 2 heads",
    "--dp 3": "4 sequences does not divide by 3 ranks of dp",
    "--cp 2 --context 18": "sequences of 18 positions with cp 2",
    "--tp 4 --cp 4 --sequence --context 24 --heads 4": "sequence with tp 4: it does not divide the 6",
    "--sequence": "sequence with tp 1",
    "--cp-method ulysses": "cp_method ulysses with cp 1",
    "--cp-method flash": "cp_method is 'flash', expected one of ring, ulysses",
    "--cp 2 --tp 2 --cp-method ulysses": "cp 2 does not divide the 1 heads of a rank of tp",
    "--zero 2 --hook int8": "hook int8 with zero 2",
    "--zero 3 --hook allreduce": "hook allreduce with zero 3",
    "--hook zip": "hook is 'zip', expected one of allreduce",
    "--hook local_sgd": "hook local_sgd averages models",
    "--recompute all": "recompute is 'all', expected one of none, selective, full",
    "--kernels cuda": "kernels is 'cuda', expected one of auto, triton, eager",
    "--kernels triton": "tensors are on cpu, expected a GPU",
    "--precision int8": "precision is 'int8', expected one of bfloat16",
    "--reducer ddp --zero 1": "reducer ddp with zero 1",
    "--reducer ddp --hook int8": "reducer ddp with hook int8",
    "--reducer ddp --backend pigeon": "backend is 'pigeon', expected one of",
    "--check --hook topk": "hook topk leaves out most",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_work_is_refused_before_anything_starts(options, monkeypatch, flags):
    def started(*_, **__):
        raise AssertionError("a process was about to connect, or the text to be read")

    monkeypatch.setattr("paracomm.init", started)
    monkeypatch.setattr("torch.distributed.init_process_group", started)
    monkeypatch.setattr("paracomm.train.loop.load_corpus", started)
    app = typer.Typer()
    app.command()(train)
    result = CliRunner().invoke(app, [*options, *flags.split()])
    assert result.exit_code == 2 and result.output.count("\n") == 1
    assert result.output.startswith("error: ") and REFUSED[flags] in result.output


@pytest.mark.parametrize("reducer", ["ddp", "paracomm"])
def test_another_number_of_ranks_is_refused(options, tmp_path, reducer):
    flags = ["--dp", "4", "--reducer", reducer, "--data", str(tmp_path / "nowhere")]
    for code, said in run_ranks(2, on_rank, [*options, *flags]):
        assert code == 2 and said == "error: layout: dp 4 x cp 1 x tp 1 = 4 ranks, but the job has 2\n"


def test_errors_are_one_line(options):
    ((code, said),) = run_ranks(1, on_rank, [*options, "--name", ".."])
    assert code == 2
    assert said == "error: train: name is '..', expected a plain folder name\n"


NUMBERS = ("--warmup -5", "--weight-decay -1", "--weight-decay nan", "--sample-bytes -5", "--seed -1", "--clip inf",
           "--lr 0", "--trace-steps 0", "--bucket-mib nan", "--dropout 2", "--check-steps 0")  # fmt: skip


@pytest.mark.parametrize("flags", NUMBERS)
def test_numbers_out_of_their_range_end_it_with_2(options, flags):
    app = typer.Typer()
    app.command()(train)
    result = CliRunner().invoke(app, [*options, *flags.split()])
    assert result.exit_code == 2 and f"Invalid value for '{flags.split()[0]}'" in result.output


def test_files_and_folders_that_cannot_be_end_it_alike_on_every_rank(options, tmp_path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 100)
    for flags, reason in {
        f"--runs {tmp_path}/file/x": f"rank 0: train: cannot write to '{tmp_path}/file/x/gpt'",
        f"--checkpoint {tmp_path}/file/x": f"checkpoint: nothing can be saved in '{tmp_path}/file/x': rank 0: NotADir",
        f"--data {tmp_path}/binary": f"rank 0: train: there is no text in '{tmp_path}/binary': '{tmp_path}/binary': it "
        "is binary, byte 0 is 0",
    }.items():
        (code, said), (other_code, other_said) = run_ranks(2, on_rank, [*options, *flags.split()])
        assert code == other_code == 2, said
        assert said == other_said and said.startswith("error: ") and reason in said and said.count("\n") == 1
