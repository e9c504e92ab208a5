"""Checkpoints that any layout loads, that training need not wait for, and that are whole or not there.

A checkpoint is a folder `step-00000200` in the format of torch.distributed.checkpoint, and a state.json. Every rank
writes what it owns, and reads what it will own: nothing is gathered, and no layout is in it (contents.py says what is).
It is written beside under a temporary name, every file and the folder are fsynced, and one rename makes it visible; a
process that dies before leaves the last whole checkpoint as it was.

    main thread         | step | save: copy | step | step | step | save: wait, copy | ...
    its own thread                          [ plans, write, fsync, rename ]

Batches, dropout and everything else that is random in `paracomm train` are functions of (seed, step, place in the
batch): the step is the random state and the position in the data. A program with generators of its own gives them.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from paracomm.comm.agreement import read_for_all
from paracomm.errors import Error, InvalidArgument
from paracomm.train import contents, owed, storage
from paracomm.train.storage import Alone, Entry, Ranks, Saved, raise_first

NAME = re.compile(r"step-(\d{8,})(~?)")
"""~: a checkpoint of the same step is about to take its place."""
KEPT = 2
STATE = "state.json"
HIDDEN = (".saving-*", ".dropped-*", ".probing-*")


class Checkpointer:
    """Saves and loads a model, its optimizer, what its hook owes and what the caller adds. Collective throughout.

        model = layout.spread(model, mesh)
        optimizer = model.optimizer(torch.optim.AdamW, lr=1e-3)
        with Checkpointer(folder, model, optimizer) as checkpoints:
            first = checkpoints.load()["step"] if list_checkpoints(folder) else 0
            for step in range(first, steps):
                ...
                if step % 100 == 99:
                    checkpoints.save(step + 1, {"epoch": epoch})

    Args:
        folder: one that all ranks see. The last two checkpoints stay there.
        replica: a DataParallel, or anything that has such as `parts`; or, with a torch optimizer of its own, a module
            that all ranks hold whole, in torch's DistributedDataParallel or not.
        ranks: what all ranks talk through from another thread, closed at the end; None: a communicator of its own
            beside the replica's, or, for a module, this process by itself.
        generators: torch's, by name, whose states are saved for each rank.
        saves: whether save() will be called: the folder is made and tried now, not after hours of training.

    Raises InvalidArgument for what has no one model: local SGD; and, on every rank, for a folder into which one of them
    cannot write, or that is not the same for all.
    """

    def __init__(
        self,
        folder: str | Path,
        replica: Any,
        optimizer: torch.optim.Optimizer,
        *,
        ranks: Ranks | None = None,
        generators: Mapping[str, torch.Generator] | None = None,
        saves: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self._replica, self._optimizer = replica, optimizer
        self._generators = dict(generators or {})
        self.ranks: Ranks = _ranks_beside(replica) if ranks is None else ranks
        self._parts = contents.parts_of(replica, self.ranks)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        if saves:
            try:
                self._probe()
            except BaseException:
                self.ranks.close()
                raise

    # --- saving ---
    def save(self, step: int, state: Mapping[str, Any] | None = None) -> None:
        """Copies what this rank writes and returns; a thread writes it. A save before this one is waited for.

        `state` is anything that JSON takes, rank 0's. Call it between steps. Raises Error for what the save before
        failed with.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise InvalidArgument(f"checkpoint: step is {step!r}, expected a whole number, at least 0")
        self.wait()
        entries, objects, merged = self._copies()
        described = json.dumps({"step": step, **(state or {})}, indent=1)
        # Not a daemon: the interpreter waits at its end until the last checkpoint is there.
        self._thread = threading.Thread(
            target=self._run, args=(step, entries, objects, merged, described), name="paracomm checkpoint"
        )
        self._thread.start()

    @torch.no_grad()
    def _copies(self) -> tuple[list[Entry], dict[storage.Where, Any], dict[storage.Where, Any]]:
        """What this rank writes: boxes of tensors, objects, and its share of objects that are made of all ranks'."""
        entries = [entry.copied() for part in self._parts for entry in contents.weights_of(part, True)]
        entries += [entry.copied() for part in self._parts for entry in contents.states_of(part, self._optimizer, True)]
        entries += [entry for part in self._parts for entry in owed.hooks_of(part)]
        entries += owed.random_of(self._generators, self.ranks)
        hook = {key: value for part in self._parts for key, value in owed.described(part).items()}
        objects: dict[storage.Where, Any] = {(*owed.HOOK, "state"): hook} if hook and self.ranks.rank == 0 else {}
        numbers: set[str] = set()
        for part in self._parts:
            values, keys = contents.values_of(part, self._optimizer)
            objects |= values
            numbers |= set(keys)
        groups = copy.deepcopy(contents.groups_of(self._parts, self._optimizer))
        merged: dict[storage.Where, Any] = {
            contents.GROUPS: (groups, contents.merge_groups),
            contents.NUMBERS: (sorted(numbers), lambda everyone: sorted(set().union(*everyone))),
        }
        return entries, objects, merged

    def _run(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:
            self._failure = error

    def _write(
        self,
        step: int,
        entries: list[Entry],
        objects: dict[storage.Where, Any],
        merged: dict[storage.Where, Any],
        described: str,
    ) -> None:
        whole = self.folder / f"step-{step:08d}"
        part = self.folder / f".saving-{whole.name}"
        leads, not_written = self.ranks.rank == 0, f"'{part}' is not written"

        def publish() -> None:
            finish({STATE: described.encode()})
            _publish(part, whole)

        raise_first(self._errors((lambda: _make_room(self.folder, part)) if leads else None), not_written)
        try:
            finish = storage.write(part, entries, objects, self.ranks, merged)
            raise_first(self._errors(publish if leads else None), not_written)
        except Error:
            if leads:  # it may be what fills the disk; where that fails too, the next save begins with it
                shutil.rmtree(part, ignore_errors=True)
            raise

    def _errors(self, job: Callable[[], None] | None) -> list[str | None]:
        """Runs `job`; what it raised on each rank. Collective."""
        error = None
        try:
            if job is not None:
                job()
        except Exception as failure:
            error = storage.said_of(failure, self.folder)
        return [pickle.loads(blob) for blob in self.ranks.exchange(pickle.dumps(error))]

    def _probe(self) -> None:
        """Raises InvalidArgument on every rank unless all of them can write into one folder that rank 0 sees."""
        names = [f".probing-{rank}" for rank in range(self.ranks.world_size)]
        mine, leads = self.folder / names[self.ranks.rank], self.ranks.rank == 0
        no_folder = f"checkpoint: nothing can be saved in '{self.folder}'"

        def see() -> None:
            unseen = [rank for rank, name in enumerate(names) if not (self.folder / name).exists()]
            if unseen:
                raise Error(f"it does not see what rank {unseen[0]} writes there: expected one folder for all")

        raise_first(
            self._errors((lambda: self.folder.mkdir(parents=True, exist_ok=True)) if leads else None),
            no_folder,
            InvalidArgument,
        )
        try:
            errors = self._errors(lambda: storage.write_file(mine, bytes(storage.LITTLE)))
            if any(errors):  # what a run that died left there may be what fills the disk
                raise_first(
                    self._errors((lambda: _give_up(self.folder)) if leads else None), no_folder, InvalidArgument
                )
                errors = self._errors(lambda: storage.write_file(mine, bytes(storage.LITTLE)))
            raise_first(errors, no_folder, InvalidArgument)
            raise_first(self._errors(see if leads else None), no_folder, InvalidArgument)
        finally:
            if mine.exists():
                mine.unlink()

    def wait(self) -> None:
        """Returns when everything is on disk. Raises Error for what a save failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    # --- loading ---
    def load(self, path: str | Path | None = None) -> dict[str, Any]:
        """Puts a checkpoint, None: rank 0's last of the folder, into model, optimizer, hook and generators.

        Returns state.json: "step" and what save() was given. Raises Error on every rank if there is none, if it is
        damaged, or of another model: the replica may then hold a part of it. Raises InvalidArgument for other groups.
        """
        self.wait()

        def last() -> list[str]:
            return [str(found) for found in list_checkpoints(self.folder)[-1:]] if path is None else [str(path)]

        chosen = read_for_all(self.ranks.rank, self.ranks.exchange, last)
        if not chosen:
            raise Error(f"checkpoint: there is none in '{self.folder}'")
        error: Exception | None = None
        names, state = contents.names_of(self._parts), {}
        try:
            state = read_state(Path(chosen[0]))
            saved = Saved(Path(chosen[0]))
            theirs = {name for (name,) in saved.below(*contents.MODEL)}
            self._load(saved)
            saved.compare_rest(self.ranks)
        except Exception as failure:
            error, theirs = failure, set()
            if (before := _before(Path(chosen[0]))) is not None and "damaged" in str(failure):
                error = Error(f"{failure}; '{before.name}' is there: give load() its path")
        said = pickle.dumps((names, theirs, None if error is None else f"{type(error).__name__}: {error}"))
        everyone = [pickle.loads(blob) for blob in self.ranks.exchange(said)]
        if error is not None:
            raise error
        raise_first([failure for _, _, failure in everyone], f"checkpoint '{chosen[0]}' does not load")
        extra = sorted(everyone[0][1] - set().union(*(known for known, _, _ in everyone)))
        if extra:
            raise Error(f"checkpoint '{chosen[0]}' is of another model: there is no '{extra[0]}' here")
        for each in self._parts:
            if each.spread is not None:
                each.spread.publish()
        return state

    @torch.no_grad()
    def _load(self, saved: Saved) -> None:
        where = (*owed.HOOK, "state")
        objects = saved.objects([contents.GROUPS, contents.NUMBERS, where])
        contents.load_groups(self._parts, self._optimizer, objects.get(contents.GROUPS, []))
        entries: list[Entry] = []
        for part in self._parts:
            entries += contents.weights_of(part, False)
            contents.make_states(part, self._optimizer, saved, objects.get(contents.NUMBERS))
            entries += contents.states_of(part, self._optimizer, False)
        saved.read(entries)
        for part in self._parts:
            owed.load_hooks(part, saved, objects.get(where, {}))
        owed.load_random(self._generators, self.ranks, saved)

    # --- the end ---
    def close(self) -> None:
        """Waits as wait() does, and closes `ranks`. Calling it again does nothing."""
        try:
            self.wait()
        finally:
            self.ranks.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except Exception:
            if error is None:  # else it most likely follows from the error
                raise


def _ranks_beside(replica: Any) -> Ranks:
    parts = contents.spread_parts(replica)
    if not parts:
        return Alone()
    everyone = parts[0].everyone
    if not hasattr(everyone, "exchange"):
        raise InvalidArgument(
            f"checkpoint: the ranks talk through a {type(everyone).__name__}; give `ranks`, which has an exchange()"
        )
    twin: Ranks = everyone.split(0)
    return twin


def load_checkpoint(path: str | Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts any layout's checkpoint into a model of one process and torch's own optimizer of it; returns state.json.

    Raises as Checkpointer.load().
    """
    with Checkpointer(Path(path).parent, model, optimizer, ranks=Alone(), saves=False) as one:
        return one.load(path)


# --- folders ---
def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), reverse=True):  # step-1~ before step-1
        match = NAME.fullmatch(path.name)
        if match is not None:
            found[match[1]] = path
    return [found[step] for step in sorted(found, key=int)]


