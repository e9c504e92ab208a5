"""Making communicators: every rank publishes its address through an exchange that the launcher's store or MPI gives."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from paracomm import _C
from paracomm.comm import device
from paracomm.comm.agreement import read_for_all
from paracomm.comm.arguments import seconds, text, whole
from paracomm.comm.communicator import Communicator
from paracomm.errors import InvalidArgument, Timeout
from paracomm.schedule import tune

Exchange = Callable[[bytes], list[bytes]]

DEFAULT_TIMEOUT_S = 1800.0
CONNECT_TIMEOUT_S = 300.0
MOST_RANKS = 1 << 20

_local_worlds: dict[int, list[Any]] = {}
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
        tuning: window_bytes, staging_bytes, sockets_per_peer, cores, lag; equal on all ranks. 0 or None: the default.

    Raises:
        Timeout: some ranks did not connect in time; the message names them.
        SecurityError: a rank could not prove that it belongs to the job.
        InvalidArgument: the arguments do not fit each other, or PARACOMM_DEVICE is none of its values.
    """
    checked = check_settings(
        transport=transport, timeout_s=timeout_s, connect_timeout_s=connect_timeout_s, interface=interface,
        master_address=master_address, host_id=host_id, table=table, **tuning,
    )  # fmt: skip
    return connect_since(time.monotonic(), rank, world_size, exchange, checked)


@dataclass(frozen=True)
class Settings:
    """Arguments of connect() that were checked; `table` is given as it is."""

    transport: str | None
    timeout_s: float
    connect_timeout_s: float
    interface: str
    master_address: str
    host_id: str
    table: dict[str, Any] | None
    tuning: dict[str, int]


def check_settings(
    *, transport: Any = None, timeout_s: Any = None, connect_timeout_s: Any = None, interface: Any = "",
    master_address: Any = "", host_id: Any = "", table: Any = None, **tuning: Any,
) -> Settings:  # fmt: skip
    """Raises InvalidArgument for what connect() cannot take, before anybody waits for this rank."""
    if transport not in (None, "tcp", "local"):
        raise InvalidArgument(f"transport must be None, 'tcp' or 'local', got {transport!r}")
    for name in tuning:
        if name not in _C.OPTIONS:
            raise InvalidArgument(f"there is no option {name!r}; there are {', '.join(_C.OPTIONS)}")
    if table is not None:
        tune.check(table)
    device.mode()
    return Settings(
        transport,
        seconds("timeout_s", timeout_s, DEFAULT_TIMEOUT_S),
        seconds("connect_timeout_s", connect_timeout_s, CONNECT_TIMEOUT_S),
        text("interface", interface),
        text("master_address", master_address),
        text("host_id", host_id),
        table,
        {name: _option(name, value) for name, value in tuning.items()},
    )


def _option(name: str, value: Any) -> int:
    if value is None or (type(value) is int and value == 0):
        return 0
    return whole(name, value, *_C.OPTIONS[name])


def connect_since(began: float, rank: int, world_size: int, exchange: Exchange, settings: Settings) -> Communicator:
    """connect() whose time runs from `began` of time.monotonic() on."""
    local = settings.transport == "local"
    if not callable(exchange):
        raise InvalidArgument(f"exchange must be a function of bytes, got {exchange!r}")
    world_size = whole("world_size", world_size, 1, _C.MOST_THREADS if local else MOST_RANKS)
    rank = whole("rank", rank, 0, world_size - 1)
    exchange = _checked(exchange, rank, world_size)
    kept = (settings.transport, settings.interface, settings.master_address, settings.host_id,
            settings.connect_timeout_s, settings.tuning)  # fmt: skip
    if local:
        core = _connect_threads(rank, world_size, exchange, settings.timeout_s, settings.tuning)
        return Communicator(core, settings.table, kept)
    host_id = f"{settings.host_id}#{rank}#tcp" if settings.transport == "tcp" else settings.host_id
    listener = _C.Listener(interface=settings.interface, master_address=settings.master_address, host_id=host_id)
    blobs = exchange(listener.publish())
    if len(set(blobs)) != world_size:
        raise InvalidArgument("exchange gave the same address for two ranks, expected every rank's own, in rank order")
    exchange(b"")  # as many rounds as with threads, so that a rank that stays out of a split can keep step
    left_s = began + settings.connect_timeout_s - time.monotonic()
    if left_s <= 0:
        raise Timeout(f"rank {rank}: addresses were exchanged after the {settings.connect_timeout_s:g} s of connect()")
    core = _C.connect(rank, listener, blobs, connect_timeout_s=left_s, timeout_s=settings.timeout_s, **settings.tuning)
    return Communicator(core, settings.table, kept)


def _checked(exchange: Exchange, rank: int, world_size: int) -> Exchange:
    """The same, and raises InvalidArgument for an answer that does not hold every rank's bytes."""

    def checked(blob: bytes) -> list[bytes]:
        answer = exchange(blob)
        if not isinstance(answer, Sequence) or not all(isinstance(one, (bytes, bytearray)) for one in answer):
            raise InvalidArgument(f"exchange must return a list of every rank's bytes, got {answer!r:.200}")
        if len(answer) != world_size:
            raise InvalidArgument(f"exchange gave {len(answer)} entries, expected one of each of {world_size} ranks")
        if bytes(answer[rank]) != blob:
            raise InvalidArgument(f"exchange gave other bytes as those of rank {rank} than it was called with there")
        return [bytes(one) for one in answer]

    return checked


def _connect_threads(rank: int, world_size: int, exchange: Exchange, timeout_s: float, tuning: dict[str, int]) -> Any:
    def make() -> int:
        number = next(_local_number)
        window = {k: v for k, v in tuning.items() if k == "window_bytes"}
        with _local_lock:
            _local_worlds[number] = _C.local_communicators(world_size, timeout_s=timeout_s, **window)
        return number

    number = read_for_all(rank, exchange, make)
    with _local_lock:
        core = _local_worlds[number][rank]
    exchange(b"")
    if rank == 0:
        with _local_lock:
            del _local_worlds[number]
    return core
