"""The training command on a mesh: any layout trains, evaluates, writes, saves and goes on as one process does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import Rank, run_ranks

from paracomm.errors import InvalidArgument
from paracomm.models.gpt import GPT, GPTConfig
from paracomm.parallel import DataParallel, Layout, bucket
from paracomm.train import loop
from paracomm.train.check import TOLERANCE, compare, expect_comparable
from paracomm.train.checkpoint import list_checkpoints, load_checkpoint
from paracomm.train.config import TrainConfig
from paracomm.train.data import load_corpus
from paracomm.train.metrics import read_metrics
from paracomm.train.replicas import MeshReplicas, Replicas, TorchReplicas

TINY = GPTConfig(width=16, depth=2, heads=4, context=16, dropout=0.1)
DDP = "ddp"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"".join(b"%d bottles of beer on the wall; " % i for i in range(300)))
    return TrainConfig(
        model=TINY,
        steps=4,
        batch=8,
        warmup=2,
        dtype="float64",
        data=path,
        runs=tmp_path / "runs",
        log_every=1,
        eval_every=4,
        checkpoint_every=2,
        sample_bytes=24,
    )


def open_ranks(rank: Rank, layout: Layout | str) -> Replicas:
    return TorchReplicas("gloo") if isinstance(layout, str) else MeshReplicas(layout, rank.connect())


def settings(config: TrainConfig, layout: Layout | str) -> TrainConfig:
    return replace(config, reducer=DDP) if isinstance(layout, str) else replace(config, layout=layout)


# --- steps ---
def differences(rank: Rank, config: TrainConfig, layout: Layout | str, dtypes: list[str]) -> list[tuple[str, bool]]:
    replicas, config = open_ranks(rank, layout), settings(config, layout)
    corpus = load_corpus(config.data)
    rows = [row for dtype in dtypes for row in compare(config, dtype, 3, replicas, corpus)]
    replicas.close()
    return [(row.dtype, row.ok) for row in rows]


QUICK = [
    (2, DDP),
    (2, Layout()),
    (2, Layout(cp=2, zero=3, recompute="selective")),
    (2, Layout(tp=2, sequence=True, precision="bfloat16")),
    (4, Layout(tp=2, sequence=True, zero=3, recompute="full")),
    (4, Layout(cp=2, tp=2, cp_method="ulysses", hook="allreduce")),
]
LONG = [
    (2, Layout(zero=1, hook="int8")),
    (2, Layout(zero=2, precision="bfloat16")),
    (2, Layout(cp=2, cp_method="ulysses")),
    (2, Layout(hook="int4", precision="bfloat16")),
    (2, Layout(tp=2, hook="fp16", recompute="full")),
    (3, Layout()),
    (4, Layout(dp=2, tp=2, zero=1, hook="bf16", sequence=True)),
    (4, Layout(dp=2, cp=2, zero=2, recompute="full", precision="bfloat16")),
    (4, Layout(tp=4, sequence=True)),
    (4, Layout(cp=4, zero=1)),
    (4, Layout(cp=2, tp=2, sequence=True, zero=3)),
    (4, Layout(tp=2, hook="hierarchical")),
    (4, Layout(cp=2, hook="hierarchical+int8")),
]


@pytest.mark.parametrize(
    ("world", "layout"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)],
    ids=lambda value: str(value) or "dp",
)
def test_a_layout_takes_the_steps_of_one_process(config, world, layout):
    config = replace(config, batch=12 if world == 3 else 8, accumulate=2)
    rounded = isinstance(layout, Layout) and bool(
        layout.precision or layout.hook not in (None, "allreduce", "hierarchical")
    )
    for rows in run_ranks(world, differences, config, layout, ["float32"] if rounded else ["float64", "float32"]):
        assert len(rows) == (3 if rounded else 6)
        assert all(ok for _, ok in rows)
        assert {dtype for dtype, _ in rows} == ({"rounded"} if rounded else {"float64", "float32"})


# --- --check can fail ---
def sums_instead_of_means() -> None:
    start = bucket.start_all_reduce
    bucket.start_all_reduce = lambda comm, x, op: start(comm, x, "sum")


def one_rank_keeps_an_element() -> None:
    start = bucket.start_all_reduce

    def forgetful(comm, x, op):
        before = x[0].clone()
        start(comm, x, op).wait()
        if comm.rank == 1:
            x[0] = before
        return start(comm, x[:0], op)

    bucket.start_all_reduce = forgetful


def norms_are_not_summed_over_tp() -> None:
    DataParallel._group = lambda self, parameter: self.comm


def every_rank_drops_the_same() -> None:
    place = loop.Trainer._place
    loop.Trainer._place = lambda self, step, first, rows: place(self, step, 0, rows)


WRONG = [
    (sums_instead_of_means, Layout()),
    (one_rank_keeps_an_element, Layout()),
    (norms_are_not_summed_over_tp, Layout(tp=2, sequence=True)),
    (every_rank_drops_the_same, Layout()),
]


def check_what_is_wrong(rank: Rank, config: TrainConfig, spoil, layout: Layout) -> list[tuple[str, bool]]:
    spoil()
    return differences(rank, config, layout, ["float64", "float32"])


@pytest.mark.parametrize(("spoil", "layout"), WRONG, ids=lambda value: getattr(value, "__name__", str(value) or "dp"))
def test_check_finds_what_is_wrong(config, spoil, layout):
    for rows in run_ranks(2, check_what_is_wrong, config, spoil, layout):
        assert not any(ok for _, ok in rows)


def test_check_finds_a_rounded_mean_that_is_none(config):
    for rows in run_ranks(2, wrong_precision, config):
        assert not any(ok for _, ok in rows)


def wrong_precision(rank: Rank, config: TrainConfig) -> list[tuple[str, bool]]:
    sums_instead_of_means()
    return differences(rank, config, Layout(precision="bfloat16"), ["float32"])


def test_what_leaves_most_out_is_not_compared():
    with pytest.raises(InvalidArgument, match="hook topk leaves out most"):
        expect_comparable(Layout(hook="topk"))
    assert max(TOLERANCE.values()) < 0.1


# --- whole runs ---
def train_on_rank(rank: Rank, config: TrainConfig, layout: Layout | str) -> tuple[float, bytes]:
    replicas = open_ranks(rank, layout)
    result = loop._train(settings(config, layout), replicas)
    replicas.close()
    return result.held_out_bits, result.sample


def losses(config: TrainConfig) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(config.folder / "metrics.jsonl") if "loss" in r}


CHAIN = [
    (2, Layout(tp=2)),
    (2, DDP),
    (4, Layout(cp=2, zero=3)),
    (4, Layout(tp=2, sequence=True, zero=1)),
    (1, Layout()),
]


def test_a_run_goes_on_in_any_other_layout(config):
    one = replace(config, name="one", steps=2 * len(CHAIN), eval_every=2)
    whole = loop._train(one, TorchReplicas(None))
    held_out = [r["held_out_bits_per_byte"] for r in read_metrics(one.folder / "metrics.jsonl") if "loss" not in r]
    for index, (world, layout) in enumerate(CHAIN):
        # The schedule of learning rates is the whole run's.
        part = replace(config, steps=2 * len(CHAIN), resume=index > 0)
        results = run_ranks(world, stop_after, part, layout, 2 * index + 2)
        assert all(bits == pytest.approx(held_out[index], rel=1e-10) for bits, _ in results)
    assert losses(config) == pytest.approx(losses(one), rel=1e-10)
    assert results[0][1] == whole.sample


def stop_after(rank: Rank, config: TrainConfig, layout: Layout | str, step: int) -> tuple[float, bytes]:
    """A run of all steps that ends early, with its checkpoint."""
    rate = loop.learning_rate
    loop.learning_rate = lambda ours, at: rate(replace(ours, steps=config.steps), at)
    return train_on_rank(rank, replace(config, steps=step), layout)


@pytest.mark.parametrize(
    ("world", "layout"),
    [(4, Layout(tp=2, zero=3, sequence=True)), (2, Layout(cp=2, precision="bfloat16", zero=1))],
    ids=str,
)
def test_a_checkpoint_is_a_whole_model_and_torchs_own_optimizer(config, world, layout):
    config = replace(config, dtype="float32")
    results = run_ranks(world, train_on_rank, config, layout)
    writers = [sample for _, sample in results if sample]
    assert len(set(writers)) == 1 and writers[0] == results[0][1]
    last = list_checkpoints(config.folder / "checkpoints")[-1]
    model = GPT(TINY)
    optimizer = torch.optim.AdamW(loop._groups(model, config), lr=1.0)
    assert load_checkpoint(last, model, optimizer)["step"] == 4
    for parameter in model.parameters():
        moments = optimizer.state[parameter]
        assert moments["exp_avg"].shape == parameter.shape and float(moments["step"]) == 4
        assert moments["exp_avg"].abs().max() > 0 and moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert parameter.dtype == torch.float32
    if layout.precision is None:
        assert model.generate(b"def ", 24) == results[0][1]
    else:
        assert any(not torch.equal(p, p.bfloat16().float()) for p in model.parameters()), "float32 weights are saved"


def kinds_of_hooks(rank: Rank, config: TrainConfig) -> list[float]:
    comm = rank.connect()
    found = []
    for hook in ("topk", "powersgd", "batched_powersgd", "fp16+powersgd"):
        layout = Layout(hook=hook)
        trainer = loop.Trainer(replace(config, layout=layout), MeshReplicas(layout, comm), load_corpus(config.data))
        for step in range(20):
            loss = trainer.backward(step)
            trainer.update(step)
        found.append(float(loss))
    return found


def test_hooks_that_leave_most_out_learn_too(config):
    config = replace(config, model=replace(TINY, dropout=0.0), steps=20, lr=1e-2, dtype="float32")
    for found in run_ranks(2, kinds_of_hooks, config):
        assert all(loss < 0.8 * 5.545 for loss in found), "as all bytes alike"


def other_world(rank: Rank, layout: Layout, path: Path) -> str:
    with pytest.raises(InvalidArgument) as caught:
        loop._train(TrainConfig(layout=layout, data=path), MeshReplicas(layout, rank.connect()))
    return str(caught.value)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (Layout(tp=2), "cp 1 x tp 2 = 2 does not divide the 3 ranks"),
        (Layout(dp=2), "dp 2 x cp 1 x tp 1 = 2 ranks, but the job has 3"),
    ],
    ids=str,
)
def test_ranks_that_do_not_fit_are_refused_before_the_text_is_read(tmp_path, layout, reason):
    for said in run_ranks(3, other_world, layout, tmp_path / "nowhere"):
        assert reason in said


def other_batch(rank: Rank, config: TrainConfig) -> str:
    with pytest.raises(InvalidArgument) as caught:
        loop._train(config, MeshReplicas(config.layout, rank.connect()))
    return str(caught.value)


def test_a_batch_that_the_ranks_do_not_divide_is_refused_before_the_text_is_read(config, tmp_path):
    for said in run_ranks(2, other_batch, replace(config, batch=7, data=tmp_path / "nowhere")):
        assert "7 sequences does not divide by 2 ranks of dp" in said
