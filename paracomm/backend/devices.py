"""What is different about tensors of a GPU: streams that wait in place of the host, and rails between hosts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from paracomm.comm import Communicator, device
from paracomm.comm.rails import Rails
from paracomm.comm.streams import SideStream, SideStreams
from paracomm.errors import InvalidArgument


def device_types() -> list[torch.device]:
    """Of the tensors that a group takes, the CPU first: what torch itself sends, such as objects, is on that."""
    return [torch.device("cpu"), torch.device("cuda")] if torch.cuda.is_available() else [torch.device("cpu")]


class Devices:
    """The GPUs of a process group, as far as it uses any."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._mode = device.mode()
        self._between_hosts = len(set(comm.host_indices)) > 1
        self._sides = SideStreams()
        self._rails: Rails | None = None

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether it is device memory to us, a GPU's or an emulated one's."""
        return tensor.is_cuda or self._mode == "emulated"

    def all_reducer(self, tensor: torch.Tensor) -> Callable[..., Any]:
        """What reduces such a tensor over all ranks: between hosts, device memory takes rails."""
        if not self._between_hosts or not self.has(tensor) or self._mode == "host":
            return self._comm.all_reduce
        if self._rails is None:
            self._rails = Rails(self._comm)
        return self._rails.all_reduce

    def use_between(self, groups: Sequence[Any]) -> None:
        """See ProcessGroup.use_between."""
        if self._rails is not None:
            raise InvalidArgument("use_between: this group has carried device memory between hosts already")
        self._rails = Rails(self._comm, groups)

    def side_of(self, tensor: torch.Tensor) -> SideStream:
        """The side stream of the GPU that a tensor is on."""
        return self._sides.of(tensor.device)

    def synchronize(self) -> None:
        """The host waits for all that streams hold of this rank's GPU, if the group has used one."""
        used = self._comm.device
        if torch.cuda.is_initialized() and (used is not None or self._rails is not None):
            torch.cuda.synchronize(None if used is None else used.index)

    def abort(self, why: str) -> None:
        if self._rails is not None:
            self._rails.abort(why)

    def close(self) -> None:
        if self._rails is not None:
            self._rails.close()
