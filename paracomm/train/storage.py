"""The format of torch.distributed.checkpoint, written and read by ranks that need no process group of torch's.

    .metadata        of every tensor its whole shape, and in which file at which place each box of it lies
    __0_0.distcp     what rank 0 wrote: boxes of tensors, and objects
    __1_0.distcp     what rank 1 wrote

torch's own planner and file system do the work; between its steps ranks exchange bytes, twice to save. What is saved
may be read by any tool of torch's, as format_utils' dcp_to_torch_save.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from paracomm.errors import Error
from paracomm.parallel.pieces import Piece

Where = tuple[str, ...]
"""Where a value lies in the nested dictionaries that torch's tools make of a checkpoint."""


class Ranks(Protocol):
    """What the ranks of a checkpoint talk through: a Communicator, say."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def exchange(self, blob: bytes) -> list[bytes]: ...

    def close(self) -> None: ...


class Alone:
    """One process by itself."""

    rank, world_size = 0, 1

    def exchange(self, blob: bytes) -> list[bytes]:
        return [blob]

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Entry:
    """A box of the tensor at `path`."""

    path: Where
    piece: Piece

    @property
    def key(self) -> str:
        return key_of(self.path)

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.key, self.piece.offsets)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.piece.offsets), self.piece.values.shape)

    def copied(self) -> Entry:
        """The same box, with memory of its own."""
        return replace(self, piece=replace(self.piece, values=self.piece.values.clone().contiguous()))


def key_of(path: Where) -> str:
    """As torch flattens nested dictionaries."""
    return ".".join(path)


# --- saving ---
class _SavePlanner(DefaultSavePlanner):
    """Writes `entries`; whatever several ranks offer, one of them writes."""

    def __init__(self, entries: Sequence[Entry], objects: Iterable[Where]) -> None:
        super().__init__()
        self.objects: dict[str, Any] = {}
        """By key; filled in before anything is written."""
        self._values = {entry.index: entry.piece.values for entry in entries}
        items = [_write_item(entry) for entry in entries]
        items += [WriteItem(MetadataIndex(key_of(path)), WriteItemType.BYTE_IO) for path in objects]
        paths = {key_of(path): path for path in [*objects, *(entry.path for entry in entries)]}
        self._local = SavePlan(items, planner_data=paths)

    def create_local_plan(self) -> SavePlan:
        return self._local

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type != WriteItemType.BYTE_IO:
            return self._values[replace(write_item.index, index=None)]
        stream = io.BytesIO()
        torch.save(self.objects[write_item.index.fqn], stream)
        return stream


def _write_item(entry: Entry) -> WriteItem:
    properties = TensorProperties(dtype=entry.piece.values.dtype)
    data = TensorWriteData(entry.chunk, properties, torch.Size(entry.piece.shape))
    return WriteItem(entry.index, WriteItemType.SHARD, tensor_data=data)


def write(
    folder: Path, entries: Sequence[Entry], objects: Mapping[Where, Any], ranks: Ranks, merged: Mapping[Where, Any]
) -> Callable[[], None]:
    """Writes `entries` of every rank and `objects` of rank 0 into `folder`, each file fsynced. Collective.

    Returns what rank 0 calls last, which writes .metadata. It raises Error if rank 0 does not see what others wrote.

    Args:
        merged: {path: (this rank's contribution, function)}; the object written is the function of all contributions.

    Raises Error on every rank if one of them fails.
    """
    shared = [*objects, *merged] if ranks.rank == 0 else []
    planner = _SavePlanner(entries, shared)
    writer = FileSystemWriter(folder)
    offered = (planner.create_local_plan(), {path: mine for path, (mine, _) in merged.items()})
    everyone = [pickle.loads(blob) for blob in ranks.exchange(pickle.dumps(offered))]
    results, error = [], None
    try:
        writer.set_up_storage_writer(ranks.rank == 0)
        # Every rank makes the plan of all by itself: it is the same, and need not be sent.
        plans, metadata = planner.create_global_plan([plan for plan, _ in everyone])
        plan = writer.prepare_global_plan(plans)[ranks.rank]
        planner.objects = {key_of(path): value for path, value in objects.items()}
        for path, (_, merge) in merged.items():
            planner.objects[key_of(path)] = merge([theirs[path] for _, theirs in everyone])
        results = writer.write_data(writer.prepare_local_plan(planner.finish_plan(plan)), planner).wait()
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    outcomes = [pickle.loads(blob) for blob in ranks.exchange(pickle.dumps((results, error)))]
    raise_first([error for _, error in outcomes], f"'{folder}' is not written")

    def finish() -> None:
        files = {result.storage_data.relative_path for theirs, _ in outcomes for result in theirs}
        unseen = sorted(name for name in files if not (folder / name).exists())
        if unseen:
            raise Error(f"rank 0 does not see {unseen[0]}, which another rank wrote: expected one folder for all")
        writer.finish(metadata, [theirs for theirs, _ in outcomes])

    return finish


def raise_first(errors: Sequence[str | None], what: str) -> None:
    """Raises Error for the first rank that has one."""
    for rank, error in enumerate(errors):
        if error is not None:
            raise Error(f"{what}: rank {rank}: {error}")


# --- loading ---
class _LoadPlanner(DefaultLoadPlanner):
    """Reads into memory that is there: item by item, the target's number stands where torch has its name."""

    def __init__(self, targets: Sequence[Tensor]) -> None:
        super().__init__()
        self.objects: dict[str, Any] = {}
        self._targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        found = self._targets[int(read_item.dest_index.fqn)]
        for dim, (offset, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            found = found.narrow(dim, offset, size)
        return found

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.objects[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


class Saved:
    """A checkpoint on disk. Raises Error where it is missing, damaged, or of another model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            self._metadata: Metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, False)
            paths: Mapping[str, Where] = self._metadata.planner_data
            self.values = {tuple(paths[key]): value for key, value in self._metadata.state_dict_metadata.items()}
            """By path, what torch knows of each tensor and object."""
        except Exception as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> Error:
        return Error(f"checkpoint '{self.folder}' does not load: {type(error).__name__}: {error}")

    def below(self, *prefix: str) -> dict[Where, Any]:
        """{the rest of the path: what torch knows} of all that begins with `prefix`."""
        depth = len(prefix)
        return {path[depth:]: value for path, value in self.values.items() if path[:depth] == prefix}

    def objects(self, paths: Iterable[Where]) -> dict[Where, Any]:
        """Those of `paths` that are there."""
        wanted = {key_of(path): path for path in paths if isinstance(self.values.get(path), BytesStorageMetadata)}
        nothing = torch.Size([])
        items = [
            ReadItem(LoadItemType.BYTE_IO, MetadataIndex(key), nothing, MetadataIndex(key), nothing, nothing)
            for key in wanted
        ]
        planner = self._read(items, [])
        return {wanted[key]: value for key, value in planner.objects.items()}

    @torch.no_grad()
    def read(self, entries: Sequence[Entry]) -> None:
        """Fills the memory of `entries`. Everything is looked up before the first byte is read."""
        items: list[ReadItem] = []
        for number, entry in enumerate(entries):
            found = create_read_items_for_chunk_list(entry.key, self._expected(entry), [entry.chunk])
            there = sum(math.prod(item.lengths) for item in found)
            if there != entry.piece.values.numel():
                raise Error(
                    f"checkpoint '{self.folder}': of {list(entry.chunk.sizes)} from {list(entry.chunk.offsets)} of "
                    f"'{entry.key}' {there} elements are there"
                )
            items += [replace(item, dest_index=MetadataIndex(str(number))) for item in found]
        self._read(items, [entry.piece.values for entry in entries])

    def _expected(self, entry: Entry) -> TensorStorageMetadata:
        found = self.values.get(entry.path)
        values = entry.piece.values
        if not isinstance(found, TensorStorageMetadata):
            raise Error(f"checkpoint '{self.folder}' is of another model: it has no '{entry.key}'")
        if tuple(found.size) != entry.piece.shape or found.properties.dtype != values.dtype:
            raise Error(
                f"checkpoint '{self.folder}' is of another model: '{entry.key}' is {found.properties.dtype} "
                f"{list(found.size)}, expected {values.dtype} {list(entry.piece.shape)}"
            )
        return found

    def _read(self, items: list[ReadItem], targets: Sequence[Tensor]) -> _LoadPlanner:
        planner = _LoadPlanner(targets)
        try:
            self._reader.read_data(LoadPlan(items), planner).wait()
        except Exception as error:
            raise self._broken(error) from error
        return planner
