"""One rank of bench/hierarchy.py: `hierarchy_rank.py LEG HOOK COUNT ROUNDS REPORT`, with torchrun's environment."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import paracomm
from paracomm import hooks


class Whole:
    """A bucket of one parameter."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.parameter = data, torch.nn.Parameter(data, requires_grad=False)

    def buffer(self) -> torch.Tensor:
        return self.data

    def index(self) -> int:
        return 0

    def gradients(self) -> list[torch.Tensor]:
        return [self.data]

    def parameters(self) -> list[torch.Tensor]:
        return [self.parameter]

    def is_last(self) -> bool:
        return True

    def set_buffer(self, buffer: torch.Tensor) -> None:
        self.data = buffer


def tx_bytes(host: int) -> int:
    return int(Path(f"/sys/class/net/v{host}/statistics/tx_bytes").read_text())


def leaders(leg: str, comm: Any) -> Any:
    """What the first ranks of the hosts meet on."""
    hosts = comm.host_indices
    firsts = [hosts.index(host) for host in sorted(set(hosts))]
    if leg == "gloo":
        dist.init_process_group("gloo")
        return dist.new_group(firsts)
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    return world.Split(0 if comm.rank in firsts else MPI.UNDEFINED, comm.rank)


def main(leg: str, hook: str, count: int, rounds: int, report: Path) -> None:
    torch.set_num_threads(1)
    comm = paracomm.init()
    between = leaders(leg, comm)
    state, function = hooks.make_hook(hook, comm, between=between)
    parts = [torch.randn(count, generator=torch.Generator().manual_seed(rank)) for rank in range(comm.world_size)]
    mean = torch.stack(parts).mean(0)
    bucket = Whole(parts[comm.rank].clone())
    host = comm.host_indices[comm.rank]
    comm.barrier()
    before = tx_bytes(host)
    for _ in range(rounds):
        bucket.data.copy_(parts[comm.rank])
        function(state, bucket).wait()
    comm.barrier()
    time.sleep(0.2)
    sent = tx_bytes(host) - before
    allowed = 1e-5 if hook == "hierarchical" else 1.1 * float(torch.stack(parts).abs().max()) / 127
    close = float((bucket.data - mean).abs().max()) <= allowed
    everyone = comm.all_gather(bucket.data)
    alike = all(torch.equal(other, bucket.data) for other in everyone)
    text = json.dumps({"right": close and alike, "host_bytes": sent, "rank": comm.rank, "pid": os.getpid()})
    report.write_text(text)
    comm.barrier()
    state.close()
    comm.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
