"""A checkpoint is whole or not there, whenever the process that writes it dies, and says what is wrong with it."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import random
import shutil
import signal
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from ranks import Rank, rank_outcomes, run_ranks
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import paracomm
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


def test_steps_of_any_length_are_found_in_their_order(tmp_path):
    with Checkpointer(tmp_path, *model_and_optimizer()) as checkpoints:
        for step in (99_999_999, 100_000_000, 2_000_000_000):
            checkpoints.save(step)
        assert checkpoints.load() == {"step": 2_000_000_000}
        for step in (-1, True, 1.0):
            with pytest.raises(InvalidArgument, match=f"step is {step}, expected a whole number"):
                checkpoints.save(step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-100000000", "step-2000000000"]


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


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    def full(writer, *_, **__):
        (Path(writer.path) / "__0_0.distcp").write_bytes(bytes(1000))
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")  # as torch's writer hides it

    checkpoints = Checkpointer(tmp_path, *model_and_optimizer())
    with monkeypatch.context() as broken:
        broken.setattr(FileSystemWriter, "write_data", full)
        checkpoints.save(1)
        with pytest.raises(Error, match=r"no space is left on the disk of '.*' \(\d+ bytes are free\): RuntimeError"):
            checkpoints.wait()
    assert list(tmp_path.iterdir()) == []
    checkpoints.save(1)
    checkpoints.close()
    assert len(list_checkpoints(tmp_path)) == 1


def test_what_a_run_that_died_left_does_not_fill_the_disk_for_ever(tmp_path, monkeypatch):
    (tmp_path / ".saving-step-00000001").mkdir()
    (tmp_path / ".saving-step-00000001/__0_0.distcp").write_bytes(bytes(1000))
    write_file = storage.write_file

    def full(path, data):
        if list(tmp_path.glob(".saving-*")):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_file(path, data)

    monkeypatch.setattr(storage, "write_file", full)
    Checkpointer(tmp_path, *model_and_optimizer()).close()
    assert list(tmp_path.iterdir()) == []


def cannot_write(rank: Rank, folder: Path, who: int) -> str:
    comm = rank.connect()
    model = DataParallel(Net(), comm)
    optimizer = model.optimizer(torch.optim.SGD, lr=0.1)
    mine = folder / "own" if rank.rank == 1 and who == 2 else folder
    if rank.rank == who:

        def fails(*_):
            raise OSError(errno.EROFS, "Read-only file system")

        storage.write_file = fails
    with pytest.raises(Error) as caught:
        Checkpointer(mine, model, optimizer)
    return str(caught.value)


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        (0, "rank 0: OSError: [Errno 30] Read-only file system"),
        (1, "rank 1: OSError: [Errno 30] Read-only file system"),
        (2, "rank 0: it does not see what rank 1 writes there: expected one folder for all"),
    ],
)
def test_a_folder_that_cannot_be_written_is_found_at_once_on_every_rank(tmp_path, who, reason):
    (tmp_path / "own").mkdir()
    for said in run_ranks(2, cannot_write, tmp_path, who):
        assert "nothing can be saved in" in said and reason in said
    assert [path.name for path in tmp_path.rglob("*")] == ["own"]


def test_a_folder_below_a_file_is_found_at_once(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(Error, match=r"nothing can be saved in '.*file/x': rank 0: NotADirectoryError"):
        Checkpointer(tmp_path / "file/x", *model_and_optimizer())


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


# --- states of every kind ---
class Scaled(nn.Module):
    """With a parameter that has no dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.tensor(2.0)), nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x) * self.scale


