"""`init()`: the communicator of all ranks that torchrun, mpirun or srun started. Addresses travel through the torch
Store or the MPI that came with the launcher; there is no rendezvous of our own."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import secrets
import socket
import subprocess
import threading
import time
from datetime import timedelta
from typing import Any

from paracomm.comm import Communicator
from paracomm.comm.arguments import seconds
from paracomm.comm.group import CONNECT_TIMEOUT_S, DEFAULT_TIMEOUT_S, Exchange, check_settings, connect_since
from paracomm.errors import Error, InvalidArgument, PeerLost, Timeout

_number = itertools.count()
# Set by mpiexec of Open MPI, of MPICH and Intel MPI (Hydra), and by PMIx launchers.
MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")


def init(
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    interface: str = "",
    transport: str | None = None,
    **settings: Any,
) -> Communicator:
    """The communicator of all ranks of the job. Collective.

    Under torchrun (or with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set by hand) through the torch Store; under
    mpirun through mpi4py; under srun through mpi4py if it sees the job's ranks, else through the torch Store. Without
    any launcher: a world of one rank.

    Args:
        timeout_s: of an operation, in seconds.
        connect_timeout_s: of this call, in seconds.
        interface, transport, settings: see `paracomm.connect`.

    Raises:
        Error: a launcher was found, but neither torch nor mpi4py is there to reach the other ranks.
        Timeout, SecurityError, InvalidArgument: as `paracomm.connect`.
    """
    began = time.monotonic()
    check_settings(
        transport=transport, timeout_s=timeout_s, connect_timeout_s=connect_timeout_s, interface=interface, **settings
    )
    limit_s = seconds("connect_timeout_s", connect_timeout_s, CONNECT_TIMEOUT_S)
    rank, world_size, exchange, master = _world(began + limit_s)
    checked = check_settings(
        transport=transport, timeout_s=timeout_s, connect_timeout_s=limit_s, interface=interface,
        **{"master_address": master, **settings},
    )  # fmt: skip
    comm = connect_since(began, rank, world_size, exchange, checked)
    if "table" not in settings and world_size > 1:
        comm.use_cached_table()
    return comm


def _world(deadline: float) -> tuple[int, int, Exchange, str]:
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        if environment["WORLD_SIZE"] == "1":
            return 0, 1, lambda blob: [blob], ""
        return _through_store(deadline)
    if any(name in environment for name in MPI_VARIABLES):
        return _through_mpi()
    if "SLURM_PROCID" in environment and _number_of("SLURM_NTASKS", "1") > 1:
        return _under_slurm(deadline)
    return 0, 1, lambda blob: [blob], ""


def _number_of(name: str, default: str = "") -> int:
    """Of the environment. Raises InvalidArgument where it is none."""
    value = os.environ.get(name, default)
    if not re.fullmatch(r"\d{1,9}", value):
        raise InvalidArgument(f"the environment says {name}={value!r}, expected a number")
    return int(value)


def _through_store(deadline: float) -> tuple[int, int, Exchange, str]:
    try:
        import torch.distributed as dist
    except ImportError as error:
        raise Error(
            "RANK and WORLD_SIZE are set, so ranks meet in a torch Store, but torch is not installed"
        ) from error
    if dist.is_initialized():
        store, rank, world_size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    else:
        rank, world_size = _number_of("RANK"), _number_of("WORLD_SIZE")
        if rank >= world_size:
            raise InvalidArgument(f"the environment says RANK={rank} and WORLD_SIZE={world_size}")
        store = _meet(os.environ.get("MASTER_ADDR", ""), _number_of("MASTER_PORT"), rank, world_size, deadline)
    own = fresh_store(dist.PrefixStore(f"paracomm/{next(_number)}", store), rank, world_size, deadline)
    exchange = store_exchange(own, rank, world_size, "connect", deadline)
    return rank, world_size, exchange, os.environ.get("MASTER_ADDR", "")


# Where ranks have met already. A Store served by rank 0 must outlive the exchange on all the others, and one for each
# init() would keep a connection for each.
_stores: dict[tuple[Any, ...], Any] = {}


def _meet(master: str, port: int, rank: int, world_size: int, deadline: float) -> Any:
    """The Store of MASTER_ADDR and MASTER_PORT. Raises Timeout where it is not reached by then, Error otherwise."""
    import torch.distributed as dist

    if not master or not 0 < port < 1 << 16:
        raise InvalidArgument(f"the environment says MASTER_ADDR={master!r} and MASTER_PORT={port}, expected a Store's")
    key = (os.getpid(), master, port, rank, world_size)
    if key in _stores:
        return _stores[key]
    trouble = ["it does not answer"]

    def meet() -> Any:
        pause_s = 0.05
        while True:
            try:
                socket.getaddrinfo(master, port, type=socket.SOCK_STREAM)
                break
            except OSError as error:  # names of jobs are often known a little later than their ranks start
                trouble[0] = str(error)
                if time.monotonic() + pause_s > deadline:
                    raise
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 1.0)
        found, *_ = next(iter(dist.rendezvous("env://", timeout=_time_left(deadline))))
        return found

    where = f"rank {rank} of {world_size} did not meet the others at MASTER_ADDR={master} MASTER_PORT={port}"
    limit_s = deadline - time.monotonic()
    found: list[Any] = []
    failure: list[Exception] = []

    def attempt() -> None:
        try:
            found.append(meet())
        except Exception as error:
            failure.append(error)

    # torch looks names up, and connects, for longer than the timeout that it is given.
    thread = threading.Thread(target=attempt, name="paracomm rendezvous", daemon=True)
    thread.start()
    thread.join(max(limit_s, 0.0))
    if found:
        _stores[key] = found[0]
        return found[0]
    late = not failure or isinstance(failure[0], socket.gaierror) or _is_late(failure[0], deadline)
    why = trouble[0] if not failure else str(failure[0]).partition("\n")[0]
    cause = failure[0] if failure else None
    if late:
        raise Timeout(f"{where} in {limit_s:.3g} s: {why}") from cause
    raise Error(f"{where}: {why}") from cause


def _time_left(deadline: float) -> timedelta:
    return timedelta(seconds=max(deadline - time.monotonic(), 0.001))


def _is_late(error: Exception, deadline: float) -> bool:
    """Whether a Store's error says that the time is up."""
    text = str(error).lower()
    return time.monotonic() >= deadline or "timeout" in text or "timed out" in text


