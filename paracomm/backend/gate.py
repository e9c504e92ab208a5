"""torch.distributed.monitored_barrier refuses every backend that is not called gloo; groups of ours have one too."""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from paracomm.backend.process_group import ProcessGroup
from paracomm.comm.arguments import seconds


@functools.cache
def lift() -> None:
    """Has `torch.distributed.monitored_barrier` ask our groups themselves; for all others it is what it was."""
    torchs: Any = distributed_c10d.monitored_barrier

    @functools.wraps(torchs)
    def monitored_barrier(group: Any = None, timeout: Any = None, wait_all_ranks: bool = False) -> Any:
        asked = distributed_c10d._get_default_group() if group is None else group
        if not isinstance(asked, ProcessGroup):
            return torchs(group, timeout, wait_all_ranks)
        if timeout is not None and not isinstance(timeout, timedelta):
            timeout = timedelta(seconds=seconds("monitored_barrier: timeout", timeout))
        return asked.monitored_barrier(timeout, wait_all_ranks)

    distributed_c10d.monitored_barrier = monitored_barrier
    dist.monitored_barrier = monitored_barrier
