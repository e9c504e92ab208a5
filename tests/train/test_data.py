"""The corpus and the order of its batches: the same on every machine, rank count and resume."""

from __future__ import annotations

import math

import pytest
import torch

from paracomm.errors import InvalidArgument
from paracomm.parallel.loss import IGNORED
from paracomm.train.data import Corpus, batch, evaluation_batches, load_corpus

TEXT = (torch.arange(5000) * 7919 % 251).to(torch.uint8)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_ranks_together_see_the_global_batch(world_size):
    whole = batch(TEXT, 16, 12, seed=3, step=5)
    parts = [batch(TEXT, 16, 12, seed=3, step=5, rank=rank, world_size=world_size) for rank in range(world_size)]
    for index in range(2):
        assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])


def test_a_batch_is_text_and_its_next_bytes():
    inputs, targets = batch(TEXT, 16, 12, seed=0, step=0)
    assert inputs.shape == targets.shape == (12, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    text = bytes(TEXT.tolist())
    for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert bytes([*x, y[-1]]) in text


def test_batches_depend_on_seed_and_step_alone():
    first = batch(TEXT, 16, 8, seed=1, step=2)[0]
    torch.manual_seed(99)
    assert torch.equal(first, batch(TEXT, 16, 8, seed=1, step=2)[0])
    assert not torch.equal(first, batch(TEXT, 16, 8, seed=1, step=3)[0])
    assert not torch.equal(first, batch(TEXT, 16, 8, seed=2, step=2)[0])


def test_the_last_byte_of_the_text_is_reached():
    starts = {tuple(batch(TEXT[:18], 16, 64, seed=0, step=0)[1][:, -1].tolist())[i] for i in range(64)}
    assert starts == {int(TEXT[16]), int(TEXT[17])}


def test_evaluation_covers_the_same_windows_on_any_number_of_ranks():
    whole = torch.cat([x for x, _ in evaluation_batches(TEXT, 16, 50, 8)])
    for world_size in (2, 3):
        parts = [evaluation_batches(TEXT, 16, 50, 8, rank=rank, world_size=world_size) for rank in range(world_size)]
        rows = torch.cat([x[y[:, 0] != IGNORED] for part in parts for x, y in part])
        assert sorted(rows.tolist()) == sorted(whole.tolist())
        # Ranks that gather parameters together need equally many batches of equal sizes.
        assert len({tuple(len(x) for x, _ in part) for part in parts}) == 1
    assert len(whole) == 50
    assert len(torch.cat([x for x, _ in evaluation_batches(TEXT[:17], 16, 50, 8)])) == 1


def test_a_rank_with_nothing_to_evaluate_has_targets_that_do_not_count():
    ((x, y),) = evaluation_batches(TEXT[:17], 16, 50, 8, rank=1, world_size=2)
    assert x.shape == y.shape == (1, 16) and bool((y == IGNORED).all())


def test_standard_library_is_split_by_file_and_stays_the_same():
    corpus, again = load_corpus(max_bytes=1 << 20), load_corpus(max_bytes=1 << 20)
    assert corpus.digest == again.digest
    assert torch.equal(corpus.train, again.train) and torch.equal(corpus.held_out, again.held_out)
    assert len(corpus.train) + len(corpus.held_out) <= (1 << 20) + 2 * sum(corpus.files)
    assert corpus.files[0] > 10 * corpus.files[1] > 0
    assert 3 < corpus.unigram_bits() < 6


def test_a_folder_is_split_by_file_without_what_is_not_text(tmp_path):
    for index in range(60):
        (tmp_path / f"{index}.txt").write_bytes(bytes([65 + index % 26]) * 10)
    (tmp_path / "binary").write_bytes(b"\0" * 100)
    (tmp_path / "empty").write_bytes(b"")
    corpus = load_corpus(tmp_path)
    assert corpus.files == (57, 3)
    assert 0 not in corpus.train and 0 not in corpus.held_out


def test_a_file_holds_out_its_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 950 + b"y" * 50)
    corpus = load_corpus(path)
    assert bytes(corpus.train.tolist()) == b"x" * 950
    assert bytes(corpus.held_out.tolist()) == b"y" * 50
    assert bytes(load_corpus(path, max_bytes=100).held_out.tolist()) == b"x" * 5


def test_unigram_bits_of_a_fair_coin_is_one():
    coin = torch.tensor([0, 1] * 200_000, dtype=torch.uint8)
    corpus = Corpus(coin, coin, (1, 1), "", "")
    assert corpus.unigram_bits() == pytest.approx(1, abs=1e-2)
    assert not math.isclose(corpus.unigram_bits(), 2)


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(InvalidArgument, match="nowhere"):
        load_corpus(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(InvalidArgument, match="expected some of each"):
        load_corpus(tmp_path)
    with pytest.raises(InvalidArgument, match="10 sequences does not divide by 3 ranks"):
        batch(TEXT, 16, 10, seed=0, step=0, world_size=3)
    with pytest.raises(InvalidArgument, match="16 bytes of text"):
        batch(TEXT[:16], 16, 10, seed=0, step=0)


def test_why_there_is_no_text_is_said(tmp_path):
    binary = tmp_path / "a.bin"
    binary.write_bytes(b"abc\0def" * 100)
    with pytest.raises(InvalidArgument, match=r"there is no text in '.*a.bin': '.*a.bin': it is binary, byte 3 is 0"):
        load_corpus(binary)
    (tmp_path / "b.bin").write_bytes(b"\0")
    with pytest.raises(InvalidArgument, match=r"byte 3 is 0, and 1 more"):
        load_corpus(tmp_path)
    (tmp_path / "text").write_bytes(b"x" * 100)
    corpus = load_corpus(tmp_path)
    corpus.expect_context(4)
    with pytest.raises(InvalidArgument, match="has 5 bytes held out, expected more than the context of 5"):
        corpus.expect_context(5)
    with pytest.raises(InvalidArgument, match="has 95 bytes to train on, expected more than the context of 95"):
        corpus.expect_context(95)
