"""One rank of an arrangement: `python worker.py SOCKET ARRANGEMENT`, started as torchrun would by contest.launch.

It speaks the contest's protocol (launch.Group): says its rank, answers {"do": "train"}, and ends at {"do": "quit"}.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import paracomm
from paracomm import hooks
from paracomm.cli.contest.sockets import tcp_bytes_acked
from paracomm.models import GPT, GPTConfig, next_byte_loss
from paracomm.parallel import DataParallel
from paracomm.parallel.bucket import MIB
from paracomm.train.data import batch, load_corpus

COMPUTE_STEPS = 5


def torchs_hook(name: str) -> tuple[Any, Callable[..., Any]]:
    """(state, hook) of a hook of torch's, by its function's name."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook, quantization_hooks

    for module in (default_hooks, powerSGD_hook, quantization_hooks):
        if hasattr(module, name):
            is_power = module is powerSGD_hook
            state = powerSGD_hook.PowerSGDState(None, 4, start_powerSGD_iter=2) if is_power else dist.group.WORLD
            return state, getattr(module, name)
    raise LookupError(f"torch has no hook '{name}'")


class Rank:
    """The model of one rank, under the engine and the hook of the arrangement."""

    def __init__(self, engine: str, hook: str, job: dict[str, Any]) -> None:
        self.job = job
        torch.set_num_threads(1)
        self.comm = paracomm.init() if engine == "paracomm" else None
        if engine != "paracomm" or hook.startswith("torch:"):
            dist.init_process_group("paracomm" if engine == "ddp+paracomm" else "gloo")
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.model = GPT(GPTConfig(job["width"], job["depth"], job["heads"], job["context"]), seed=job["seed"])
        self.replica = self._replicate()
        self.state: Any = None
        if hook != "plain":
            self._register(hook)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=job["lr"], betas=(0.9, 0.95), fused=True)
        self.corpus = load_corpus()

    def _replicate(self) -> Any:
        bucket_mib = self.job["bucket_mib"]
        if self.comm is not None:
            first = max(1, min(MIB, int(bucket_mib * MIB) // 4))
            return DataParallel(self.model, self.comm, bucket_bytes=int(bucket_mib * MIB), first_bucket_bytes=first)
        return DistributedDataParallel(self.model, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mib)

    def _register(self, name: str) -> None:
        if name.startswith("torch:"):
            state, hook = torchs_hook(name.removeprefix("torch:"))
        else:
            state, hook = hooks.make_hook(name, self.comm)
            self.state = state
        hooks.register(self.replica, hook, state)

    def learning_rate(self, step: int) -> float:
        """The train command's: a warm-up over a twentieth, then a cosine to a tenth."""
        import math

        total = self.job["lr_steps"] or self.job["steps"]
        warm_up = max(1, total // 20)
        if step < warm_up:
            return float(self.job["lr"] * (step + 1) / warm_up)
        progress = min(1.0, (step - warm_up) / max(1, total - warm_up))
        return float(self.job["lr"] * (0.1 + 0.45 * (1 + math.cos(math.pi * progress))))

    def step(self, index: int) -> float:
        """One training step; this rank's loss."""
        x_BT, y_BT = batch(
            self.corpus.train, self.job["context"], self.job["batch"], seed=self.job["seed"], step=index,
            rank=self.rank, world_size=self.world_size,
        )  # fmt: skip
        self.model.zero_grad()
        loss = next_byte_loss(self.replica(x_BT), y_BT)
        loss.backward()
        if self.comm is not None:
            self.replica.finish()
        self._update(index)
        return float(loss.detach())

    def _update(self, index: int) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(index)
        self.optimizer.step()
        if hasattr(self.state, "average"):
            self.state.average(self.model)

    def step_alone(self, index: int) -> None:
        """The same without communication."""
        x_BT, y_BT = batch(
            self.corpus.train, self.job["context"], self.job["batch"], seed=self.job["seed"], step=index,
            rank=self.rank, world_size=self.world_size,
        )  # fmt: skip
        self.model.zero_grad()
        with self.replica.no_sync():
            next_byte_loss(self.replica(x_BT), y_BT).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def meet(self) -> None:
        if self.comm is not None:
            self.comm.barrier()
        else:
            dist.barrier()

    def sent(self) -> tuple[str, float]:
        """Who counts, and bytes sent so far."""
        base = hooks.wire_of(None if dist.is_initialized() else self.comm)
        wires = [base, *([] if self.state is None else self.state.wires())]
        ours = {id(wire.comm): wire for wire in wires if isinstance(wire, hooks.CommWire)}
        if ours:
            return "Communicator.bytes_sent", sum(wire.bytes_sent() for wire in ours.values())
        return "TCP_INFO", sum(tcp_bytes_acked().values())

    def train(self) -> dict[str, Any]:
        job, losses, seconds = self.job, [], []
        for index in range(job["warm_up"]):
            losses.append(self.step(index))
        self.meet()
        time.sleep(0.05)  # what was sent is acknowledged
        counted_by, before = self.sent()
        for index in range(job["warm_up"], job["warm_up"] + job["steps"]):
            start = time.perf_counter()
            losses.append(self.step(index))
            seconds.append(time.perf_counter() - start)
        self.meet()
        time.sleep(0.05)
        sent = (self.sent()[1] - before) / job["steps"]
        alone = []
        for index in range(COMPUTE_STEPS):
            self.meet()
            start = time.perf_counter()
            self.step_alone(index)
            alone.append(time.perf_counter() - start)
        return {
            "step_s": statistics.median(seconds), "compute_s": statistics.median(alone), "bytes_per_step": sent,
            "counted_by": counted_by, "losses": losses, "parameters": sum(p.numel() for p in self.model.parameters()),
        }  # fmt: skip

    def close(self) -> None:
        if self.state is not None:
            self.state.close()
        if self.comm is not None:
            self.comm.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def main(path: str, described: str) -> None:
    arrangement = json.loads(described)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as control:
        control.connect(path)
        stream = control.makefile("rw", encoding="utf-8")

        def say(reply: dict[str, Any]) -> None:
            stream.write(json.dumps(reply) + "\n")
            stream.flush()

        try:
            rank = Rank(arrangement["engine"], arrangement["hook"], arrangement["job"])
        except BaseException:
            say({"error": traceback.format_exc(limit=-3), "pid": os.getpid()})
            raise
        say({"rank": rank.rank, "pid": os.getpid()})
        for line in stream:
            if json.loads(line)["do"] == "quit":
                break
            try:
                say(rank.train())
            except Exception as error:
                say({"error": f"{type(error).__name__}: {error}"})
        rank.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