def _before(path: Path) -> Path | None:
    """The checkpoint before the one at `path`."""
    here = list_checkpoints(path.parent)
    return here[here.index(path) - 1] if path in here[1:] else None


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint: "step" and what save() was given. Raises Error if it cannot be read or is damaged."""
    try:
        state: dict[str, Any] = json.loads(storage.read_file(path, STATE))
    except ValueError as error:
        raise Error(f"checkpoint '{path}': {STATE} cannot be read: {error}") from error
    return state


def _make_room(folder: Path, part: Path) -> None:
    """An empty folder to write into, and no trace of what was given up."""
    folder.mkdir(parents=True, exist_ok=True)
    _give_up(folder)
    part.mkdir()


def _give_up(folder: Path) -> None:
    """Removes what saves and drops left that were not completed."""
    for stale in (path for pattern in HIDDEN for path in folder.glob(pattern)):
        if stale.is_dir():
            shutil.rmtree(stale)
        else:
            stale.unlink()


def _publish(part: Path, whole: Path) -> None:
    """Makes what all ranks have written the checkpoint `whole`, and drops all but the last two."""
    _sync_folder(part)
    before = whole.with_name(f"{whole.name}~")
    if whole.exists():
        _drop(before)
        whole.rename(before)
    part.rename(whole)
    _sync_folder(whole.parent)
    _drop(before)
    others = [path for path in list_checkpoints(whole.parent) if path != whole]
    for old in others[: max(0, len(others) - KEPT + 1)]:
        _drop(old)


def _drop(path: Path) -> None:
    """Out of sight first: what is half removed is no checkpoint."""
    if path.exists():
        hidden = path.with_name(f".dropped-{path.name}")
        path.rename(hidden)
        shutil.rmtree(hidden)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
