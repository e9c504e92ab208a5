"""A checkpoint is whole or not there, whenever the process that writes it dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from ranks import rank_outcomes
from torch import nn

from paracomm.errors import Error
from paracomm.train import checkpoint
from paracomm.train.checkpoint import list_checkpoints, load_checkpoint, read_state, save_checkpoint


def model_and_optimizer(seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder, step, model, optimizer, state):
    return save_checkpoint(folder, step, dict(model.named_parameters()), optimizer.state_dict(), state)


def test_what_is_saved_is_loaded(tmp_path):
    model, optimizer = model_and_optimizer()
    path = save(tmp_path, 7, model, optimizer, {"note": "x"})
    other, other_optimizer = model_and_optimizer(seed=1)
    other_optimizer.load_state_dict(load_checkpoint(path, other))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for mine, theirs in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert read_state(path) == {"step": 7, "note": "x"}


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step, *model_and_optimizer(), {})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]


DEATHS = ("optimizer.pt", "state.json", "folder", "rename")


def save_and_die(rank, folder: Path, where: str) -> None:
    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "optimizer.pt":
        torch.save = die
    elif where == "state.json":
        checkpoint.json.dumps = die
    elif where == "folder":
        checkpoint._sync_folder = die
    else:
        Path.rename = die
    save(folder, 2, *model_and_optimizer(), {})


@pytest.mark.parametrize("where", DEATHS)
def test_death_while_saving_leaves_the_last_whole_checkpoint(tmp_path, where):
    model, optimizer = model_and_optimizer()
    save(tmp_path, 1, model, optimizer, {})
    (outcome,) = rank_outcomes(1, save_and_die, tmp_path, where)
    assert outcome.exit_code == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2, "the half-written one should lie there"
    (last,) = list_checkpoints(tmp_path)
    other, _ = model_and_optimizer(seed=1)
    load_checkpoint(last, other)
    assert read_state(last)["step"] == 1
    assert torch.equal(model.weight, other.weight)
    save(tmp_path, 2, model, optimizer, {})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damage_is_named(tmp_path, name, damage):
    model, optimizer = model_and_optimizer()
    path = save(tmp_path, 1, model, optimizer, {})
    if damage == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes((path / name).read_bytes()[:5])
    with pytest.raises(Error, match="step-00000001"):
        read_state(path)
        load_checkpoint(path, model)


def test_another_model_is_refused(tmp_path):
    model, optimizer = model_and_optimizer()
    path = save(tmp_path, 1, model, optimizer, {})
    other = nn.Linear(4, 3)
    with pytest.raises(Error, match="size mismatch"):
        load_checkpoint(path, other)
