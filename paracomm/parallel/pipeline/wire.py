"""What goes from stage to stage: activations onwards, their gradients back, each way between two stages in order.

A sender goes on at once. A receiver asks for the next message of a way as soon as it has taken one, so that it moves
meanwhile. The first activations of a step are preceded by their forms, which hold for the whole step. Stages of one
rank hand over what they have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paracomm import timeline
from paracomm.comm import Communicator
from paracomm.errors import InvalidArgument

TENSORS, DIMS = 8, 8
"""The most that a stage gives, and of each the most dimensions."""
_DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip


class Form(NamedTuple):
    """Of a tensor: what a receiver has to know."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    requires_grad: bool

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def form_of(x: Tensor) -> Form:
    return Form(x.dtype, tuple(x.shape), x.requires_grad)


class Way:
    """Messages from one stage to its neighbour within a step, `count` of them.

    comm, peer: the communicator of the stages' ranks, and the other one in it; peer None: both stages are on this rank.
    forms: of the tensors of a message, where both sides know them.
    """

    def __init__(
        self, name: str, comm: Communicator, peer: int | None, tag: int, count: int, forms: Sequence[Form] | None = None
    ) -> None:
        self.forms = None if forms is None else list(forms)
        self._name, self._comm, self._peer, self._tag = name, comm, peer, tag
        self._left = count
        self._asked: tuple[list[Tensor], list[Any]] | None = None
        self._handed: deque[list[Tensor]] = deque()

    def give(self, tensors: Sequence[Tensor], sent: list[Any]) -> None:
        """Starts to send; `sent` gets what has to be waited for before the step ends.

        Raises InvalidArgument for forms that are not those of the step's first message, or that cannot be described.
        """
        forms = [form_of(x) for x in tensors]
        if self.forms is None:
            self.forms = forms
            if self._peer is not None:
                sent.append(self._send(_described(forms, self._name)))
        elif forms != self.forms:
            raise InvalidArgument(
                f"pipeline: {self._name} are {_shown(forms)} for this microbatch, and were {_shown(self.forms)} for "
                "the first one of the step; expected microbatches of one shape"
            )
        if self._peer is None:
            self._handed.append([x.detach().requires_grad_(x.requires_grad) for x in tensors])
        else:
            sent.extend(self._send(x.detach().contiguous()) for x in tensors)

    def take(self) -> list[Tensor]:
        """The next message, as leaves that require a gradient where the sender's tensors do."""
        if self._peer is None:
            return self._handed.popleft()
        with timeline.span("bubble", self._name):
            if self.forms is None:
                self.forms = _read(self._comm.recv(torch.empty(_WORDS, dtype=torch.int64), self._peer, tag=self._tag))
            self.ask()
            assert self._asked is not None
            room, works = self._asked
            for work in works:
                work.wait()
        self._asked = None
        self.ask()
        return [x.requires_grad_(form.requires_grad) for x, form in zip(room, self.forms, strict=True)]

    def ask(self) -> None:
        """Makes room for the next message, if there is one and its forms are known."""
        if self._peer is None or self.forms is None or self._asked is not None or not self._left:
            return
        self._left -= 1
        room = [torch.empty(form.shape, dtype=form.dtype) for form in self.forms]
        self._asked = room, [self._comm.recv(x, self._peer, tag=self._tag, async_op=True) for x in room]

    def _send(self, x: Tensor) -> Any:
        assert self._peer is not None
        return self._comm.send(x, self._peer, tag=self._tag, async_op=True)


_WORDS = 1 + TENSORS * (3 + DIMS)


def _described(forms: Sequence[Form], name: str) -> Tensor:
    if len(forms) > TENSORS or any(len(form.shape) > DIMS or form.dtype not in _DTYPES for form in forms):
        raise InvalidArgument(
            f"pipeline: {name} are {_shown(forms)}, expected at most {TENSORS} tensors of at most {DIMS} dimensions, "
            f"of a dtype among {', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPES)}"
        )
    words = torch.zeros(_WORDS, dtype=torch.int64)
    words[0] = len(forms)
    for row, form in zip(words[1:].view(TENSORS, -1), forms, strict=False):
        described = [_DTYPES.index(form.dtype), form.requires_grad, len(form.shape), *form.shape]
        row[: len(described)] = torch.tensor(described)
    return words


def _read(words: Tensor) -> list[Form]:
    rows = words[1:].view(TENSORS, -1).tolist()[: int(words[0])]
    return [
        Form(_DTYPES[dtype], tuple(shape[:dims]), bool(requires_grad)) for dtype, requires_grad, dims, *shape in rows
    ]


def _shown(forms: Sequence[Form]) -> str:
    return ", ".join(map(str, forms)) or "nothing"
