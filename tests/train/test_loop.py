"""The loop: it learns, resumes exactly, and N ranks do what one process does."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import Rank, rank_outcomes, run_ranks

from paracomm.errors import Error, InvalidArgument
from paracomm.models.gpt import GPT, GPTConfig
from paracomm.train import loop
from paracomm.train.checkpoint import list_checkpoints
from paracomm.train.config import TrainConfig
from paracomm.train.loop import learning_rate
from paracomm.train.metrics import read_metrics
from paracomm.train.replicas import MeshReplicas, TorchReplicas

TINY = GPTConfig(width=16, depth=2, heads=2, context=12)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"".join(b"%d bottles of beer on the wall; " % i for i in range(300)))
    return path


@pytest.fixture
def config(tmp_path, text):
    return TrainConfig(
        model=TINY,
        steps=12,
        batch=12,
        warmup=3,
        data=text,
        runs=tmp_path / "runs",
        log_every=1,
        eval_every=6,
        checkpoint_every=4,
        sample_bytes=8,
    )


def run(config: TrainConfig, replicas=None):
    return loop._train(config, replicas or TorchReplicas(None))


def losses(config: TrainConfig) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(config.folder / "metrics.jsonl") if "loss" in r}


def test_it_learns(config):
    config = replace(config, steps=150, lr=1e-2, eval_every=150, checkpoint_every=150)
    result = run(config)
    assert result.held_out_bits < 0.8 * result.unigram_bits
    assert result.sample.startswith(b"def ") and len(result.sample) == 4 + 8


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_resumed_run_has_identical_losses(config, dropout, accumulate, monkeypatch):
    config = replace(config, model=replace(TINY, dropout=dropout), accumulate=accumulate)
    whole = replace(config, name="whole")
    run(whole)

    class Killed(Exception):
        pass

    original = loop.Trainer.update

    def dies_at_step_10(self, step):
        if step == 10:
            raise Killed
        return original(self, step)

    monkeypatch.setattr(loop.Trainer, "update", dies_at_step_10)
    with pytest.raises(Killed):
        run(config)
    monkeypatch.undo()
    assert max(losses(config)) == 10
    torch.manual_seed(12345)
    run(replace(config, resume=True))
    assert losses(config) == losses(whole)
    assert sorted(losses(config)) == list(range(1, 13))


def test_resuming_a_finished_run_only_evaluates(config):
    first = run(config)
    again = run(replace(config, resume=True))
    assert again.held_out_bits == first.held_out_bits


def test_resuming_what_is_not_there_or_of_another_run_is_named(config, text):
    with pytest.raises(InvalidArgument, match="nothing to resume"):
        run(replace(config, resume=True))
    run(config)
    with pytest.raises(InvalidArgument, match="seed was 0 and is 1"):
        run(replace(config, resume=True, seed=1))
    text.write_bytes(text.read_bytes() + b"more")
    with pytest.raises(InvalidArgument, match="other text"):
        run(replace(config, resume=True))


def test_a_fresh_run_keeps_the_one_before(config):
    run(config)
    before = losses(config)
    run(replace(config, seed=1))
    assert losses(replace(config, name="gpt.1")) == before


def test_a_loss_that_is_not_finite_ends_the_run(config):
    with pytest.raises(Error, match=r"the loss is (-?\d\S+|nan|inf) and the norm of its gradients (nan|inf) at step"):
        run(replace(config, lr=1e30))


def test_records_and_events_are_written(config):
    run(config)
    records = read_metrics(config.folder / "metrics.jsonl")
    assert {"loss", "bits_per_byte", "lr", "gradient_norm", "tokens_per_s", "steps_per_s", "wait_share"} < set(
        records[0]
    )
    assert [r["step"] for r in records if "held_out_bits_per_byte" in r] == [6, 12]
    assert list(config.folder.glob("events.out.tfevents*"))
    assert json.loads((config.folder / "config.json").read_text())["model"]["width"] == 16


def test_a_gradient_that_is_not_finite_ends_the_run_by_its_name(config):
    ((error,),) = run_ranks(1, not_finite, config)
    assert "the gradient of 'norm.weight' is not finite" in error


def not_finite(rank: Rank, config: TrainConfig) -> list[str]:
    def poison(self, step):
        found = backward(self, step)
        self.model.norm.weight.grad[3] = float("nan")
        return found

    backward, loop.Trainer.backward = loop.Trainer.backward, poison
    with pytest.raises(Error) as caught:
        run(config, MeshReplicas(comm=rank.connect()))
    return [str(caught.value)]


def other_text(rank: Rank, config: TrainConfig, folder: Path) -> None:
    path = folder / f"text-{rank.rank}"
    path.write_bytes(b"abc" * (100 + rank.rank))
    run(replace(config, data=path), MeshReplicas(comm=rank.connect()))


def one_cannot(rank: Rank, config: TrainConfig, folder: Path, what: str) -> None:
    """Of text, of a checkpoint, of rank 0's folder for metrics."""
    own = folder / str(rank.rank)
    config = replace(config, runs=own)
    if what == "text" and rank.rank == 1:
        config = replace(config, data=own / "nowhere")
    if what == "checkpoint":
        config = replace(config, resume=True)
        if rank.rank == 1:
            (config.checkpoints / "step-00000001").mkdir(parents=True)
    if what == "trace":
        (folder / "1").write_text("a file")
        config = replace(config, runs=folder / "runs", trace=own / "trace")
    if what == "folder" and rank.rank == 0:
        own.write_text("a file")
    run(config, MeshReplicas(comm=rank.connect()))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("text", "InvalidArgument: rank 1: train: no file or folder"),
        ("checkpoint", "InvalidArgument: rank 0: train: nothing to resume"),
        ("folder", "InvalidArgument: rank 0: train: cannot write to"),
        ("trace", "InvalidArgument: rank 1: train: cannot write a trace to"),
    ],
)
def test_what_one_rank_cannot_read_ends_the_run_alike_on_all(config, tmp_path, what, message):
    first, other = (
        f"{type(outcome.error).__name__}: {outcome.error}"
        for outcome in rank_outcomes(2, one_cannot, config, tmp_path, what)
    )
    assert first == other and first.startswith(message)


