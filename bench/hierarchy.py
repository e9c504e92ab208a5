"""The two-level hook on 2 emulated hosts of 2 ranks: ours inside a host, Gloo or MPI between hosts.

The result must be the mean, and the bytes that leave a host those of the formula: S x 2 (h-1)/h for float32 between h
hosts, and that x (bits/8 + 4/block) / 4 for blocks. What leaves a host is counted by its interface: payload, headers
and acknowledgements.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import typer
from bars import Bar, hosts

from paracomm.cli.contest.launch import ContenderError, Place
from paracomm.cli.contest.peers import installed, mpi_start

RANKS, HOSTS = 4, (0, 0, 1, 1)
COUNT = 4 << 20
ROUNDS = 4
WORKER = Path(__file__).with_name("hierarchy_rank.py")
LIMIT_S = 120
HEADERS = 1.06
"""Ethernet, IP and TCP headers of full segments, and acknowledgements of what comes the other way."""


def expected_bytes(hook: str) -> float:
    """Payload that one of two hosts sends for one bucket."""
    plain = COUNT * 4 * 2 * (2 - 1) / 2
    return plain if hook == "hierarchical" else plain * (1 + 4 / 256) / 4


def run_ranks(leg: str, hook: str) -> list[dict]:
    """Every rank's report. The ranks of an MPI leg are started by mpiexec, each in the namespace of its host."""
    with tempfile.TemporaryDirectory() as folder:
        starts = Place(RANKS, HOSTS).starts()
        reports = [Path(folder) / f"{rank}.json" for rank in range(RANKS)]
        tasks = [[str(WORKER), leg, hook, str(COUNT), str(ROUNDS), str(report)] for report in reports]
        if leg == "gloo":
            running = [
                subprocess.Popen([*start.argv, *task], env=os.environ | {"OMP_NUM_THREADS": "1"} | start.env)
                for start, task in zip(starts, tasks, strict=True)
            ]
        else:
            running = [subprocess.Popen(**mpi_command(leg, starts, tasks))]
        for process in running:
            try:
                process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        return [json.loads(report.read_text()) if report.exists() else {} for report in reports]


def mpi_command(kind: str, starts: list, tasks: list[list[str]]) -> dict:
    root = installed(kind)
    if root is None:
        raise ContenderError(f"{kind} is not installed; get it with: paracomm bench --install-peers")
    parts: list[str] = []
    for rank, (start, task) in enumerate(zip(starts, tasks, strict=True)):
        # Our packages beside the MPI's own Python: both are of one version.
        ours = os.pathsep.join([start.env["PYTHONPATH"], *(p for p in sys.path if p.endswith("site-packages"))])
        env = start.env | {"PYTHONPATH": ours, "OMP_NUM_THREADS": "1", "FI_TCP_IFACE": f"v{HOSTS[rank]}"}
        env["UCX_NET_DEVICES"] = f"v{HOSTS[rank]}"
        settings = ["env", *(f"{key}={value}" for key, value in env.items())]
        inside = start.argv[:-1]
        parts += [*([":"] if parts else []), "-n", "1", *inside, *settings, str(root / "bin" / "python"), *task]
    launch = mpi_start(kind, RANKS, parts)
    argv = launch.argv[: launch.argv.index("-n")] + parts
    # All ranks have one host name, and MPI would send between "hosts" through shared memory.
    nolocal = {"MPIR_CVAR_NOLOCAL": "1", "UCX_TLS": "tcp", "FI_PROVIDER": "tcp"}
    return {"args": argv, "env": os.environ | launch.env | nolocal}


def hierarchy(bar: Bar) -> None:
    """2 hosts x 2 ranks, a bucket of 4 Mi elements: between hosts by Gloo, and by MPI."""
    for leg in ("gloo", "mpich"):
        for hook in ("hierarchical", "hierarchical+int8"):
            with hosts(2, "1gbit"):
                try:
                    reports = run_ranks(leg, hook)
                except ContenderError as error:
                    bar.hold(f"{leg}: did not run: {error}", None, 1)
                    continue
            good = len(reports) == RANKS and all(r.get("right") for r in reports)
            bar.hold(f"{leg}, {hook}: ranks that have the mean, alike on all", 4.0 if good else None, 4, unit="ranks")
            for host in (0, 1):
                sent = max(
                    (r.get("host_bytes", 0) for r, at in zip(reports, HOSTS, strict=True) if at == host), default=0
                )
                share = sent / ROUNDS / expected_bytes(hook) if sent else None
                what = f"{leg}, {hook}: bytes that leave host {host}, over the formula's"
                bar.hold(what, share, HEADERS, at_least=False)
                bar.hold(f"{what} (none beside the link)", share, 1.0)
    typer.echo("  counted by the hosts' interfaces, headers included")
