"""Making communicators: every rank publishes its address through an exchange that the launcher's store or MPI gives."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

from paracomm import _C
from paracomm.comm import device
from paracomm.comm.communicator import Communicator
from paracomm.errors import InvalidArgument

Exchange = Callable[[bytes], list[bytes]]

DEFAULT_TIMEOUT_S = 1800.0
CONNECT_TIMEOUT_S = 300.0

_local_worlds: dict[bytes, list[Any]] = {}
_local_lock = threading.Lock()
_local_number = itertools.count()


def connect(
    rank: int,
    world_size: int,
    exchange: Exchange,
    *,
    transport: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    interface: str = "",
    master_address: str = "",
    host_id: str = "",
    table: dict[str, Any] | None = None,
    **tuning: int,
) -> Communicator:
    """A communicator over `world_size` ranks. Collective.

    Args:
        exchange: gathers bytes: called with this rank's, returns everybody's in rank order.
        transport: None: shared memory between ranks of one host, TCP between hosts. "tcp": TCP everywhere.
            "local": the ranks are threads of this process.
        timeout_s: of an operation, in seconds.
        connect_timeout_s: of this call, in seconds.
        interface: name or address of the network interface for TCP; "" takes the one with the route to master_address.
        host_id: ranks with equal ones share memory; "" finds it out.
        table: choices of algorithms, as `paracomm tune` makes them; None takes the default ones.
        tuning: window_bytes, staging_bytes, sockets_per_peer, cores; equal on all ranks.

    Raises:
        Timeout: some ranks did not connect in time; the message names them.
        SecurityError: a rank could not prove that it belongs to the job.
        InvalidArgument: the arguments do not fit each other, or PARACOMM_DEVICE is none of its values.
    """
    if not 0 <= rank < world_size:
        raise InvalidArgument(f"rank must be in 0..{world_size - 1}, got {rank}")
    if transport not in (None, "tcp", "local"):
        raise InvalidArgument(f"transport must be None, 'tcp' or 'local', got {transport!r}")
    device.mode()  # an unknown one is refused before anybody waits for this rank
    settings = (transport, interface, master_address, host_id, connect_timeout_s, tuning)
    if transport == "local":
        core = _connect_threads(rank, world_size, exchange, timeout_s, tuning)
        return Communicator(core, table, settings)
    if transport == "tcp":
        host_id = f"{host_id}#{rank}#tcp"
    listener = _C.Listener(interface=interface, master_address=master_address, host_id=host_id)
    blobs = exchange(listener.publish())
    exchange(b"")  # as many rounds as with threads, so that a rank that stays out of a split can keep step
    core = _C.connect(rank, listener, blobs, connect_timeout_s=connect_timeout_s, timeout_s=timeout_s, **tuning)
    return Communicator(core, table, settings)


def _connect_threads(rank: int, world_size: int, exchange: Exchange, timeout_s: float, tuning: dict[str, int]) -> Any:
    token = b""
    if rank == 0:
        token = str(next(_local_number)).encode()
        with _local_lock:
            window = {k: v for k, v in tuning.items() if k == "window_bytes"}
            _local_worlds[token] = _C.local_communicators(world_size, timeout_s=timeout_s, **window)
    token = exchange(token)[0]
    with _local_lock:
        core = _local_worlds[token][rank]
    exchange(b"")
    if rank == 0:
        with _local_lock:
            del _local_worlds[token]
    return core
