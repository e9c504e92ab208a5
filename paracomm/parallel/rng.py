"""Dropout and initial weights as functions of (seed, step, layer, global element): the same bits in every layout.

There is no generator whose state ranks would have to share. `Place` says which part of the global batch this rank
computes on, and at which step; a layer asks for the numbers of its elements by their place in the whole.

    with rng.at(Place(seed, step, rows, positions)):
        loss = model(tokens)            # backward needs no Place: what is recomputed there remembers its own

Shapes: B samples and T positions of this rank, D features.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from paracomm import kernels
from paracomm.comm import random
from paracomm.errors import Error, InvalidArgument
from paracomm.kernels import reference
from paracomm.kernels.select import transformed

POSITIONS = 1 << 24
"""More positions than any sequence has: element (row, position, d) is number (row * POSITIONS + position) * D + d."""

INITIAL_STEP = (1 << 32) - 1
"""The step of initial weights, which no training step reaches."""


@dataclass(frozen=True)
class Place:
    """What this rank computes on.

    seed: of the run, 64 bits. step: the optimizer's, below 2^32 - 1.
    rows: int64 [B], the samples' numbers in the GLOBAL batch of the step, accumulation included.
    positions: int64 [T], where in the whole sequences this rank's part lies.
    source_positions: the same for an encoder's sequences; None: as `positions`.

    The tensors lie on the CPU, where looking at them waits for no GPU; `on()` gives them elsewhere.
    """

    seed: int
    step: int
    rows: Tensor
    positions: Tensor
    source_positions: Tensor | None = None
    _copies: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not 0 <= self.step < INITIAL_STEP:
            raise InvalidArgument(f"Place: step is {self.step}, expected 0 <= step < 2^32 - 1")
        for name in ("rows", "positions", "source_positions"):
            found = getattr(self, name)
            if found is None:
                continue
            if found.dtype != torch.int64 or found.dim() != 1:
                raise InvalidArgument(f"Place: {name} is {found.dtype} {tuple(found.shape)}, expected int64 [n]")
            if found.device.type != "cpu":
                raise InvalidArgument(f"Place: {name} is on {found.device}, expected the CPU")

    @functools.cached_property
    def rises(self) -> bool:
        """Whether each position is above the one before it."""
        return bool((self.positions.diff() > 0).all())

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(rows, positions) on `device`, sent there once."""
        if device.type == "cpu":
            return self.rows, self.positions
        if device not in self._copies:
            rows, positions = (x.to(device, non_blocking=True) for x in (self.rows, self.positions))
            self._copies[device] = rows, positions
        return self._copies[device]


_place: ContextVar[Place | None] = ContextVar("place", default=None)


