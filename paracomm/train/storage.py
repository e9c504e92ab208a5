"""The format of torch.distributed.checkpoint, written and read by ranks that need no process group of torch's.

    .metadata        of every tensor its whole shape, and in which file at which place each box of it lies
    __0_0.distcp     what rank 0 wrote: boxes of tensors, and objects
    __1_0.distcp     what rank 1 wrote
    checksums.json   of every box, and of each other file, the CRC-32

torch's own planner and file system do the work; between its steps ranks exchange bytes, twice to save. What is saved
may be read by any tool of torch's, as format_utils' dcp_to_torch_save. Checksums are compared before a byte is taken
for a tensor, an object or a pickle: a rank compares those of what it reads, and the ranks share out the rest.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pickle
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

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

CHECKSUMS, METADATA = "checksums.json", ".metadata"
FULL = (errno.ENOSPC, errno.EDQUOT)
LITTLE = 1 << 16
"""Bytes; a disk that has no more is full."""
AT_ONCE = 1 << 24
"""Bytes that are read at once where they are only compared."""
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


# --- checksums ---
Sums = dict[str, list[tuple[int, int, int]]]
"""(offset, bytes, CRC-32) of all parts of each file."""


def _crc_of(file: IO[bytes], offset: int, count: int) -> tuple[int, int]:
    """(bytes that are there, their CRC-32)."""
    file.seek(offset)
    crc, left = 0, count
    while left and (data := file.read(min(left, AT_ONCE))):
        crc, left = zlib.crc32(data, crc), left - len(data)
    return count - left, crc


def _sums_of(folder: Path, parts: Iterable[tuple[str, int, int]]) -> Sums:
    """Of (file, offset, bytes)."""
    found: Sums = {}
    for name, offset, count in parts:
        with (folder / name).open("rb") as file:
            found.setdefault(name, []).append((offset, *_crc_of(file, offset, count)))
    return found


def _write_sums(folder: Path, sums: Sums) -> None:
    body = json.dumps(sums).encode()
    write_file(folder / CHECKSUMS, _crc_line(body) + body)


def _crc_line(body: bytes) -> bytes:
    return b"%08x\n" % zlib.crc32(body)


def _read_sums(folder: Path) -> Sums | None:
    """None: it was saved by a version that wrote none. Raises Error for damage."""
    try:
        blob = (folder / CHECKSUMS).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Error(f"checkpoint '{folder}': {CHECKSUMS} cannot be read: {error}") from error
    body = blob[len(_crc_line(b"")) :]
    if blob != _crc_line(body) + body:
        raise Error(f"checkpoint '{folder}' is damaged: {CHECKSUMS} does not have the checksum in its first line")
    sums: Sums = {name: [(a, b, c) for a, b, c in parts] for name, parts in json.loads(body).items()}
    return sums


def _expect_sum(what: str, expected: tuple[int, int] | None, found: tuple[int, int]) -> None:
    """Raises Error unless (bytes, CRC-32) are those that were saved."""
    if expected is None:
        raise Error(f"damaged: {CHECKSUMS} has no checksum of {what}")
    if found[0] != expected[0]:
        raise Error(f"damaged: {what} has {found[0]} bytes, expected {expected[0]}")
    if found[1] != expected[1]:
        raise Error(f"damaged: {what} has the checksum {found[1]:08x}, expected {expected[1]:08x}")


def read_file(folder: Path, name: str) -> bytes:
    """A whole file of a checkpoint. Raises Error if it is missing or damaged."""
    sums = _read_sums(folder)
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise Error(f"checkpoint '{folder}': {name} cannot be read: {error}") from error
    if sums is not None:
        try:
            _expect_sum(f"'{name}'", sums[name][0][1:] if sums.get(name) else None, (len(data), zlib.crc32(data)))
        except Error as error:
            raise Error(f"checkpoint '{folder}' is {error}") from None
    return data


def write_file(path: Path, data: bytes) -> None:
    """Writes and fsyncs it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def said_of(failure: BaseException, folder: Path) -> str:
    """An exception as one line, which says so where it comes of a full disk: torch's writer may hide that."""
    said = str(failure) if isinstance(failure, Error) else f"{type(failure).__name__}: {failure}"
    at = next((each for each in (folder, *folder.parents) if each.is_dir()), None)
    free = None if at is None else shutil.disk_usage(at).free
    chain: list[BaseException] = [failure]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    full = any(isinstance(each, OSError) and each.errno in FULL for each in chain)
    if full or (free is not None and free < LITTLE and not isinstance(failure, Error)):
        return f"no space is left on the disk of '{folder}' ({free} bytes are free): {said}"
    return said


