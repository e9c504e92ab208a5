"""What the examples share: the split, batches, the verdict, and a loop that gives the same numbers in any layout."""

from __future__ import annotations

import math

import pytest
import torch
from learning import (
    BEGIN,
    END,
    PAD,
    Bar,
    Learner,
    Nearest,
    Pairs,
    Recipe,
    Verdict,
    held_out,
    layout_of,
    multiple_of,
    options_of,
    pairs_batch,
    run,
    shared_out,
    start_narrow,
)
from ranks import Rank, run_ranks

from paracomm.errors import InvalidArgument
from paracomm.models import Seq2Seq, Seq2SeqConfig
from paracomm.parallel import Layout
from paracomm.parallel.loss import IGNORED


# --- data ---
def test_one_key_in_so_many_is_held_out() -> None:
    found = [held_out(str(number), 20) for number in range(20000)]
    assert 0.045 < sum(found) / len(found) < 0.055
    assert found[:30] == [held_out(str(number), 20) for number in range(30)]
    assert not any(held_out(str(number), 20) and not held_out(str(number), 5) for number in range(2000))


def test_a_batch_of_pairs() -> None:
    batch = pairs_batch([([5, 6, 7], [8]), ([9], [10, 11])], 4)
    assert batch["source"].tolist() == [[5, 6, 7, PAD], [9, PAD, PAD, PAD]]
    assert batch["mask"].tolist() == [[True, True, True, False], [True, False, False, False]]
    assert batch["tokens"].tolist() == [[BEGIN, 8, PAD, PAD], [BEGIN, 10, 11, PAD]]
    assert batch["targets"].tolist() == [[8, END, IGNORED, IGNORED], [10, 11, END, IGNORED]]


