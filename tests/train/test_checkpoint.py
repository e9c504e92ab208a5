"""A checkpoint is whole or not there, whenever the process that writes it dies, and says what is wrong with it."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from ranks import Rank, rank_outcomes, run_ranks
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from paracomm.errors import Error, InvalidArgument
from paracomm.hooks import LocalSGDState, local_sgd_hook
from paracomm.parallel import DataParallel
from paracomm.train import checkpoint, storage
from paracomm.train.checkpoint import Checkpointer, list_checkpoints, load_checkpoint, read_state


class Net(nn.Module):
    """With a buffer that is kept and one that is not, and a frozen parameter."""

    def __init__(self, features: int = 5) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, 4), nn.Linear(4, 3)
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("seen", torch.randint(9, (3,)))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x):
        return self.second(self.first(x))


def model_and_optimizer(seed=0, features=5, steps=1):
    torch.manual_seed(seed)
    model = Net(features)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1 + seed)
    for _ in range(steps):
        model(torch.randn(2, features)).sum().backward()
        optimizer.step()
    return model, optimizer


def save(folder, step, model, optimizer, state=None):
    with Checkpointer(folder, model, optimizer) as checkpoints:
        checkpoints.save(step, state)
    return folder / f"step-{step:08d}"


def test_what_is_saved_is_loaded(tmp_path):
    model, optimizer = model_and_optimizer()
    path = save(tmp_path, 7, model, optimizer, {"note": "x"})
    other, other_optimizer = model_and_optimizer(seed=1, steps=2)
    assert load_checkpoint(path, other, other_optimizer) == read_state(path) == {"step": 7, "note": "x"}
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in model.state_dict().items())
    for mine, theirs in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert other_optimizer.param_groups[0]["lr"] == 0.1


def test_the_last_two_are_kept(tmp_path):
    with Checkpointer(tmp_path, *model_and_optimizer()) as checkpoints:
        for step in (1, 2, 10):
            checkpoints.save(step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]
    save(tmp_path, 5, *model_and_optimizer())  # what is new stays, whatever lies there
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000005", "step-00000010"]


def test_a_save_is_of_the_moment_it_was_called_in(tmp_path, monkeypatch):
    go = threading.Event()
    write = FileSystemWriter.write_data
    monkeypatch.setattr(FileSystemWriter, "write_data", lambda *a: go.wait(60) and write(*a))
    model, optimizer = model_and_optimizer()
    weight, moment = model.first.weight.detach().clone(), optimizer.state[model.first.weight]["exp_avg"].clone()
    with Checkpointer(tmp_path, model, optimizer) as checkpoints:
        checkpoints.save(1)
        assert list_checkpoints(tmp_path) == [], "save() came back only when all was written"
        optimizer.step()
        model.first.weight.data.zero_()
        go.set()
        checkpoints.wait()
        assert checkpoints.load() == {"step": 1}
    assert torch.equal(model.first.weight, weight)
    assert torch.equal(optimizer.state[model.first.weight]["exp_avg"], moment)


def test_what_a_save_failed_with_is_raised_at_the_next_call(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    for call in (lambda c: c.save(2), Checkpointer.wait, Checkpointer.load, Checkpointer.close):
        checkpoints = Checkpointer(tmp_path, *model_and_optimizer())
        with monkeypatch.context() as broken:
            broken.setattr(FileSystemWriter, "write_data", full)
            checkpoints.save(1)
            checkpoints._thread.join()
            with pytest.raises(Error, match=r"step-00000001' is not written: rank 0: OSError: no space left"):
                call(checkpoints)
        assert list_checkpoints(tmp_path) == []
        checkpoints.save(1)
        checkpoints.close()
        assert len(list_checkpoints(tmp_path)) == 1
        shutil.rmtree(list_checkpoints(tmp_path)[0])


def test_torchs_own_tools_read_it(tmp_path):
    model, optimizer = model_and_optimizer()
    path = save(tmp_path, 1, model, optimizer)
    dcp_to_torch_save(path, tmp_path / "whole.pt")
    found = torch.load(tmp_path / "whole.pt", weights_only=True)
    other, _ = model_and_optimizer(seed=1)
    other.load_state_dict(found["model"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    state = found["optimizer"]["state"]["second.weight"]
    assert torch.equal(state["exp_avg_sq"], optimizer.state[model.second.weight]["exp_avg_sq"])
    (group,) = found["optimizer"]["param_groups"]
    assert group["params"] == ["first.weight", "first.bias", "second.weight", "second.bias"] and group["lr"] == 0.1


def test_generators_go_on(tmp_path):
    torch.manual_seed(3)
    mine = torch.Generator().manual_seed(5)
    given = {"torch": torch.default_generator, "mine": mine}
    with Checkpointer(tmp_path, *model_and_optimizer(), generators=given) as checkpoints:
        checkpoints.save(1)
        drawn = torch.rand(3), torch.rand(3, generator=mine)
        checkpoints.load()
        assert torch.equal(drawn[0], torch.rand(3)) and torch.equal(drawn[1], torch.rand(3, generator=mine))


# --- deaths at chosen moments ---
DEATHS = ("write_data", "finish", "json", "folder", "rename", "second rename", "drop")


def save_and_die(rank: Rank, folder: Path, where: str, step: int) -> None:
    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    rename, renamed = Path.rename, []

    def die_after_one(path, target):
        return die() if renamed else (renamed.append(path), rename(path, target))

    if where in ("write_data", "finish"):
        setattr(FileSystemWriter, where, die)
    elif where == "json":
        checkpoint.os.fsync = die
    elif where == "folder":
        checkpoint._sync_folder = die
    elif where == "rename":
        Path.rename = lambda path, target: die() if path.name == f".saving-step-{step:08d}" else rename(path, target)
    elif where == "second rename":
        torch.distributed.checkpoint.filesystem.FileSystem.rename = lambda self, a, b: rename(a, b)
        checkpoint.Path.rename = die_after_one
    else:
        checkpoint.shutil.rmtree = die
    save(folder, step, *model_and_optimizer(seed=2))


@pytest.mark.parametrize("where", DEATHS)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_death_while_saving_leaves_a_whole_checkpoint(tmp_path, where, step):
    """A new step, beside one or two whole ones, and a step that is there already."""
    model, optimizer = model_and_optimizer()
    for before in (0, 2) if step == 3 else (1,):
        save(tmp_path, before, model, optimizer)
    (outcome,) = rank_outcomes(1, save_and_die, tmp_path, where, step)
    if step == 2 and where in ("drop", "second rename"):
        assert outcome.exit_code == 0  # with one before there is nothing to drop, and one rename
    else:
        assert outcome.exit_code == -signal.SIGKILL
    found = list_checkpoints(tmp_path)
    for path in found:
        other, other_optimizer = model_and_optimizer(seed=1)
        load_checkpoint(path, other, other_optimizer)
        new = path.name.startswith(f"step-{step:08d}") and (step != 1 or other_optimizer.param_groups[0]["lr"] > 1)
        expected = model_and_optimizer(seed=2)[0] if new else model
        assert torch.equal(other.second.weight, expected.second.weight)
    assert found
    save(tmp_path, 9, model, optimizer)
    assert [path.name for path in list_checkpoints(tmp_path)][-1] == "step-00000009"
    assert not list(tmp_path.glob(".*"))


# --- what is wrong is named ---
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_damage_is_named(tmp_path, name, damage):
    model, optimizer = model_and_optimizer()
    path = save(tmp_path, 1, model, optimizer)
    if damage == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes((path / name).read_bytes()[: 5 if damage == "cut" else 0])
    with pytest.raises(Error, match="step-00000001"):
        load_checkpoint(path, model, optimizer)


def test_no_checkpoint_is_named(tmp_path):
    checkpoints = Checkpointer(tmp_path / "x", *model_and_optimizer())
    with pytest.raises(Error, match="there is none in"):
        checkpoints.load()


def test_another_model_is_refused(tmp_path):
    model, optimizer = model_and_optimizer()
    path = save(tmp_path, 1, model, optimizer)
    with pytest.raises(Error, match=r"'model.first.weight' is torch.float32 \[4, 5\], expected torch.float32 \[4, 6\]"):
        load_checkpoint(path, *model_and_optimizer(features=6))
    double = Net().double()
    with pytest.raises(Error, match=r"'model.\w+' is torch.float32 \[2\], expected torch.float64"):
        load_checkpoint(path, double, torch.optim.AdamW([p for p in double.parameters() if p.requires_grad]))
    one = Net()
    with pytest.raises(InvalidArgument, match=r"they are|it lacks"):
        load_checkpoint(path, one, torch.optim.AdamW([*one.parameters()]))
    less = Net()
    del less.frozen
    with pytest.raises(Error, match="there is no 'frozen' here"):
        load_checkpoint(path, less, torch.optim.AdamW(less.parameters()))
    more = Net()
    more.third = nn.Parameter(torch.zeros(1), requires_grad=False)
    with pytest.raises(Error, match=r"it has no 'model.third'"):
        load_checkpoint(path, more, torch.optim.AdamW([p for p in more.parameters() if p.requires_grad]))


def wrong_on_one_rank(rank: Rank, folder: Path) -> list[str]:
    """One rank cannot write, one cannot read, one has another model: all ranks raise the same."""
    comm, said = rank.connect(), []
    torch.manual_seed(0)
    model = DataParallel(Net(), comm, zero=2)
    optimizer = model.optimizer(torch.optim.AdamW)
    model(torch.ones(1, 5)).sum().backward()
    model.finish()
    optimizer.step()
    checkpoints = Checkpointer(folder, model, optimizer)
    write, read = FileSystemWriter.write_data, storage.FileSystemReader.read_data

    def fails(*_, **__):
        raise OSError("a broken disk")

    if rank.rank == 1:
        FileSystemWriter.write_data = fails
    checkpoints.save(1)
    with pytest.raises(Error) as caught:
        checkpoints.wait()
    said.append(str(caught.value))
    FileSystemWriter.write_data = write
    checkpoints.save(1)
    checkpoints.wait()
    if rank.rank == 1:
        storage.FileSystemReader.read_data = fails
    with pytest.raises(Error) as caught:
        checkpoints.load()
    said.append(str(caught.value))
    storage.FileSystemReader.read_data = read
    checkpoints.load()
    checkpoints.close()
    return said


def test_what_fails_on_one_rank_is_raised_on_all(tmp_path):
    for written, loaded in run_ranks(3, wrong_on_one_rank, tmp_path):
        assert "step-00000001' is not written: rank 1: OSError: a broken disk" in written
        assert "OSError: a broken disk" in loaded and "step-00000001" in loaded
    files = sorted(path.name for path in (tmp_path / "step-00000001").iterdir())
    assert files == [".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp", "state.json"]


def local_sgd(rank: Rank, folder: Path) -> str:
    comm = rank.connect()
    model = DataParallel(nn.Linear(2, 2), comm, hook=local_sgd_hook, state=LocalSGDState(comm))
    with pytest.raises(InvalidArgument) as caught:
        Checkpointer(folder, model, model.optimizer(torch.optim.SGD, lr=0.1))
    return str(caught.value)


def test_models_that_differ_between_ranks_are_refused(tmp_path):
    for said in run_ranks(2, local_sgd, tmp_path):
        assert "under local SGD" in said
