"""Ranks die at any moment while they save: there is always a whole checkpoint, all of one step."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import Rank, rank_outcomes
from torch import nn

from paracomm.errors import Error
from paracomm.parallel import DataParallel
from paracomm.train.checkpoint import Checkpointer, list_checkpoints, load_checkpoint

SIZE = 40_000


class Numbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values = nn.ParameterList(nn.Parameter(torch.zeros(SIZE + i)) for i in range(4))


def killer_of(pid: int, after_s: float) -> int:
    """Starts a process that kills `pid` so long after a byte is written to the descriptor that this returns."""
    heard, go = os.pipe()
    if os.fork() == 0:
        os.close(go)
        if os.read(heard, 1):
            time.sleep(after_s)
            os.kill(pid, signal.SIGKILL)
        os._exit(0)
    os.close(heard)
    return go


def save_until_killed(rank: Rank, folder: Path, zero: int, victims: list[int], after_s: float) -> None:
    """Every number of a checkpoint is its step. Ranks of `victims` die as near together as clocks are."""
    go = killer_of(os.getpid(), after_s) if rank.rank in victims else None
    comm = rank.connect(timeout_s=30)
    model = DataParallel(Numbers(), comm, zero=zero, bucket_bytes=100_000)
    optimizer = model.optimizer(torch.optim.SGD, lr=1.0, momentum=0.9)
    with contextlib.suppress(Error), Checkpointer(folder, model, optimizer) as checkpoints:
        for step in range(1, 10_000):
            for weights in model.weights:
                weights.master.fill_(step)
                for where, _, state in optimizer.shards.runs(weights):
                    state["momentum_buffer"] = torch.full_like(weights.master[where], step)
            checkpoints.save(step)
            if step == 1:
                checkpoints.wait()  # there is a whole one before anybody dies
                if go is not None:
                    os.write(go, b"x")


def kill_once(seed: int, folder: Path) -> None:
    dice = random.Random(seed)
    world = dice.choice([1, 2, 3])
    victims = list(range(world)) if dice.random() < 0.3 else [dice.randrange(world)]
    after_s = dice.uniform(0.01, 0.4)
    start = time.monotonic()
    outcomes = rank_outcomes(world, save_until_killed, folder, dice.randrange(4), victims, after_s, timeout_s=60)
    where = f"seed {seed}: world {world}, victims {victims}, after {after_s:.3f} s"
    for outcome in outcomes:
        assert outcome.ended, f"{where}: {outcome.failure} of {time.monotonic() - start:.1f}"
        if outcome.rank in victims:
            assert outcome.exit_code == -signal.SIGKILL, f"{where}: {outcome.failure}"
        else:
            assert not outcome.failure, f"{where}: {outcome.failure}"
    found = list_checkpoints(folder)
    assert found, where
    for path in found:
        model = Numbers()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        step = load_checkpoint(path, model, optimizer)["step"]
        assert path.name == f"step-{step:08d}"
        for parameter in model.parameters():
            assert bool((parameter == step).all()), where
            assert bool((optimizer.state[parameter]["momentum_buffer"] == step).all()), where


@pytest.mark.parametrize("seed", range(4))
def test_a_kill_leaves_a_whole_checkpoint(seed, tmp_path):
    kill_once(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 150))
def test_fifty_kills_leave_whole_checkpoints(seed, tmp_path):
    kill_once(seed, tmp_path)
