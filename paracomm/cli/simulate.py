"""`paracomm simulate`: what an algorithm costs on a machine that need not be there."""

from __future__ import annotations

import json as json_module
import re
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from paracomm.cli.options import count, parts, real
from paracomm.schedule import algorithms
from paracomm.schedule.schedule import COLLECTIVES, ROOTED
from paracomm.schedule.simulate import Link, Topology, simulate_algorithm
from paracomm.schedule.tune import UNLIMITED

MOST_RANKS = 1 << 14
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def simulate(
    collective: Annotated[str, typer.Argument(help=", ".join(COLLECTIVES))] = "all_reduce",
    algorithm: Annotated[list[str] | None, typer.Option("--algorithm", "-a", help="Only these.")] = None,
    ranks: Annotated[int, count("World size.", most=MOST_RANKS)] = 8,
    ranks_per_host: Annotated[int, count("0: every rank has a link of its own to every other one.", 0, MOST_RANKS)] = 0,
    sizes: Annotated[str, typer.Option(help="Bytes of the data buffer: 8,64K,1M,1G.")] = "1K,1M,64M",
    alpha_us: Annotated[float, real("Time of a message without bytes, microseconds.")] = 5.0,
    gb_per_s: Annotated[float, real("10^9 bytes a second of a link.", above=0)] = 10.0,
    inside_alpha_us: Annotated[float, real("The same inside a host.")] = 0.5,
    inside_gb_per_s: Annotated[float, real("The same inside a host.", above=0)] = 20.0,
    reduce_gb_per_s: Annotated[float, real("10^9 bytes a second that a rank reduces; 0: no cost.")] = 0.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Replays algorithms in the alpha-beta-gamma model; hosts share one port for all their ranks."""
    if collective not in COLLECTIVES:
        raise typer.BadParameter(f"unknown collective {collective!r}: expected one of {', '.join(COLLECTIVES)}")
    for name in algorithm or []:
        if name not in algorithms(collective):
            known = ", ".join(algorithms(collective))
            raise typer.BadParameter(f"{collective} has no algorithm {name!r}: expected one of {known}")
    gamma = 1e-9 / reduce_gb_per_s if reduce_gb_per_s else 0.0
    between = Link(alpha_us * 1e-6, 1e-9 / gb_per_s)
    if ranks_per_host:
        hosts = tuple(r // ranks_per_host for r in range(ranks))
        topology = Topology(hosts, Link(inside_alpha_us * 1e-6, 1e-9 / inside_gb_per_s), between, gamma)
    else:
        topology = Topology.flat(ranks, between.alpha_s, between.beta_s, gamma)
    shown = Table(
        "bytes", "algorithm", "time us", "algbw GB/s", "most bytes a rank sends", "bytes between hosts", "took s"
    )
    for nbytes in parts(sizes, "--sizes", bytes_of):
        for name in algorithm or algorithms(collective):
            params: dict[str, Any] = {"hosts": topology.hosts} if name == "hierarchical" else {}
            begin = time.perf_counter()
            root = 0 if collective in ROOTED else None
            result = simulate_algorithm(collective, name, nbytes, topology, root, **params)
            sent = [0.0] * ranks
            for (source, _), size in result.link_bytes.items():
                sent[source] += size
            line = {
                "collective": collective,
                "algorithm": name,
                "ranks": ranks,
                "nbytes": nbytes,
                "time_us": result.time_s * 1e6,
                "algbw_gb_per_s": nbytes / result.time_s * 1e-9 if result.time_s else 0.0,
                "most_sent_bytes": max(sent),
                "between_hosts_bytes": sum(result.host_bytes.values()),
                "took_s": time.perf_counter() - begin,
            }
            if json:
                print(json_module.dumps(line))
            shown.add_row(
                str(nbytes), name, f"{line['time_us']:.2f}", f"{line['algbw_gb_per_s']:.3f}",
                f"{line['most_sent_bytes']:.0f}", f"{line['between_hosts_bytes']:.0f}", f"{line['took_s']:.2f}",
            )  # fmt: skip
    if not json:
        Console().print(shown)


def bytes_of(text: str) -> int:
    """ "64K" -> 65536. Raises ValueError for what is no size."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?)([kmgt]?)b?", text, re.IGNORECASE)
    nbytes = int(float(found[1]) * UNITS[found[2].lower()]) if found else UNLIMITED + 1
    if nbytes > UNLIMITED:
        raise ValueError(f"a size must look like 8, 64K, 1M or 1G and be at most 2^62, got {text!r}")
    return nbytes