class _Keys:
    """A Store, one key a rank, until a deadline of time.monotonic().

    Raises Timeout with the ranks that are missing, and PeerLost where the Store itself is gone.
    """

    def __init__(self, store: Any, rank: int, world_size: int, deadline: float) -> None:
        self._store, self._rank, self._world_size, self._deadline = store, rank, world_size, deadline
        self._began = time.monotonic()

    def set(self, prefix: str, value: str | bytes) -> None:
        try:
            self._store.set(f"{prefix}/{self._rank}", value)
        except RuntimeError as error:
            raise self._lost(error) from error

    def get_all(self, prefix: str) -> list[bytes]:
        keys = [f"{prefix}/{r}" for r in range(self._world_size)]
        try:
            self._store.wait(keys, _time_left(self._deadline))
            return [bytes(self._store.get(key)) for key in keys]
        except RuntimeError as error:  # torch's DistError is one
            if not _is_late(error, self._deadline):
                raise self._lost(error) from error
            raise Timeout(self._missing(keys)) from error

    def _lost(self, error: RuntimeError) -> PeerLost:
        why = str(error).partition("\n")[0]
        return PeerLost(f"rank {self._rank} of {self._world_size} lost the Store, which rank 0 may have served: {why}")

    def _missing(self, keys: list[str]) -> str:
        try:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
        except RuntimeError:
            missing = []
        who = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing[:8]))}" if missing else "some rank"
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        return (
            f"rank {self._rank} met not all {self._world_size} ranks in the Store in "
            f"{time.monotonic() - self._began:.3g} s: {who}{more} did not come"
        )


def fresh_store(store: Any, rank: int, world_size: int, deadline: float) -> Any:
    """The Store under a prefix that these ranks alone know; `deadline` is of time.monotonic(). Collective.

    A torchrun that restarts its workers keeps its Store, and what dead workers wrote there. So each rank writes a word
    of its own, then a digest of everybody's words as it sees them, until all digests are the same: whoever wrote a
    digest of my word has read it, so is alive.

    Raises Timeout, PeerLost.
    """
    import torch.distributed as dist

    keys = _Keys(store, rank, world_size, deadline)
    keys.set("word", secrets.token_hex(8))
    pause_s, mine = 0.001, ""
    while True:
        seen = hashlib.sha256(b" ".join(keys.get_all("word"))).hexdigest()[:16]
        if seen != mine:
            mine = seen
            keys.set("digest", mine)
        if all(digest == mine.encode() for digest in keys.get_all("digest")):
            return dist.PrefixStore(mine, store)
        if time.monotonic() > deadline:
            raise Timeout(f"rank {rank} met not all {world_size} ranks in the Store: some are of an earlier run")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.05)


def store_exchange(store: Any, rank: int, world_size: int, prefix: str, deadline: float) -> Exchange:
    """An exchange for `connect` through a torch Store, under keys that start with `prefix`, until `deadline`."""
    rounds = itertools.count()
    keys = _Keys(store, rank, world_size, deadline)

    def exchange(blob: bytes) -> list[bytes]:
        at = f"{prefix}/{next(rounds)}"
        keys.set(at, blob or b"\0")  # bytes are kept as they are
        return [b"" if entry == b"\0" else entry for entry in keys.get_all(at)]

    return exchange


def _through_mpi() -> tuple[int, int, Exchange, str]:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise Error("started by an MPI launcher, but mpi4py is not installed: pip install mpi4py") from error
    world = MPI.COMM_WORLD
    addresses = world.allgather(MPI.Get_processor_name())
    return world.rank, world.size, world.allgather, addresses[0]


def _under_slurm(deadline: float) -> tuple[int, int, Exchange, str]:
    environment = os.environ
    world_size = _number_of("SLURM_NTASKS")
    try:
        found = _through_mpi()
        if found[1] == world_size:
            return found
    except Error:
        pass  # without mpi4py the Store serves
    if "MASTER_ADDR" not in environment:
        nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", ""))
        try:
            command = ["scontrol", "show", "hostnames", nodes]
            names = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise InvalidArgument(f"cannot tell the first host of the Slurm step {nodes!r}; set MASTER_ADDR") from error
        if not names.split():
            raise InvalidArgument(f"cannot tell the first host of the Slurm step {nodes!r}; set MASTER_ADDR")
        environment["MASTER_ADDR"] = names.split()[0]
    environment.setdefault("MASTER_PORT", str(29500 + _number_of("SLURM_JOB_ID", "0") % 1000))
    environment["RANK"], environment["WORLD_SIZE"] = environment["SLURM_PROCID"], str(world_size)
    return _through_store(deadline)
