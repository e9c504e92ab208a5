"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-00000200` with model.safetensors, optimizer.pt and state.json. It is written beside under
a temporary name, every file and the folder are fsynced, and one rename makes it visible; a process that dies before
leaves the last whole checkpoint as it was. Data order and dropout are functions of (seed, step, place in the batch), so
the step is all that has to be kept of them. Weights and states are whole: any layout loads what any other saved.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save
from torch import Tensor, nn

from paracomm.errors import Error

NAME = re.compile(r"step-(\d{8})")
KEPT = 2


def save_checkpoint(
    folder: Path, step: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any], state: dict[str, Any]
) -> Path:
    """Writes the checkpoint of `step` into `folder`, drops all but the last two, and returns its path.

    One process calls it, with what whole_state() gives. `state` is anything that JSON takes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".saving-*"):
        shutil.rmtree(stale)
    whole = folder / f"step-{step:08d}"
    part = folder / f".saving-{whole.name}"
    part.mkdir()
    _write(part / "model.safetensors", save({name: tensor.contiguous() for name, tensor in weights.items()}))
    with (part / "optimizer.pt").open("wb") as file:
        torch.save(optimizer, file)
        _sync(file.fileno(), file)
    _write(part / "state.json", json.dumps({"step": step, **state}, indent=1).encode())
    _sync_folder(part)
    if whole.exists():
        shutil.rmtree(whole)
    part.rename(whole)
    _sync_folder(folder)
    for old in list_checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)
    return whole


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint: "step" and what save_checkpoint was given. Raises Error if it cannot be read."""
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise Error(f"checkpoint '{path}': state.json cannot be read: {error}") from error
    return state


def load_checkpoint(path: Path, model: nn.Module) -> dict[str, Any]:
    """Puts the weights into `model`, whole as it is, and returns the optimizer's state.

    Raises Error if a file is missing, damaged, or of another model.
    """
    try:
        load_model(model, path / "model.safetensors")  # under all names of a tied weight
        optimizer: dict[str, Any] = torch.load(path / "optimizer.pt", weights_only=True)
    except Exception as error:
        raise Error(f"checkpoint '{path}' does not load: {error}") from error
    return optimizer


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        _sync(file.fileno(), file)


def _sync(descriptor: int, file: Any) -> None:
    file.flush()
    os.fsync(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
