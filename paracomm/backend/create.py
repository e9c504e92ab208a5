"""Makes the process group that torch asks for; its ranks meet in the Store that torch hands over."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from paracomm.backend.gate import lift
from paracomm.backend.process_group import ProcessGroup
from paracomm.bootstrap import fresh_store, store_exchange
from paracomm.comm.group import check_settings, connect_since
from paracomm.errors import InvalidArgument

# A group whose operations may take a second still needs longer than that to find its ranks on a busy machine.
LEAST_CONNECT_S = 20.0


def create(options: Any, settings: Any = None) -> ProcessGroup:
    """The process group of torch's `_DistributedBackendOptions`. Collective.

    Args:
        settings: `pg_options` of init_process_group and new_group: a mapping with arguments of `paracomm.connect`, such
            as interface, transport, table.

    Raises:
        Timeout, SecurityError, InvalidArgument: as `paracomm.connect`.
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise InvalidArgument(f"pg_options of paracomm is a mapping of paracomm.connect's arguments, got {settings!r}")
    lift()
    return connect_group(
        options.store, options.group_rank, options.group_size, options.timeout, settings or {}, str(options.group_id)
    )


def connect_group(
    store: Any, rank: int, world_size: int, timeout: timedelta, settings: Mapping[str, Any], name: str
) -> ProcessGroup:
    """A process group of `world_size` ranks that share `store` and no other user of its keys."""
    began = time.monotonic()
    arguments: dict[str, Any] = {
        "timeout_s": timeout.total_seconds(),
        "connect_timeout_s": max(timeout.total_seconds(), LEAST_CONNECT_S),
        "master_address": os.environ.get("MASTER_ADDR", ""),
    }
    checked = check_settings(**arguments | dict(settings))
    deadline = began + checked.connect_timeout_s
    store = fresh_store(dist.PrefixStore("paracomm", store), rank, world_size, deadline)
    exchange = store_exchange(store, rank, world_size, "connect", deadline)
    comm = connect_since(began, rank, world_size, exchange, checked)
    if "table" not in settings and world_size > 1:
        comm.use_cached_table()
    return ProcessGroup(comm, store, settings, name)
