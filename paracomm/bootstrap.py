"""`init()`: the communicator of all ranks that torchrun, mpirun or srun started. Addresses travel through the torch
Store or the MPI that came with the launcher; there is no rendezvous of our own."""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from paracomm.comm import Communicator, connect
from paracomm.comm.group import CONNECT_TIMEOUT_S, DEFAULT_TIMEOUT_S
from paracomm.errors import Error, InvalidArgument, Timeout

Exchange = Callable[[bytes], list[bytes]]

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
    rank, world_size, exchange, master = _world(connect_timeout_s)
    comm = connect(
        rank, world_size, exchange, transport=transport, timeout_s=timeout_s, connect_timeout_s=connect_timeout_s,
        interface=interface, master_address=master, **settings,
    )  # fmt: skip
    if "table" not in settings and world_size > 1:
        comm.use_cached_table()
    return comm


def _world(timeout_s: float) -> tuple[int, int, Exchange, str]:
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        if environment["WORLD_SIZE"] == "1":
            return 0, 1, lambda blob: [blob], ""
        return _through_store(timeout_s)
    if any(name in environment for name in MPI_VARIABLES):
        return _through_mpi()
    if "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return _under_slurm(timeout_s)
    return 0, 1, lambda blob: [blob], ""


def _through_store(timeout_s: float) -> tuple[int, int, Exchange, str]:
    try:
        import torch.distributed as dist
    except ImportError as error:
        raise Error(
            "RANK and WORLD_SIZE are set, so ranks meet in a torch Store, but torch is not installed"
        ) from error
    limit = timedelta(seconds=timeout_s)
    if dist.is_initialized():
        store, rank, world_size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    else:
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=limit)))
    own = fresh_store(dist.PrefixStore(f"paracomm/{next(_number)}", store), rank, world_size, limit)
    _stores.append(own)
    exchange = store_exchange(own, rank, world_size, "connect", limit)
    return rank, world_size, exchange, os.environ.get("MASTER_ADDR", "")


# A Store served by rank 0 must outlive the exchange on all the others.
_stores: list[Any] = []


def fresh_store(store: Any, rank: int, world_size: int, limit: timedelta) -> Any:
    """The Store under a prefix that these ranks alone know. Collective.

    A torchrun that restarts its workers keeps its Store, and what dead workers wrote there. So each rank writes a word
    of its own, then a digest of everybody's words as it sees them, until all digests are the same: whoever wrote a
    digest of my word has read it, so is alive.
    """
    import torch.distributed as dist

    deadline = time.monotonic() + limit.total_seconds()
    words = [f"word/{r}" for r in range(world_size)]
    digests = [f"digest/{r}" for r in range(world_size)]
    store.set(words[rank], secrets.token_hex(8))
    pause_s, mine = 0.001, ""
    while True:
        store.wait(words, limit)
        seen = hashlib.sha256(b" ".join(bytes(store.get(word)) for word in words)).hexdigest()[:16]
        if seen != mine:
            mine = seen
            store.set(digests[rank], mine)
        store.wait(digests, limit)
        if all(bytes(store.get(digest)).decode() == mine for digest in digests):
            return dist.PrefixStore(mine, store)
        if time.monotonic() > deadline:
            raise Timeout(f"rank {rank} met not all {world_size} ranks in the Store in {limit.total_seconds():g} s")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.05)


def store_exchange(store: Any, rank: int, world_size: int, prefix: str, limit: timedelta) -> Exchange:
    """An exchange for `connect` through a torch Store, under keys that start with `prefix`."""
    rounds = itertools.count()

    def exchange(blob: bytes) -> list[bytes]:
        at = f"{prefix}/{next(rounds)}"
        store.set(f"{at}/{rank}", blob or b"\0")  # bytes are kept as they are
        keys = [f"{at}/{r}" for r in range(world_size)]
        store.wait(keys, limit)
        found = [bytes(store.get(key)) for key in keys]
        return [b"" if entry == b"\0" else entry for entry in found]

    return exchange


def _through_mpi() -> tuple[int, int, Exchange, str]:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise Error("started by an MPI launcher, but mpi4py is not installed: pip install mpi4py") from error
    world = MPI.COMM_WORLD
    addresses = world.allgather(MPI.Get_processor_name())
    return world.rank, world.size, world.allgather, addresses[0]


def _under_slurm(timeout_s: float) -> tuple[int, int, Exchange, str]:
    environment = os.environ
    world_size = int(environment["SLURM_NTASKS"])
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
            names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise InvalidArgument(f"cannot tell the first host of the Slurm step {nodes!r}; set MASTER_ADDR") from error
        environment["MASTER_ADDR"] = names.split()[0]
    environment.setdefault("MASTER_PORT", str(29500 + int(environment.get("SLURM_JOB_ID", "0")) % 1000))
    environment["RANK"], environment["WORLD_SIZE"] = environment["SLURM_PROCID"], str(world_size)
    return _through_store(timeout_s)
