"""`paracomm train --trace` and `paracomm trace`, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from ranks import Rank, run_ranks
from typer.testing import CliRunner

from paracomm import timeline
from paracomm.cli.trace import trace
from paracomm.cli.train import train
from paracomm.timeline import record
from paracomm.train.loop import Trainer
from paracomm.train.metrics import read_metrics
from paracomm.train.trace import Tracer

SMALL = "--width 16 --depth 2 --heads 2 --context 16 --steps 6 --batch 4 --warmup 1 --sample-bytes 8 --log-every 1"
SMALL += " --eval-every 6 --trace-steps 2"


def command(function: Any, options: list[str]) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(function)
    result = CliRunner().invoke(app, options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def trained(rank: Rank, options: list[str]) -> tuple[int, str]:
    return command(train, options)


@pytest.fixture
def options(tmp_path) -> list[str]:
    text = tmp_path / "text"
    text.write_bytes(bytes(range(32, 127)) * 30)
    return [*SMALL.split(), "--data", str(text), "--runs", str(tmp_path / "runs")]


@pytest.mark.parametrize("layout", ["", "--tp 2 --sequence", "--cp 2 --zero 3 --accumulate 2"])
def test_a_traced_run_and_what_is_said_of_it(options, tmp_path, layout):
    folder = tmp_path / "a folder" / "trace"
    options += layout.split()
    ((code, said), (other_code, other_said)) = run_ranks(2, trained, [*options, "--trace", str(folder)])
    assert code == other_code == 0 and other_said == ""
    assert "steps 3 to 4 were traced: paracomm trace" in said.replace("\n", " ")
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.json", "rank-1.json"]

    code, said = command(trace, [str(folder), "--json"])
    assert code == 0
    for rank, each in enumerate(json.loads(said)["ranks"]):
        assert (each["rank"], each["steps"]) == (rank, 2) and each["step_ms"] > 0
        exposed = sum(share for axis in each["exposed"].values() for share in axis.values())
        assert each["compute"] + exposed + each["bubble"] + each["rest"] == pytest.approx(1, abs=1e-12)
        assert each["compute"] > 0 and each["rest"] > 0 and each["bubble"] == 0
        if "tp" in layout:
            assert each["exposed"]["tp"].keys() & {"all_gather", "reduce_scatter", "all_reduce"}
        if "cp" in layout:
            assert each["exposed"]["cp"].keys() & {"recv", "all_gather", "reduce_scatter"}

    code, said = command(trace, [str(folder)])
    assert code == 0
    rows = [line for line in said.splitlines() if "100.0" in line]
    assert len(rows) == 2

    for document in timeline.read(folder):
        names = [event["name"] for event in document["traceEvents"] if event.get("cat") in ("step", "compute")]
        assert [name for name in names if name.startswith("step")] == ["step 3", "step 4"]
        passes = 2 * (2 if "accumulate" in layout else 1)
        assert names.count("forward") == names.count("backward") == passes
        assert names.count("optimizer") == names.count("clip") == 2

    if "tp" in layout:
        return
    run_ranks(2, trained, options)  # the same without a trace; the old run moves aside
    losses = [
        [each["loss"] for each in read_metrics(tmp_path / "runs" / run / "metrics.jsonl") if "loss" in each]
        for run in ("gpt", "gpt.1")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6  # the same bits


def test_a_short_run_and_a_failed_one(options, tmp_path, monkeypatch):
    short = ["--steps", "2", "--trace-steps", "9", "--trace", str(tmp_path / "short")]
    ((code, said),) = run_ranks(1, trained, [*options, *short])
    assert code == 0 and "steps 0 to 1 were traced" in said.replace("\n", " ")

    update = Trainer.update

    def fail(self: Trainer, step: int) -> float:
        if step == 4:
            raise RuntimeError("out of luck")
        return update(self, step)

    nowhere = tmp_path / "text" / "trace"
    ((code, said),) = run_ranks(1, trained, [*options, "--trace", str(nowhere)])
    assert code == 2 and "train: cannot write a trace to" in said and "Not a directory" in said

    monkeypatch.setattr(Trainer, "update", fail)
    with pytest.raises(AssertionError, match="out of luck"):
        run_ranks(1, trained, [*options, "--trace", str(tmp_path / "failed")])
    (document,) = timeline.read(tmp_path / "failed")  # until it failed
    assert [event["name"] for event in document["traceEvents"] if event.get("cat") == "step"] == ["step 3", "step 4"]


@pytest.mark.parametrize(
    ("steps", "first", "end", "expected"),
    [(3, 0, 100, [3, 4, 5]), (3, 50, 100, [53, 54, 55]), (3, 0, 4, [1, 2, 3]), (3, 8, 10, [8, 9]), (1, 9, 10, [9])],
)
def test_which_steps(tmp_path, steps, first, end, expected):
    found = []
    with Tracer(tmp_path, steps, first, end, None, lambda line: None) as tracer:
        for step in range(first, end):
            with tracer.step(step):
                if record.current is not None:
                    found.append(step)
    assert found == expected and record.current is None
    with Tracer(None, steps, first, end, None, pytest.fail) as tracer, tracer.step(first):
        assert record.current is None


REFUSED = {
    "--trace-steps 0": "Invalid value for '--trace-steps'",
    "--trace t --reducer ddp": "DistributedDataParallel waits inside of backward",
    "--trace t --check": "--trace with --check",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_be_traced_is_refused(options, flags):
    code, said = command(train, [*options, *flags.split()])
    assert code == 2 and REFUSED[flags] in said


def profiled(folder: Path) -> None:
    """A record and torch's profile of the same work."""
    with torch.profiler.profile() as profiler:
        timeline.start()
        with timeline.span("step", "step 0"), timeline.span("compute", "product"):
            torch.ones(200, 200) @ torch.ones(200, 200)
        timeline.stop().write(folder / "rank-0.json")
    profiler.export_chrome_trace(str(folder / "torch.json"))


def test_torchs_profile_lies_inside_of_our_spans(tmp_path):
    """Its clock is converted from another one, to some microseconds."""
    profiled(tmp_path)
    both = tmp_path / "both.json"
    code, said = command(trace, [str(tmp_path), "--output", str(both), "--merge", str(tmp_path / "torch.json")])
    assert code == 0 and "ui.perfetto.dev" in said
    events = json.loads(both.read_text())["traceEvents"]
    (product,) = [event for event in events if event["name"] == "product"]
    (mm,) = [event for event in events if event["name"] == "aten::mm"]
    assert mm["pid"] == product["pid"] == 0 and mm["tid"] != product["tid"]
    slack = 2000
    assert product["ts"] - slack <= mm["ts"] <= mm["ts"] + mm["dur"] <= product["ts"] + product["dur"] + slack
    code, said = command(trace, [str(tmp_path), "--merge", str(both)])
    assert code == 1 and "--merge needs --output" in said
    code, said = command(trace, [str(tmp_path / "nowhere")])
    assert code == 1 and said.count("\n") == 1 and "No such file" in said
