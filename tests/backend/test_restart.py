"""kill -9 of a rank inside DistributedDataParallel's backward: survivors raise at once, and torchrun goes on from the
checkpoint."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Rank, rank_outcomes
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def model() -> DDP:
    torch.manual_seed(0)
    return DDP(nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)]), bucket_cap_mb=0.02)


def die(grad: torch.Tensor) -> None:
    time.sleep(0.5)  # the others are at the end of their backward passes, where they wait for this rank
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_backward(rank: Rank) -> tuple[float, str, str]:
    torch.set_num_threads(1)
    dist.init_process_group("paracomm")
    net = model()
    x = torch.ones(2, 64)
    net(x).sum().backward()
    if rank.rank == 1:
        net.module[3].weight.register_hook(die)
    try:
        while True:
            net(x).sum().backward()
    except RuntimeError as error:
        return time.monotonic(), type(error).__name__, str(error)


def test_killed_in_backward() -> None:
    start = time.monotonic()
    outcomes = rank_outcomes(3, die_in_backward, casualties=[1])
    for rank in (0, 2):
        assert not outcomes[rank].failure, outcomes[rank].failure
        raised, name, text = outcomes[rank].value
        assert name == "PeerLost", text
        assert re.search(r"all_reduce\[\w+\] #\d+ rank [02] \(.+\).* rank 1 \(.+\)", text), text
        assert raised - start < 30


SCRIPT = """
import json, os, signal, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

folder, attempt = sys.argv[1], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
torch.set_num_threads(1)
dist.init_process_group("paracomm")
rank = dist.get_rank()
torch.manual_seed(0)
net = DDP(torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(4)]), bucket_cap_mb=0.001)
optimizer = torch.optim.SGD(net.parameters(), 0.01)
path, first = folder + "/checkpoint", 0
if os.path.exists(path):
    saved = torch.load(path)
    net.load_state_dict(saved["model"]); first = saved["step"]
if attempt == 0 and rank == 1:
    def die(grad, seen=[0]):
        seen[0] += 1
        if seen[0] == 6: os.kill(os.getpid(), signal.SIGKILL)
    net.module[1].weight.register_hook(die)
for step in range(first, 10):
    torch.manual_seed(100 * step + rank)
    net(torch.randn(4, 16)).square().mean().backward()
    optimizer.step(); optimizer.zero_grad()
    if rank == 0:
        torch.save({"model": net.state_dict(), "step": step + 1}, path + ".new"); os.replace(path + ".new", path)
    dist.barrier()
if rank == 0:
    total = sum(p.double().sum().item() for p in net.parameters())
    json.dump({"first": first, "attempt": attempt, "sum": total}, open(folder + "/done", "w"))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_restart_from_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    sums = []
    for restarts in (1, 0):
        folder = tmp_path / str(restarts)
        folder.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [f"--max-restarts={restarts}", str(tmp_path / "script.py"), str(folder)]
        # Without restarts: the same from the start of a later attempt, so that nobody dies.
        script = SCRIPT if restarts else SCRIPT.replace("if attempt == 0 and", "if False and")
        (tmp_path / "script.py").write_text(script)
        done = subprocess.run(command, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr
        found = json.loads((folder / "done").read_text())
        assert (found["attempt"], found["first"]) == ((1, 5) if restarts else (0, 0))
        sums.append(found["sum"])
    assert sums[0] == sums[1]