# --- saving ---
class _SavePlanner(DefaultSavePlanner):
    """Writes `entries`; whatever several ranks offer, one of them writes."""

    def __init__(self, entries: Sequence[Entry], objects: Sequence[Where]) -> None:
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
) -> Callable[[Mapping[str, bytes]], None]:
    """Writes `entries` and `objects` of every rank into `folder`, each file fsynced. Collective.

    Returns what rank 0 calls last with other files to write, by name: it writes them, .metadata and the checksums. It
    raises Error if rank 0 does not see what others wrote.

    Args:
        merged: {path: (this rank's contribution, function)}; the object written is the function of all contributions.

    Raises Error on every rank if one of them fails.
    """
    planner = _SavePlanner(entries, [*objects, *(merged if ranks.rank == 0 else ())])
    writer = FileSystemWriter(folder)
    offered = (planner.create_local_plan(), {path: mine for path, (mine, _) in merged.items()})
    everyone = [pickle.loads(blob) for blob in ranks.exchange(pickle.dumps(offered))]
    results: list[Any] = []
    sums: Sums = {}
    error = None
    try:
        writer.set_up_storage_writer(ranks.rank == 0)
        # Every rank makes the plan of all by itself: it is the same, and need not be sent.
        plans, metadata = planner.create_global_plan([plan for plan, _ in everyone])
        plan = writer.prepare_global_plan(plans)[ranks.rank]
        planner.objects = {key_of(path): value for path, value in objects.items()}
        for path, (_, merge) in merged.items():
            planner.objects[key_of(path)] = merge([theirs[path] for _, theirs in everyone])
        results = writer.write_data(writer.prepare_local_plan(planner.finish_plan(plan)), planner).wait()
        places = [result.storage_data for result in results]
        sums = _sums_of(folder, ((place.relative_path, place.offset, place.length) for place in places))
    except Exception as failure:
        error = said_of(failure, folder)
    outcomes = [pickle.loads(blob) for blob in ranks.exchange(pickle.dumps((results, sums, error)))]
    raise_first([error for _, _, error in outcomes], f"'{folder}' is not written")

    def finish(others: Mapping[str, bytes]) -> None:
        everything = {name: parts for _, theirs, _ in outcomes for name, parts in theirs.items()}
        unseen = sorted(name for name in everything if not (folder / name).exists())
        if unseen:
            raise Error(f"rank 0 does not see {unseen[0]}, which another rank wrote: expected one folder for all")
        for name, data in others.items():
            write_file(folder / name, data)
        vars(metadata)["checksums"] = CHECKSUMS  # what says that the file has to be there
        writer.finish(metadata, [theirs for theirs, _, _ in outcomes])
        whole = [(name, 0, (folder / name).stat().st_size) for name in (METADATA, *others)]
        _write_sums(folder, everything | _sums_of(folder, whole))

    return finish


def raise_first(errors: Sequence[str | None], what: str, kind: type[Error] = Error) -> None:
    """Raises `kind` for the first rank that has one."""
    for rank, error in enumerate(errors):
        if error is not None:
            raise kind(f"{what}: rank {rank}: {error}")


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


class _Reader(FileSystemReader):
    """Compares the checksum of each stored part before it is read; sums None: there are none."""

    def __init__(self, folder: Path, sums: Sums | None) -> None:
        super().__init__(folder)
        self._folder = folder
        self._sums = None if sums is None else {
            (name, offset): (count, crc) for name, parts in sums.items() for offset, count, crc in parts
        }  # fmt: skip
        self._compared: set[tuple[str, int]] = set()
        self._last: tuple[tuple[str, int], bytes] | None = None

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        if self._sums is None:
            return super()._slice_file(file, sinfo)
        place = sinfo.relative_path, sinfo.offset
        if self._last is None or self._last[0] != place:
            file.seek(sinfo.offset)
            data = file.read(sinfo.length)
            self._compare(place, (len(data), zlib.crc32(data)))
            self._last = place, data
        return io.BytesIO(self._last[1])

    def _compare(self, place: tuple[str, int], found: tuple[int, int]) -> None:
        assert self._sums is not None
        if found != self._sums.get(place):
            name = next(
                index.fqn for index, info in self.storage_data.items() if (info.relative_path, info.offset) == place
            )
            _expect_sum(f"'{name}' in '{place[0]}' from byte {place[1]} on", self._sums.get(place), found)
        self._compared.add(place)

    def compare_rest(self, rank: int, world_size: int) -> None:
        """Of what this rank did not read, its share among `world_size` ranks."""
        self._last = None
        if self._sums is None:
            return
        infos = {(info.relative_path, info.offset): info for info in self.storage_data.values()}
        ends = {name: infos[name, offset].offset + infos[name, offset].length for name, offset in sorted(infos)}
        for number, place in enumerate(sorted(infos)):
            if number % world_size == rank and place not in self._compared:
                with (self._folder / place[0]).open("rb") as file:
                    self._compare(place, _crc_of(file, place[1], infos[place].length))
        for name, end in ends.items():
            size = (self._folder / name).stat().st_size
            if size != end:
                raise Error(f"damaged: '{name}' has {size} bytes, expected {end}")


class Saved:
    """A checkpoint on disk. Raises Error where it is missing, damaged, or of another model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sums = _read_sums(folder)
        if sums is not None:
            read_file(folder, METADATA)
        self._reader = _Reader(folder, sums)
        try:
            self._metadata: Metadata = self._reader.read_metadata()
            if sums is None and hasattr(self._metadata, "checksums"):
                raise Error(f"{CHECKSUMS} is missing")
            self._reader.set_up_storage_reader(self._metadata, False)
            paths: Mapping[str, Where] = self._metadata.planner_data
            self.values = {tuple(paths[key]): value for key, value in self._metadata.state_dict_metadata.items()}
            """By path, what torch knows of each tensor and object."""
        except Exception as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> Error:
        said = str(error) if isinstance(error, Error) else f"{type(error).__name__}: {error}"
        return Error(f"checkpoint '{self.folder}' does not load: {said}")

    def compare_rest(self, ranks: Ranks) -> None:
        """Compares the checksums of what was not read; every rank calls it after it has read."""
        try:
            self._reader.compare_rest(ranks.rank, ranks.world_size)
        except (OSError, Error) as error:
            raise self._broken(error) from error

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
