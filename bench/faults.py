"""Kills and stops ranks in the middle of mixed collectives, and looks at how the others end.

    python bench/faults.py [--kills 100] [--stops 20] [--backwards 20] [--seed 0] [--json FILE]

Worlds of 2 to 5 ranks over shared memory, TCP, and both; in every third trial each rank has a forked data loader.
"backward" is a kill -9 inside the backward pass of torch's DistributedDataParallel on the backend "paracomm".
The bar: every survivor raises PeerLost within 1 s of a kill -9, Timeout within timeout + 1 s of a SIGSTOP; the error
names operation, number, rank and host; nothing stays in /dev/shm; no process stays.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import random
import re
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch  # here, so that forked ranks have it at once
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from ranks import Rank, rank_outcomes

import paracomm

RESULTS = Path(__file__).with_name("results") / "faults.jsonl"
TRANSPORTS = ("shm", "tcp", "mixed")
GRACE_S = 1.0  # after a kill; after the timeout of a stopped rank's peers
STOP_TIMEOUT_S = 1.0
HANG_S = 20.0
# "all_reduce[ring] #7 rank 3 (hostA)", then what happened with whom
PLACE = re.compile(r"^\w+(\[\w+\])? #\d+ rank \d+ \(.+?\).*rank \d+ \(", re.DOTALL)


@dataclass(frozen=True)
class Trial:
    """One world that loses `victim` after `delay_s` of collectives."""

    seed: int
    fault: str  # "kill" | "stop" | "backward"
    transport: str
    world_size: int
    victim: int
    delay_s: float
    loaders: bool

    @property
    def limit_s(self) -> float:
        return GRACE_S + (STOP_TIMEOUT_S if self.fault == "stop" else 0.0)


@dataclass
class Result:
    """`late_s`: from the fault to the last survivor's exception; `troubles`: what was not as it must be."""

    trial: Trial
    late_s: float
    troubles: list[str]


def make_trials(kills: int, stops: int, backwards: int, seed: int) -> list[Trial]:
    """All combinations of transport and world in turn; victim and moment are random."""
    chance = random.Random(seed)
    trials = []
    for i, fault in enumerate(["kill"] * kills + ["stop"] * stops + ["backward"] * backwards):
        transport, world_size = TRANSPORTS[i % 3], 2 + i // 3 % 4
        if transport == "mixed":
            world_size = max(world_size, 3)
        delay_s = chance.uniform(0.0, 0.3)
        trials.append(
            Trial(
                chance.randrange(1 << 30),
                fault,
                transport,
                world_size,
                chance.randrange(world_size),
                delay_s,
                i % 3 == 0,
            )
        )
    chance.shuffle(trials)
    return trials


# --- what the ranks do ---
def operations(comm: Any, chance: random.Random) -> Callable[[], object]:
    """The next collective; every rank draws the same."""
    n, rank = comm.world_size, comm.rank
    count = chance.choice((1, 7, 1000, 30_000, 500_000))
    root = chance.randrange(n)
    x = np.ones(count, np.float32)

    def in_flight() -> None:
        works = [comm.all_reduce(np.ones(count + i, np.float32), async_op=True) for i in range(3)]
        for work in works:
            work.wait()

    def around() -> None:
        arriving = np.empty_like(x)
        works = [comm.send(x, (rank + 1) % n, async_op=True), comm.recv(arriving, (rank - 1) % n, async_op=True)]
        for work in works:
            work.wait()

    choices: list[Callable[[], object]] = [
        lambda: comm.all_reduce(x),
        lambda: comm.broadcast(x, root),
        lambda: comm.reduce(x, root),
        lambda: comm.all_gather(x),
        lambda: comm.reduce_scatter(np.ones(count * n, np.float32)),
        lambda: comm.all_to_all(np.ones(count * n, np.float32)),
        comm.barrier,
        in_flight,
        around,
    ]
    return chance.choice(choices)


def suffer(trial: Trial, moment: mmap.mmap) -> None:
    moment[:8] = struct.pack("d", time.monotonic())
    os.kill(os.getpid(), signal.SIGSTOP if trial.fault == "stop" else signal.SIGKILL)


def backward_member(rank: Rank, trial: Trial, moment: mmap.mmap) -> tuple[str, str, float]:
    """Steps of DistributedDataParallel until one raises; the victim dies in a gradient's hook, buckets in flight."""
    torch.set_num_threads(1)
    settings = {"shm": {}, "tcp": {"transport": "tcp"}, "mixed": {"host_id": f"faults-{rank.rank % 2}"}}
    dist.init_process_group("paracomm", pg_options=settings[trial.transport])
    net = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(8)])
    model = DistributedDataParallel(net, bucket_cap_mb=0.3)
    x = torch.ones(4, 256)
    model(x).sum().backward()
    if rank.rank == trial.victim:
        until = time.monotonic() + trial.delay_s

        def die(_: Any) -> None:
            if time.monotonic() > until:
                suffer(trial, moment)

        net[trial.seed % 7].weight.register_hook(die)
    while True:
        try:
            model(x).sum().backward()
        except Exception as error:
            now, name, text = time.monotonic(), type(error).__name__, str(error)
            # Between hosts torch's reducer holds a future, and its C++ makes our error a RuntimeError that quotes it.
            quoted = re.search(r"callback: (\w+): (.*)", text) if name == "RuntimeError" else None
            return (*quoted.groups(), now) if quoted else (name, text, now)