def some_pairs(count: int) -> list[tuple[list[int], list[int]]]:
    """Each has a source of its own: its number in base 7, shifted past the special tokens."""
    draws = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (count,), generator=draws).tolist()
    return [([3 + number // 7**i % 7 for i in range(4)], [3 + number % 7] * n) for number, n in enumerate(lengths)]


def test_an_epoch_has_each_pair_once_in_batches_of_like_length() -> None:
    pairs = some_pairs(330)
    batches = Pairs(pairs, rows=10, multiple=1, seed=3)
    epoch = [batches.batch(step) for step in range(33)]
    sources = [tuple(row) for batch in epoch for row in batch["source"].tolist()]
    assert sorted(sources) == sorted(tuple(source) for source, _ in pairs)
    again = Pairs(pairs, rows=10, multiple=1, seed=3)
    for step in (32, 0, 40, 7):  # a batch is a function of the step, whatever was asked before
        for name, x in again.batch(step).items():
            assert torch.equal(x, batches.batch(step)[name])
    assert not torch.equal(batches.batch(33)["source"], epoch[0]["source"])
    filled = sum(int((batch["targets"] != IGNORED).sum()) for batch in epoch)
    room = sum(batch["targets"].numel() for batch in epoch)
    shuffled = sum(10 * max(len(target) + 1 for _, target in pairs[i : i + 10]) for i in range(0, 330, 10))
    assert filled / room > 0.85 > filled / shuffled


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="3 pairs, expected at least one batch of 4"):
        Pairs(some_pairs(3), rows=4, multiple=1)


def test_what_is_most_alike() -> None:
    nearest = Nearest(["delete the event", "delete the order", "sign in"])
    assert [nearest.index(text) for text in ("Sign in again", "the order", "Delete this event?")] == [2, 1, 0]
    assert nearest.index("delete the event") == 0


def check_shared_out(rank: Rank) -> None:
    done: list[int] = []

    def work(item: int) -> list[int]:
        done.append(item)
        return [item] * (item % 3)

    with rank.connect() as comm:
        assert shared_out(comm, range(7), work) == [[item] * (item % 3) for item in range(7)]
        assert done == list(range(7))[rank.rank :: rank.world_size]


def test_ranks_share_the_reading() -> None:
    run_ranks(3, check_shared_out)


# --- the command line and the verdict ---
def test_flags_become_a_layout() -> None:
    given = ["--steps", "5", "--tp", "2", "--zero", "3", "--sequence", "--recompute", "full", "--precision", "bfloat16"]
    options = options_of(None, given, steps=10, lr=0.1)
    assert (options.steps, options.lr) == (5, 0.1)
    assert layout_of(options) == Layout(tp=2, zero=3, sequence=True, recompute="full", precision="bfloat16")
    assert layout_of(options_of(None, [], steps=10)) == Layout()


@pytest.mark.parametrize(("value", "less", "passes"), [(5.0, False, True), (4.9, False, False), (1.0, True, True)])
def test_the_verdict_asks_for_the_margin(value: float, less: bool, passes: bool) -> None:
    verdict = Verdict("points", value, [Bar("other", 3.0, 2.0), Bar("only shown", 9.0 if not less else 0.0)], less)
    assert verdict.passed is passes
    assert sum("asked" in line for line in verdict.lines()) == 1
    assert any("FAILED" in line for line in verdict.lines()) is not passes


@pytest.mark.parametrize("less", [False, True])
def test_what_is_not_a_number_fails(less: bool) -> None:
    assert not Verdict("points", math.nan, [Bar("other", 3.0, 0.0)], less).passed


@pytest.mark.parametrize(("value", "code"), [(9.0, 1), (2.0, 0)])
def test_the_exit_code(value: float, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = Verdict("bits", value, [Bar("frequencies", 4.0, 1.0)], less=True)
    assert run(lambda comm, options, say: verdict, options_of(None, [])) == code
    assert "held-out bits" in capsys.readouterr().out


# --- the loop ---
def test_matrices_start_as_wide_as_the_model_asks() -> None:
    model = Seq2Seq(Seq2SeqConfig(64, 1, 2, 16, vocabulary=500))
    ones = model.norm.weight.clone()
    start_narrow(model)
    assert float(model.token.weight.detach().std()) == pytest.approx(1 / 8, rel=0.03)
    assert torch.equal(model.norm.weight, ones)


STEPS, ROWS = 4, 7
"""Rows that two ranks do not share evenly, of targets of different lengths."""


def learned(rank: Rank, layout: Layout) -> tuple[float, list[list[int]], float]:
    """After a few steps: the loss on other pairs, what is written behind five sources, and a weight's sum."""
    config = Seq2SeqConfig(16, 1, 2, 32, 0.1, 17, positions="rotary", norm="rms")
    pairs = some_pairs(60)
    with rank.connect() as comm:
        learner = Learner(comm, layout, Seq2Seq(config, 1).double(), Recipe(STEPS, 3e-2, warmup=2))
        batches = Pairs(pairs[:40], ROWS, multiple_of(layout))
        learner.train(batches.batch, lambda _: None)
        nats = learner.nats(pairs_batch(pairs[at : at + 5], multiple_of(layout)) for at in (40, 45))
        written = learner.write([source for source, _ in pairs[40:45]], 6, rows=3)
        with learner.parallel.gathered():
            weight = float(next(iter(learner.model.parameters())).detach().abs().sum())
        return nats, written, weight


LAYOUTS = {2: [Layout(), Layout(tp=2), Layout(cp=2), Layout(zero=3, recompute="full")], 4: [Layout(dp=2, tp=2, zero=2)]}


@pytest.mark.parametrize(
    ("ranks", "layout"), [(ranks, layout) for ranks, of in LAYOUTS.items() for layout in of], ids=str
)
def test_the_same_run_in_every_layout(ranks: int, layout: Layout) -> None:
    ((nats, written, weight),) = run_ranks(1, learned, Layout())
    assert nats < math.log(17) - 0.05, "nothing was learned"
    for found in run_ranks(ranks, learned, layout):
        assert found[0] == pytest.approx(nats, rel=1e-10)
        assert found[1] == written
        if layout.tp == 1:
            assert found[2] == pytest.approx(weight, rel=1e-10)


def check_refused(rank: Rank) -> None:
    with rank.connect() as comm, pytest.raises(InvalidArgument, match="tp 2 does not divide the 3 heads"):
        Learner(comm, Layout(tp=2), Seq2Seq(Seq2SeqConfig(12, 1, 3)), Recipe(1, 1e-3))


def test_a_layout_that_cannot_work_is_refused() -> None:
    run_ranks(2, check_refused)
