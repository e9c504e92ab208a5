"""Text as bytes, and batches that depend on seed, step and rank only.

The corpus is by default the text of the Python standard library's own sources, which every machine has. Some files are
held out whole, so that evaluation never sees a neighbour of what was trained on.

The global batch of a step is a function of (seed, step). Rank r of the n of dp takes rows [r * B/n, (r + 1) * B/n): all
together see what one process sees, and a resumed run goes on where it stopped with nothing to save but the step.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from paracomm.errors import InvalidArgument
from paracomm.parallel.loss import IGNORED

MAX_BYTES = 16 << 20
HELD_OUT_ONE_IN = 20
SEPARATOR = b"\n\n"
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "pydoc_data", "encodings"}
)
"""Of the standard library: what is not its own source, or is tables rather than text."""


@dataclass(frozen=True)
class Corpus:
    """`train` and `held_out` are uint8 [bytes]; `files` counts those in each; `digest` names the contents."""

    train: Tensor
    held_out: Tensor
    files: tuple[int, int]
    source: str
    digest: str

    def expect_context(self, context: int) -> None:
        """Raises InvalidArgument where there is no sequence to train on, or none to evaluate on."""
        for text, what in ((self.train, "to train on"), (self.held_out, "held out")):
            if len(text) <= context:
                raise InvalidArgument(
                    f"train: '{self.source}' has {len(text)} bytes {what}, expected more than the context of {context}"
                )

    def unigram_bits(self) -> float:
        """Bits a byte on the held-out text of a model that only knows how often each byte occurs in training."""
        counts = torch.bincount(self.train.long(), minlength=256).double() + 1
        held_out = torch.bincount(self.held_out.long(), minlength=256).double()
        bits = -(counts / counts.sum()).log2()
        return float((held_out * bits).sum() / held_out.sum())


def load_corpus(path: Path | None = None, max_bytes: int = MAX_BYTES) -> Corpus:
    """The standard library's sources, or the text under `path` (a file or a folder), at most `max_bytes` of it.

    Raises InvalidArgument if `path` does not exist, cannot be read, or holds too little text.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = _standard_library(root)
    elif path.is_dir():
        root = path
        files = sorted(file for file in root.rglob("*") if file.is_file())
    elif path.is_file():
        root, files = path.parent, [path]
    else:
        raise InvalidArgument(f"train: no file or folder at '{path}'")
    texts: dict[str, bytes] = {}
    skipped: list[str] = []
    room = max_bytes
    for file in files:
        if not room:
            break
        try:
            text = _text(file, room)
        except (OSError, InvalidArgument) as error:
            skipped.append(f"'{file}': {error.strerror if isinstance(error, OSError) else error}")
            continue
        if text:
            texts[file.relative_to(root).as_posix()] = text
            room -= len(text)
    if not texts and skipped:
        more = f", and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        raise InvalidArgument(f"train: there is no text in '{path or root}': {skipped[0]}{more}")
    return _corpus(*_split(texts), source=str(path or root))


def _split(texts: dict[str, bytes]) -> tuple[list[bytes], list[bytes]]:
    """One file in twenty is held out, whichever come first by the hash of their names; of a single file, its end."""
    if len(texts) == 1:
        (text,) = texts.values()
        cut = len(text) - len(text) // HELD_OUT_ONE_IN
        return [text[:cut]], [text[cut:]]
    by_hash = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    held_out = set(by_hash[: max(1, len(texts) // HELD_OUT_ONE_IN)])
    return (
        [text for name, text in texts.items() if name not in held_out],
        [text for name, text in texts.items() if name in held_out],
    )


def _standard_library(root: Path) -> list[Path]:
    return sorted(
        file
        for file in root.rglob("*.py")
        if SKIPPED_FOLDERS.isdisjoint(file.relative_to(root).parts) and file.is_file()
    )


def _text(file: Path, limit: int) -> bytes:
    """The file's first `limit` bytes. Raises InvalidArgument for what is not text."""
    with file.open("rb") as opened:
        data = opened.read(limit)
    if (place := data[:8192].find(b"\0")) >= 0:
        raise InvalidArgument(f"it is binary, byte {place} is 0")
    return data


def _corpus(train: list[bytes], held_out: list[bytes], source: str) -> Corpus:
    texts = SEPARATOR.join(train), SEPARATOR.join(held_out)
    if not all(texts):
        raise InvalidArgument(
            f"train: '{source}' has {len(texts[0])} bytes to train on, {len(texts[1])} held out, expected some of each"
        )
    digest = hashlib.sha256(b"%d %s%s" % (len(texts[0]), *texts)).hexdigest()
    tensors = [torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy()) for text in texts]
    return Corpus(tensors[0], tensors[1], (len(train), len(held_out)), source, digest)


def batch(
    text: Tensor, context: int, sequences: int, *, seed: int, step: int, rank: int = 0, world_size: int = 1
) -> tuple[Tensor, Tensor]:
    """This rank's inputs and targets, int64 [sequences / world_size, context], of the global batch of `step`.

    Raises InvalidArgument if the batch does not divide or the text is shorter than one sequence.
    """
    if sequences % world_size:
        raise InvalidArgument(f"train: a batch of {sequences} sequences does not divide by {world_size} ranks")
    _expect_length(text, context)
    starts = np.random.Generator(np.random.PCG64([seed, step])).integers(0, len(text) - context, size=sequences)
    share = sequences // world_size
    return _windows(text, context, starts[rank * share : (rank + 1) * share])


def evaluation_batches(
    text: Tensor, context: int, windows: int, sequences: int, *, rank: int = 0, world_size: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """This rank's part of up to `windows` windows spread evenly over `text`, in batches of at most `sequences`.

    Every rank has equally many windows; one that only fills up has targets of -100, which do not count.
    """
    _expect_length(text, context)
    last = len(text) - context - 1
    windows = min(windows, last // context + 1)
    starts = [math.floor(i * last / max(windows - 1, 1)) for i in range(windows)][rank::world_size]
    own, most = len(starts), -(-windows // world_size)
    inputs, targets = _windows(text, context, np.array(starts + [0] * (most - own)))
    targets[own:] = IGNORED
    return list(zip(inputs.split(sequences), targets.split(sequences), strict=True))


def _expect_length(text: Tensor, context: int) -> None:
    if len(text) <= context:
        raise InvalidArgument(f"train: {len(text)} bytes of text, expected more than the context of {context}")


def _windows(text: Tensor, context: int, starts: np.ndarray) -> tuple[Tensor, Tensor]:
    indices = torch.from_numpy(starts).view(-1, 1) + torch.arange(context + 1)
    window = text[indices].long()
    return window[:, :-1], window[:, 1:]
