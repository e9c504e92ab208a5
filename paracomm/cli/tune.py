"""`paracomm tune`: choose the algorithms of this machine, and keep the choice for the next run."""

from __future__ import annotations

import json as json_module
import socket
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from paracomm.cli.options import real
from paracomm.schedule import build
from paracomm.schedule import tune as tuning
from paracomm.schedule.schedule import COLLECTIVES, ROOTED
from paracomm.schedule.simulate import Link, Topology

if TYPE_CHECKING:
    from paracomm.comm import Communicator

REPEAT_S = 0.01  # a measurement repeats its call for about so long


def tune(
    collective: Annotated[list[str] | None, typer.Option("--collective", "-c", help="Only these.")] = None,
    budget_s: Annotated[float, real("Stop measuring after so many seconds.")] = 5.0,
    default: Annotated[bool, typer.Option("--default", help="Print the table that holds without tuning.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the table in the user's cache folder.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Measures links, simulates all algorithms, times the best few. Run it as the job's ranks, with its launcher."""
    from paracomm import init

    chosen = tuple(collective or COLLECTIVES)
    for name in chosen:
        if name not in COLLECTIVES:
            raise typer.BadParameter(f"unknown collective {name!r}: expected one of {', '.join(COLLECTIVES)}")
    with init() as comm:
        hosts = list(comm.host_indices)
        about: dict[str, Any] = {}
        if default or comm.world_size == 1:
            table = tuning.default_table(comm.world_size, hosts)
        else:
            table, about = measured(comm, hosts, chosen, budget_s)
        if comm.rank != 0:
            return
        path = tuning.cache_path(socket.gethostname(), hosts)
        if save and about:
            tuning.save(table, path, about)
        if json:
            print(json_module.dumps({"path": str(path), "about": about, "table": table}))
            return
        shown = Table("collective", "up to bytes", "algorithm", "parameters")
        for name, rows in table.items():
            for limit, algorithm, params in rows:
                upper = "any" if limit == tuning.UNLIMITED else str(limit)
                shown.add_row(name, upper, algorithm, ", ".join(f"{k}={v}" for k, v in params.items()))
        Console().print(shown)
        for key, value in about.items():
            print(f"{key}: {value}")
        if save and about:
            print(f"kept in {path}")


def measured(
    comm: Communicator, hosts: list[int], collectives: tuple[str, ...], budget_s: float
) -> tuple[tuning.Table, dict[str, Any]]:
    """Calibrate, then tune; every rank gets rank 0's numbers, so that all make the same calls."""
    begin = time.perf_counter()

    def agree(value: float) -> float:
        return float(struct.unpack("d", comm.exchange(struct.pack("d", value))[0])[0])

    topology = calibrate(comm, hosts, agree)
    table = tuning.tune(
        topology,
        lambda name, candidate, nbytes: agree(time_of(comm, name, candidate, nbytes, agree)),
        collectives,
        budget_s=budget_s,
        clock=lambda: agree(time.perf_counter()),
    )
    about = {
        "inside": f"{topology.inside.alpha_s * 1e6:.2f} us + {1e-9 / topology.inside.beta_s:.2f} GB/s",
        "between": f"{topology.between.alpha_s * 1e6:.2f} us + {1e-9 / topology.between.beta_s:.2f} GB/s",
        "gamma": f"{1e-9 / topology.gamma_s:.2f} GB/s" if isinstance(topology.gamma_s, float) else "",
        "took": f"{time.perf_counter() - begin:.2f} s",
    }
    return table, about


def calibrate(comm: Communicator, hosts: list[int], agree: Callable[[float], float]) -> Topology:
    """Alpha and beta from messages of rank 0 to a rank of its host and to one of another; gamma from an addition."""
    links: dict[bool, Link] = {}
    for away in (False, True):
        peer = next((r for r in range(1, comm.world_size) if (hosts[r] != hosts[0]) == away), None)
        if peer is not None:
            small, large = (agree(ping(comm, peer, nbytes)) for nbytes in (8, 1 << 20))
            links[away] = Link(max(small, 1e-9), max((large - small) / (1 << 20), 1e-13))
    inside = links.get(False, links.get(True, Link(1e-6, 1e-10)))
    x = np.ones(1 << 18, np.float32)
    begin = time.perf_counter()
    for _ in range(8):
        x += x[::-1]
    gamma = agree((time.perf_counter() - begin) / (8 * x.nbytes))
    return Topology(tuple(hosts), inside, links.get(True, inside), gamma)


def ping(comm: Communicator, peer: int, nbytes: int, turns: int = 20) -> float:
    """Seconds of one message from rank 0 to `peer`, half of the fastest round."""
    block = np.zeros(nbytes, np.uint8)
    fastest = float("inf")
    for _ in range(turns):
        begin = time.perf_counter()
        if comm.rank == 0:
            comm.send(block, peer)
            comm.recv(block, peer)
        elif comm.rank == peer:
            comm.recv(block, 0)
            comm.send(block, 0)
        fastest = min(fastest, (time.perf_counter() - begin) / 2)
    return fastest


def time_of(
    comm: Communicator, collective: str, candidate: tuning.Candidate, nbytes: int, agree: Callable[[float], float]
) -> float:
    """Seconds of a call on this rank, the median of some."""
    root = 0 if collective in ROOTED else None
    schedule = build(collective, candidate.algorithm, comm.world_size, root, **candidate.params)
    call = caller(comm, collective, nbytes)
    comm.barrier()
    begin = time.perf_counter()
    call(schedule)
    once = agree(time.perf_counter() - begin)
    seconds = []
    for _ in range(max(3, min(200, int(REPEAT_S / max(once, 1e-7))))):
        begin = time.perf_counter()
        call(schedule)
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds))


def caller(comm: Communicator, collective: str, nbytes: int) -> Callable[[Any], Any]:
    """A function schedule -> result that runs the collective on float32 buffers of `nbytes` in all."""
    n = comm.world_size
    count = max(1, nbytes // 4 // n)
    whole, block = np.zeros(count * n, np.float32), np.zeros(count, np.float32)
    other = np.zeros((n, count), np.float32)
    calls: dict[str, Callable[[Any], Any]] = {
        "all_reduce": lambda s: comm.all_reduce(whole, algorithm=s),
        "reduce": lambda s: comm.reduce(whole, 0, algorithm=s),
        "broadcast": lambda s: comm.broadcast(whole, 0, algorithm=s),
        "all_gather": lambda s: comm.all_gather(block, out=other, algorithm=s),
        "reduce_scatter": lambda s: comm.reduce_scatter(whole, out=block, algorithm=s),
        "all_to_all": lambda s: comm.all_to_all(other, out=whole.reshape(n, count), algorithm=s),
        "gather": lambda s: comm.gather(block, 0, out=other, algorithm=s),
        "scatter": lambda s: comm.scatter(other, 0, out=block, algorithm=s),
        "barrier": lambda s: comm.barrier(algorithm=s),
    }
    return calls[collective]
