"""Sends and receives with tags, from any source, and to oneself."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import torch

from paracomm.backend.work import Past, Work
from paracomm.comm import Communicator
from paracomm.comm.arguments import rank_of
from paracomm.comm.arrays import assign, known, native, view, writable_view
from paracomm.errors import InvalidArgument, Timeout

# Tags of torch's callers are not negative.
EXCHANGE_TAG = -1


class PointToPoint:
    """What of a process group concerns two ranks."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._to_self = _ToSelf(comm.rank)

    def send(self, tensor: torch.Tensor, dst: int, tag: int, timeout_s: float | None) -> Work:
        dst = rank_of("send: dst", dst, self._comm.world_size)
        return Work([self._send(tensor.detach(), dst, tag, timeout_s)], [tensor])

    def recv(self, tensor: torch.Tensor, src: int | None, tag: int, timeout_s: float | None) -> Work:
        src = None if src is None else rank_of("recv: src", src, self._comm.world_size)
        return Work([self._recv(tensor.detach(), src, tag, timeout_s)], [tensor])

    def exchange(
        self, what: str, recvs: Sequence[torch.Tensor], sends: Sequence[torch.Tensor], timeout_s: float | None
    ) -> list[Any]:
        """Sends sends[r] to rank r and receives recvs[r] from it; tensors of any length, 0 too, of one dtype.

        Raises:
            InvalidArgument: a tensor cannot be sent or received, or this rank sends itself another length than it
                expects.
        """
        own, recvs, sends = self._comm.rank, [native(tensor) for tensor in recvs], [native(tensor) for tensor in sends]
        for tensor in recvs:
            writable_view(what, tensor)
        for tensor in sends:
            view(known(tensor))
        if sends[own].numel() != recvs[own].numel():
            raise InvalidArgument(
                f"{what}: rank {own} sends itself {sends[own].numel()} elements and expects {recvs[own].numel()}"
            )
        begin, end = min(map(_begin, recvs)), max(map(_end, recvs))
        # What is received must not take the place of what is yet to be sent.
        sends = [each.clone() if _begin(each) < end and begin < _end(each) else each for each in sends]
        parts = []
        for shift in range(1, self._comm.world_size):
            peer = (own + shift) % self._comm.world_size
            if sends[peer].numel():
                parts.append(self._send(sends[peer], peer, EXCHANGE_TAG, timeout_s))
            peer = (own - shift) % self._comm.world_size
            if recvs[peer].numel():
                parts.append(self._recv(recvs[peer], peer, EXCHANGE_TAG, timeout_s))
        assign(recvs[own], sends[own].reshape(recvs[own].shape))
        return parts

    def _send(self, tensor: torch.Tensor, dst: int, tag: int, timeout_s: float | None) -> Any:
        if dst == self._comm.rank:
            tensor = native(tensor)
            view(known(tensor))
            return self._to_self.send(tensor, tag)
        return self._comm.send(tensor, dst, tag=tag, async_op=True, timeout_s=timeout_s)

    def _recv(self, tensor: torch.Tensor, src: int | None, tag: int, timeout_s: float | None) -> Any:
        if src == self._comm.rank:
            tensor = native(tensor)
            writable_view("recv", tensor)
            limit_s = self._comm.timeout_s if timeout_s is None else timeout_s
            return self._to_self.recv(tensor, tag, limit_s)
        return self._comm.recv(tensor, src, tag=tag, async_op=True, timeout_s=timeout_s)


class _ToSelf:
    """Messages that a rank sends to itself: kept until they are received."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._lock = threading.Lock()
        self._messages: dict[int, deque[torch.Tensor]] = defaultdict(deque)
        self._waiting: dict[int, deque[_SelfRecv]] = defaultdict(deque)

    def send(self, tensor: torch.Tensor, tag: int) -> Past:
        with self._lock:
            if self._waiting[tag]:
                self._waiting[tag].popleft().take(tensor)
            else:
                self._messages[tag].append(tensor.clone())
        return Past(self._rank)

    def recv(self, tensor: torch.Tensor, tag: int, timeout_s: float) -> _SelfRecv:
        recv = _SelfRecv(tensor, self._rank, timeout_s)
        with self._lock:
            if self._messages[tag]:
                recv.take(self._messages[tag].popleft())
            else:
                self._waiting[tag].append(recv)
        return recv


class _SelfRecv:
    """A receive from oneself, as a part of a Work."""

    def __init__(self, tensor: torch.Tensor, rank: int, timeout_s: float) -> None:
        self.source = rank
        self._tensor, self._timeout_s = tensor, timeout_s
        self._came = threading.Event()
        self._error: Exception | None = None

    def take(self, message: torch.Tensor) -> None:
        if message.dtype != self._tensor.dtype or message.numel() != self._tensor.numel():
            self._error = InvalidArgument(
                f"rank {self.source} sent itself {message.dtype} x {message.numel()} and expects "
                f"{self._tensor.dtype} x {self._tensor.numel()}"
            )
        else:
            assign(self._tensor, message.reshape(self._tensor.shape))
        self._came.set()

    def done(self) -> bool:
        return self._came.is_set()

    def wait(self, timeout_s: float | None = None) -> None:
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        if not self._came.wait(limit_s):
            raise Timeout(f"recv from rank {self.source}, which is this rank itself, timed out after {limit_s:g} s")
        if self._error is not None:
            raise self._error


def _begin(tensor: torch.Tensor) -> int:
    return tensor.data_ptr()


def _end(tensor: torch.Tensor) -> int:
    """One past a tensor's last byte."""
    if tensor.numel() == 0:
        return tensor.data_ptr()
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.itemsize