class Counting(torch.optim.Optimizer):
    """Its states are numbers of Python's, a text, a number of torch's, and a tensor of each parameter's shape."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 16_777_216) + 1  # float32 has no number after this one
                state["share"], state["kind"], state["warm"] = 1 / state["count"], "counting", state["count"] > 1
                state["calls"] = state.get("calls", torch.tensor(2**40)) + 1
                state["mean"] = state.get("mean", torch.zeros_like(p)) + p.grad
                p -= group["lr"] * (state["mean"] + state["count"] % 2)


KINDS = {
    "NAdam": (torch.optim.NAdam, {}), "ASGD": (torch.optim.ASGD, {"lr": 0.1}), "Counting": (Counting, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
}  # fmt: skip


class Trained:
    """Scaled under a layout: None: torch's own; otherwise a stage of ZeRO."""

    def __init__(self, kind: str, zero: int | None, seed: int) -> None:
        torch.manual_seed(seed)
        make, options = KINDS[kind]
        self.model: nn.Module = Scaled()
        if zero is None:
            self.optimizer = make(self.model.parameters(), **options)
        else:
            alone = paracomm.connect(0, 1, exchange=lambda blob: [blob], transport="local")
            self.model = DataParallel(self.model, alone, zero=zero)
            self.optimizer = self.model.optimizer(make, elementwise=make is Counting, **options)

    def step(self) -> dict[str, torch.Tensor]:
        self.optimizer.zero_grad()
        self.model(torch.ones(4, 3)).sum().backward()
        if isinstance(self.model, DataParallel):
            self.model.finish()
        self.optimizer.step()
        with self.model.gathered() if isinstance(self.model, DataParallel) else nullcontext():
            module = self.model.module if isinstance(self.model, DataParallel) else self.model
            return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("after", [None, 0, 3])
@pytest.mark.parametrize("before", [None, 0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_state_goes_on(tmp_path, kind, before, after):
    if kind == "Adafactor" and (before, after) != (None, None):
        return  # it looks at a parameter's shape
    first, other = Trained(kind, before, 0), Trained(kind, after, 1)
    first.step()
    other.step()
    save(tmp_path, 1, first.model, first.optimizer)
    with Checkpointer(tmp_path, other.model, other.optimizer) as checkpoints:
        checkpoints.load()
    for _ in range(2):
        expected, found = first.step(), other.step()
        assert all(torch.equal(x, found[name]) for name, x in expected.items())
    if kind == "Counting":
        state = next(iter(other.optimizer.state.values()))
        assert (state["count"], state["kind"], state["warm"]) == (16_777_219, "counting", True)
        assert int(state["calls"]) == 2**40 + 3


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("kind", ["NAdam", "ASGD", "Counting"])
def test_a_state_dict_goes_on_with_a_parameter_without_dimensions(kind, zero):
    first, other = Trained(kind, zero, 0), Trained(kind, zero, 0)
    first.step()
    other.step()
    first.step()
    other.step()
    other.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    expected, found = first.step(), other.step()
    assert all(torch.equal(x, found[name]) for name, x in expected.items())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([torch.zeros(2)], "state 'own' of 'layer.bias' is a list, expected a tensor, a number or a text"),
        (torch.zeros(7, 7), r"state 'own' of '.*' is \[7, 7\], expected one number or \[192\]"),
    ],
)
def test_a_state_that_no_other_layout_could_take_is_refused(tmp_path, value, reason):
    one = Trained("NAdam", 0, 0)
    one.step()
    next(iter(one.optimizer.state.values()))["own"] = value
    with Checkpointer(tmp_path, one.model, one.optimizer) as checkpoints, pytest.raises(InvalidArgument, match=reason):
        checkpoints.save(1)


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
        write_file = storage.write_file
        storage.write_file = lambda path, data: die() if path.name == "state.json" else write_file(path, data)
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


def two_checkpoints(rank: Rank, folder: Path) -> None:
    comm = rank.connect()
    torch.manual_seed(0)
    model = DataParallel(Net(), comm, zero=2)
    optimizer = model.optimizer(torch.optim.AdamW)
    with Checkpointer(folder, model, optimizer) as checkpoints:
        for step in (1, 2):
            model(torch.ones(1, 5)).sum().backward()
            model.finish()
            optimizer.step()
            checkpoints.save(step, {"note": "x"})