@contextmanager
def at(place: Place | None) -> Iterator[None]:
    """Inside, `current()` is `place`."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


def placed() -> Place | None:
    """The Place set by the innermost `at`, None outside of any."""
    return _place.get()


def current() -> Place:
    """The Place set by the innermost `at`; raises Error outside of any."""
    place = _place.get()
    if place is None:
        raise Error("rng: dropout needs to know which samples and positions these are; wrap the step in rng.at(Place)")
    return place


def positions(length: int, device: torch.device | None = None, part: tuple[int, int] = (0, 1)) -> Tensor:
    """int64 [length]: where the elements of this rank's sequence lie, by the current Place, from 0 on if there is none.

    `part` = (index, parts) where the sequence that Place describes is sharded further. Raises InvalidArgument if Place
    speaks of another length.
    """
    place, (index, parts) = _place.get(), part
    if place is None:
        return torch.arange(index * length, (index + 1) * length, device=device)
    whole = place.positions if device is None else place.on(torch.device(device))[1]
    found = whole if parts == 1 else whole.tensor_split(parts)[index]
    if len(found) != length:
        raise InvalidArgument(
            f"rng: a sequence of {length}, but part {index} of {parts} of Place.positions has {len(found)}"
        )
    return found


def threshold(p: float) -> int:
    """Words below it are dropped: p in units of 2^-32."""
    if not 0.0 <= p < 1.0:
        raise InvalidArgument(f"dropout is {p}, expected 0 <= p < 1")
    return reference.threshold(p)


def keep_mask(stream: int, base: Tensor, offsets: Tensor, p: float, place: Place | None = None) -> Tensor:
    """bool [..., J]: which of the elements base[..., None] + offsets stay, each with probability 1 - p.

    A function of the place's seed and step, the stream and the element's number only; place None: current().
    base: int64 [...]; offsets: int64 [J], fastest in runs that count up by one, on one device, where the mask is drawn.
    Numbers are taken modulo 2^64.
    """
    place, words = place or current(), threshold(p)
    if base.device.type != "cpu" or kernels.current() == "triton" or transformed():
        return kernels.keep_mask(place.seed, stream, place.step, base, offsets, p)
    mask = torch.empty(*base.shape, len(offsets), dtype=torch.bool)
    if mask.numel():
        random.keep_mask(place.seed, stream, place.step, base.contiguous(), offsets.contiguous(), words, mask)
    return mask


class Dropout(nn.Module):
    """Dropout of x [B, T, D] that is the same in every layout: an element's fate follows from its place in the whole.

    Nothing is kept for backward but the place, from which the mask is drawn again. In eval mode, or with p = 0, x
    passes unchanged and no Place is needed. A plan sets `sequence_part` = (index, parts) where T is a share of the
    place's positions, and `feature_part` = (offset, total) where D is a share of `total` features.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        threshold(p)
        self.p = p
        self.stream: int | None = None
        self.sequence_part = (0, 1)
        self.feature_part: tuple[int, int] | None = None

    def extra_repr(self) -> str:
        return f"p={self.p}"

    @property
    def drops(self) -> bool:
        return self.training and self.p > 0

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Raises Error without a Place or a stream, InvalidArgument if x is not of the place's rows and positions."""
        if not self.drops:
            return x_BTD
        mask = _Mask(self, x_BTD)
        if transformed():
            return x_BTD * mask.draw() * (1 / (1 - mask.p))
        kept: Tensor = _Masked.apply(x_BTD, mask)
        return kept


class _Mask:
    """What it takes to draw one mask: a few integers and the numbers of rows and positions."""

    def __init__(self, layer: Dropout, x_BTD: Tensor) -> None:
        if layer.stream is None:
            raise Error("Dropout: it has no stream; call rng.name_streams(model) once the model is built")
        self.place, self.stream, self.p = current(), layer.stream, layer.p
        B, T, D = x_BTD.shape
        if len(self.place.rows) != B:
            raise InvalidArgument(f"Dropout: {B} samples, but Place.rows has {len(self.place.rows)}")
        self.positions_T = positions(T, x_BTD.device, layer.sequence_part)
        self.features = D
        self.offset, self.total = layer.feature_part or (0, D)

    def draw(self) -> Tensor:
        device = self.positions_T.device
        rows_B1 = self.place.on(device)[0][:, None]
        base_BT = (rows_B1 * POSITIONS + self.positions_T) * self.total + self.offset
        return keep_mask(self.stream, base_BT, torch.arange(self.features, device=device), self.p, self.place)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: _Mask) -> Tensor:
        ctx.mask = mask
        return (x * mask.draw()).mul_(1 / (1 - mask.p))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Masked.apply(gradient, ctx.mask), None


def stream_of(name: str) -> int:
    """32 bits that stand for a layer or a parameter, by its qualified name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def name_streams(model: nn.Module) -> None:
    """Gives every module with an attribute `stream` (dropout, attention) the one of its qualified name.

    Do it before a plan or a wrapper changes names. Raises InvalidArgument where two names hash alike.
    """
    taken: dict[int, str] = {}
    for name, module in model.named_modules():
        if hasattr(module, "stream"):
            stream = stream_of(name)
            if stream in taken:
                raise InvalidArgument(f"rng: modules '{taken[stream]}' and '{name}' hash alike; rename one")
            taken[stream] = name
            module.stream = stream


def normal(seed: int, name: str, shape: Sequence[int], std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """Initial weights of the parameter `name`, normal with mean 0: a function of seed, name and element only.

    Drawn and scaled in float64, then rounded to `dtype` (torch's default if None). A shard is a slice of it.
    """
    drawn = torch.empty(math.prod(shape), dtype=torch.float64)
    if len(drawn):
        random.fill_normal(seed, stream_of(name), INITIAL_STEP, 0, drawn)
    return drawn.mul_(std).view(*shape).to(dtype or torch.get_default_dtype())