def test_different_text_on_ranks_is_named(config, tmp_path):
    for outcome in rank_outcomes(2, other_text, config, tmp_path):
        assert isinstance(outcome.error, Error) and "text" in str(outcome.error), outcome.failure


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig(steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[10] == 1.0 and all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0.1 < rates[-1] < 0.102


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"dtype": "int8"}, "dtype"),
        ({"reducer": "x"}, "reducer"),
        ({"name": "../x"}, "name"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"name": "a\0b"}, "name"),
        ({"lr": float("inf")}, "lr"),
        ({"lr": "1"}, "lr"),
        ({"clip": float("nan")}, "clip"),
        ({"warmup": -5}, "warmup is -5, expected a whole number, at least 0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0, expected at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan, expected at least 0"),
        ({"weight_decay": float("inf")}, "weight_decay is inf, expected a finite number"),
        ({"sample_bytes": -5}, "sample_bytes is -5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616, expected at most"),
        ({"steps": 2.5}, "steps is 2.5, expected a whole number"),
        ({"batch": True}, "batch is True"),
        ({"data": 3}, "data is 3, expected a path"),
        ({"runs": None}, "runs is None, expected a path"),
        ({"dtype": None}, "dtype is None, expected a text"),
        ({"backend": "carrier-pigeon", "reducer": "ddp"}, "backend is 'carrier-pigeon', expected one of .*gloo"),
        ({"model": replace(TINY, vocabulary=100)}, "a vocabulary of 100, expected at least the 256 bytes"),
    ],
)
def test_wrong_settings_are_named(change, named):
    with pytest.raises(InvalidArgument, match=named):
        TrainConfig(**change)


def test_settings_may_be_texts_and_limits():
    config = TrainConfig(runs="r", data="d", clip=float("inf"), warmup=0, weight_decay=0, sample_bytes=0)
    assert config.folder == Path("r/gpt") and config.data == Path("d")
    assert TrainConfig(prompt="\udcff").prompt_bytes == b"\xff"
    assert TrainConfig(reducer="ddp", backend="cpu:gloo,cuda:nccl").backend == "cpu:gloo,cuda:nccl"


def test_a_checkpoint_of_another_program_is_named(config):
    run(config)
    state = config.checkpoints / "step-00000012/state.json"
    state.write_text('{"step": 12}')
    (state.parent / "checksums.json").unlink()
    with pytest.raises(InvalidArgument, match="was not saved by paracomm train"):
        run(replace(config, resume=True))


def test_weights_that_are_not_finite_are_not_saved(config):
    with pytest.raises(Error, match=r"the norm of its gradients (nan|inf) at step \d+; try a smaller --lr"):
        run(replace(config, lr=1e30, log_every=100, checkpoint_every=1, steps=100))
    assert all(int(path.name[5:]) < 3 for path in list_checkpoints(config.checkpoints))


def test_a_batch_that_does_not_divide_is_named():
    with pytest.raises(InvalidArgument, match="12 sequences does not divide by 5 ranks of dp x 1"):
        TrainConfig().share(5)


def test_gpt_depends_on_its_seed_and_sees_no_future():
    model = GPT(TINY, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), GPT(TINY, seed=1).parameters(), strict=True))
    assert not torch.equal(model.token.weight, GPT(TINY, seed=2).token.weight)
    tokens = torch.randint(0, 256, (2, 12))
    changed = tokens.clone()
    changed[:, 7] += 1
    a, b = model(tokens), model(changed % 256)
    assert torch.equal(a[:, :7], b[:, :7]) and not torch.allclose(a[:, 7:], b[:, 7:])
    assert model.generate(b"ab", 20, temperature=0) == model.generate(b"ab", 20, temperature=0)
    with pytest.raises(InvalidArgument, match="13 positions"):
        model(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(InvalidArgument, match="heads"):
        GPTConfig(width=10, heads=3)