def damages(folder: Path, count: int) -> None:
    """So many flipped bits and so many truncations, in whatever files."""
    run_ranks(2, two_checkpoints, folder)
    older, last = list_checkpoints(folder)
    stored = FileSystemReader(last).read_metadata().storage_data
    files = [path for path in sorted(last.iterdir()) if path.stat().st_size]
    assert len(files) == 5
    model, optimizer = model_and_optimizer()
    load_checkpoint(older, model, optimizer)
    expected = {name: x.clone() for name, x in model.state_dict().items()}
    dice = random.Random(3)
    for number in range(2 * count):
        path, flips = files[number % len(files)], number < count
        whole = path.read_bytes()
        place = dice.randrange(len(whole))
        if flips:
            bit = 1 << dice.randrange(8)
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        else:
            path.write_bytes(whole[:place])
        with pytest.raises(Error) as caught:
            load_checkpoint(last, model, optimizer)
        said = str(caught.value)
        if path.suffix == ".distcp":
            cut = {
                index.fqn for index, info in stored.items()
                if info.relative_path == path.name and info.offset + info.length > place
                and (not flips or info.offset <= place)
            }  # fmt: skip
            assert any(f"'{name}' in '{path.name}'" in said for name in cut), (said, cut)
        assert "step-00000002" in said and "damaged" in said and path.name in said
        assert said.endswith("'step-00000001' is there: give load() its path")
        if path.name == "state.json":
            with pytest.raises(Error, match="damaged"):
                read_state(last)
        load_checkpoint(older, model, optimizer)
        assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())
        path.write_bytes(whole)
    assert load_checkpoint(last, model, optimizer) == {"step": 2, "note": "x"}


def test_flipped_bits_and_truncations_are_noticed_by_name(tmp_path):
    damages(tmp_path, 20)


@pytest.mark.slow
def test_three_hundred_flipped_bits_and_truncations_are_noticed_by_name(tmp_path):
    damages(tmp_path, 300)


def test_damage_of_what_a_run_does_not_read_is_noticed(tmp_path):
    model, optimizer = model_and_optimizer()
    with Checkpointer(tmp_path, model, optimizer, generators={"mine": torch.Generator()}) as checkpoints:
        checkpoints.save(1)
    path = tmp_path / "step-00000001"
    for index, info in FileSystemReader(path).read_metadata().storage_data.items():
        if index.fqn == "random.mine":
            file = path / info.relative_path
            whole = bytearray(file.read_bytes())
            whole[info.offset + info.length // 2] ^= 1
    file.write_bytes(whole)
    with pytest.raises(Error, match=r"damaged: 'random.mine' in '__0_0.distcp'"):
        load_checkpoint(path, model, optimizer)


def test_checkpoints_of_versions_without_checksums_are_loaded(tmp_path):
    model, optimizer = model_and_optimizer()
    path = save(tmp_path, 1, model, optimizer)
    (path / "checksums.json").unlink()
    with pytest.raises(Error, match=r"checksums.json is missing"):
        load_checkpoint(path, model, optimizer)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    del metadata.checksums
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    other, other_optimizer = model_and_optimizer(seed=1, steps=2)
    load_checkpoint(path, other, other_optimizer)
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in model.state_dict().items())


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
    assert files == [".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp", "checksums.json", "state.json"]


def local_sgd(rank: Rank, folder: Path) -> str:
    comm = rank.connect()
    model = DataParallel(nn.Linear(2, 2), comm, hook=local_sgd_hook, state=LocalSGDState(comm))
    with pytest.raises(InvalidArgument) as caught:
        Checkpointer(folder, model, model.optimizer(torch.optim.SGD, lr=0.1))
    return str(caught.value)


def test_models_that_differ_between_ranks_are_refused(tmp_path):
    for said in run_ranks(2, local_sgd, tmp_path):
        assert "under local SGD" in said