def member(rank: Rank, trial: Trial, moment: mmap.mmap) -> tuple[str, str, float]:
    """Collectives until one raises: (type of the exception, its text, when)."""
    settings: dict[str, Any] = {"timeout_s": 60.0 if trial.fault == "kill" else STOP_TIMEOUT_S}
    if trial.transport == "tcp":
        settings["transport"] = "tcp"
    elif trial.transport == "mixed":
        settings["host_id"] = f"faults-{rank.rank % 2}"
    comm = rank.connect(**settings)
    comm.barrier()
    if trial.loaders and os.fork() == 0:
        while True:
            signal.pause()
    if rank.rank == trial.victim:
        timer = threading.Timer(trial.delay_s, suffer, (trial, moment))
        timer.daemon = True
        timer.start()
    chance = random.Random(trial.seed)
    while True:
        operation = operations(comm, chance)
        try:
            operation()
        except Exception as error:
            ended = (type(error).__name__, str(error), time.monotonic())
            comm.close()
            return ended


# --- how they ended ---
def run_trial(trial: Trial) -> Result:
    names_before = set(os.listdir("/dev/shm"))
    moment = mmap.mmap(-1, 8)
    outcomes = rank_outcomes(
        trial.world_size,
        backward_member if trial.fault == "backward" else member,
        trial,
        moment,
        timeout_s=HANG_S,
        casualties=[trial.victim] if trial.fault == "stop" else [],
    )
    (at,) = struct.unpack("d", moment[:8])
    troubles, late_s = [], 0.0
    expected = "Timeout" if trial.fault == "stop" else "PeerLost"
    for outcome in outcomes:
        if outcome.rank == trial.victim:
            continue
        who = f"rank {outcome.rank}"
        if not outcome.ended:
            troubles.append(f"{who} hangs")
            continue
        if outcome.value is None:
            troubles.append(outcome.failure or f"{who} returned nothing")
            continue
        name, text, raised = outcome.value
        late_s = max(late_s, raised - at)
        if name != expected:
            troubles.append(f"{who} raised {name}: {text}")
        if raised - at > trial.limit_s:
            troubles.append(f"{who} raised {raised - at:.2f} s after the {trial.fault}: {text}")
        if not PLACE.search(text) or (expected == "PeerLost" and f"rank {trial.victim} (" not in text):
            troubles.append(f"{who} does not say where or who: {text}")
    left = set(os.listdir("/dev/shm")) - names_before
    if any("paracomm" in name for name in left):
        troubles.append(f"left in /dev/shm: {sorted(left)}")
    if children := psutil.Process().children(recursive=True):
        troubles.append(f"left processes: {children}")
    return Result(trial, late_s, troubles)


def summarise(results: list[Result]) -> list[dict[str, object]]:
    """One row a fault and transport."""
    rows: list[dict[str, object]] = []
    for fault in ("kill", "stop", "backward"):
        for transport in TRANSPORTS:
            here = [r for r in results if (r.trial.fault, r.trial.transport) == (fault, transport)]
            if not here:
                continue
            late = sorted(r.late_s for r in here)
            rows.append(
                {
                    "fault": fault,
                    "transport": transport,
                    "trials": len(here),
                    "survivors": sum(r.trial.world_size - 1 for r in here),
                    "failed": sum(bool(r.troubles) for r in here),
                    "hangs": sum("hangs" in trouble for r in here for trouble in r.troubles),
                    "median_s": round(late[len(late) // 2], 3),
                    "max_s": round(late[-1], 3),
                    "limit_s": here[0].trial.limit_s,
                }
            )
    return rows


def show(rows: list[dict[str, object]]) -> None:
    if rows:
        print("  ".join(f"{name:>9s}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value!s:>9s}" for value in row.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--backwards", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS, help="file that the JSON line is added to")
    args = parser.parse_args()
    start, results = time.monotonic(), []
    for trial in make_trials(args.kills, args.stops, args.backwards, args.seed):
        results.append(run_trial(trial))
        for trouble in results[-1].troubles:
            print(f"FAILED {trial}: {trouble}", flush=True)
    rows = summarise(results)
    show(rows)
    failed = sum(bool(result.troubles) for result in results)
    print(f"{len(results)} trials, {failed} failed, {time.monotonic() - start:.0f} s")
    line = {
        "bench": "faults", "version": paracomm.__version__, "machine": platform.node(), "cores": os.cpu_count(),
        "seed": args.seed, "rows": rows, "failures": [asdict(r) for r in results if r.troubles],
    }  # fmt: skip
    args.json.parent.mkdir(exist_ok=True)
    with args.json.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
