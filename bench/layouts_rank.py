"""One rank of bench/layouts.py: `layouts_rank.py SOCKET TASK`, started as torchrun would by contest.launch.

It speaks the contest's protocol (launch.Group): says its rank, answers {"do": "measure"}, and ends at {"do": "quit"}.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import paracomm
from paracomm.hooks.lane import keeps_order
from paracomm.models import Decoder, DecoderConfig
from paracomm.parallel import DataParallel, Mesh, parallelize
from paracomm.parallel.bucket import MIB, all_reduce_hook

VOCABULARY = 512
AGREEMENT = 1e-4


@dataclass(frozen=True)
class Task:
    """kind: "ddp", "fsdp", "tp", "fsdp+tp" (tp of 2) or "overlap". `batch` sequences of `context` over all ranks."""

    kind: str
    width: int = 256
    depth: int = 4
    context: int = 128
    batch: int = 8
    bucket_mib: int = 4
    rounds: int = 9
    block: int = 2

    def tp(self, ranks: int) -> int:
        return {"tp": ranks, "fsdp+tp": 2}.get(self.kind, 1)

    def model(self) -> Decoder:
        config = DecoderConfig(self.width, self.depth, 8, self.context, vocabulary=VOCABULARY, tied=False)
        return Decoder(config)

    def tokens(self, index: int) -> Tensor:
        """The whole batch of a step, [batch, context + 1]."""
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, VOCABULARY, (self.batch, self.context + 1), generator=generator)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Fused, which takes tensors and torch's DTensors in groups of their own only."""
    found = list(model.parameters())
    groups = [[p for p in found if isinstance(p, DTensor) == spread] for spread in (False, True)]
    return torch.optim.AdamW([{"params": group} for group in groups if group], lr=1e-3, fused=True)


class Contender:
    """A model and its optimizer on this rank; step() is one step of training, from tokens [B, T + 1] of this rank."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def finish(self) -> None: ...

    def step(self, tokens: Tensor) -> Tensor:
        """This rank's mean loss."""
        self.optimizer.zero_grad()
        total, count = self.model(tokens[:, :-1], tokens[:, 1:])
        loss: Tensor = total / count
        loss.backward()
        self.finish()
        self.optimizer.step()
        return loss.detach()


class Ours(Contender):
    def __init__(self, task: Task, comm: Any) -> None:
        mesh = Mesh(comm, tp=task.tp(comm.world_size))
        model = parallelize(task.model(), mesh)
        if task.kind == "tp":
            self.model, self.optimizer = model, adamw(model)
            return
        zero = 0 if task.kind == "ddp" else 3
        self.model = DataParallel(model, mesh, zero=zero, bucket_bytes=task.bucket_mib * MIB)
        self.optimizer = self.model.optimizer(torch.optim.AdamW, lr=1e-3, fused=True)
        self.finish = self.model.finish  # type: ignore[method-assign]


class LinearHead(nn.Linear):
    """The model's head as torch's tensor parallel takes it."""

    def loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        logits = self(x).flatten(0, -2)
        return F.cross_entropy(logits, targets.flatten(), reduction="sum"), targets.numel()


class Theirs(Contender):
    """torch on Gloo, each as its documentation has it; with `alone`, on a mesh of this rank only."""

    def __init__(self, task: Task, alone: bool = False) -> None:
        ranks, tp = dist.get_world_size(), task.tp(dist.get_world_size())
        shape = (ranks, 1, 1) if alone else (1, ranks // tp, tp)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "dp", "tp"))
        model: nn.Module = task.model()
        if task.kind == "ddp":
            model = DistributedDataParallel(
                model, process_group=mesh["dp"].get_group(), gradient_as_bucket_view=True,
                bucket_cap_mb=task.bucket_mib,
            )  # fmt: skip
        if tp > 1:
            model = self._tensor_parallel(model, mesh["tp"])
        if "fsdp" in task.kind:
            for block in model.blocks:  # type: ignore[union-attr]
                fully_shard(block, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
        self.model, self.optimizer = model, adamw(model)

    def _tensor_parallel(self, model: Any, mesh: Any) -> nn.Module:
        head = LinearHead(*reversed(model.head.weight.shape), bias=False)
        head.weight = model.head.weight
        model.head = head
        plan: dict[str, Any] = {
            "token": RowwiseParallel(input_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Replicate()),
        }
        for index, each in enumerate(model.blocks):
            # A rank is to have its own queries, keys and values, where torch cuts the matrix into neighbouring rows.
            fused = each.attention.qkv.weight.data
            fused.copy_(fused.unflatten(0, (3, mesh.size(), -1)).transpose(0, 1).flatten(0, 2).clone())
            block = f"blocks.{index}"
            plan |= {f"{block}.attention.qkv": ColwiseParallel(), f"{block}.attention.out": RowwiseParallel()}
            plan |= {f"{block}.mlp.up": ColwiseParallel(), f"{block}.mlp.down": RowwiseParallel()}
        found: nn.Module = parallelize_module(model, mesh, plan)
        return found


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def timed_together(comm: Any, function: Callable[[], Any]) -> float:
    """Until all ranks are through, which share cores."""

    def all_of_them() -> None:
        function()
        comm.barrier()

    comm.barrier()
    return timed(all_of_them)


def against_torch(task: Task, comm: Any) -> dict[str, Any]:
    """Seconds of a step in turns of ours and torch's, and of the same computation with nobody to wait for."""
    dist.init_process_group("gloo")
    tp = task.tp(comm.world_size)
    shards, shard = comm.world_size // tp, comm.rank // tp

    def mine(index: int) -> Tensor:
        return task.tokens(index).tensor_split(shards)[shard]

    contenders = {"ours": Ours(task, comm), "torch": Theirs(task)}
    losses = {name: [float(each.step(mine(index))) for index in range(3)] for name, each in contenders.items()}
    apart = max(abs(a / b - 1) for a, b in zip(*losses.values(), strict=True))
    if apart > AGREEMENT:
        raise AssertionError(f"losses are {apart:.1e} apart: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(task.rounds):
        names = list(contenders) if round_ % 2 else list(reversed(contenders))
        for name in names:
            each = contenders[name]
            batches = [mine(3 + round_ * task.block + index) for index in range(task.block)]
            comm.barrier()
            seconds[name].append(timed(lambda: [each.step(tokens) for tokens in batches]) / task.block)  # noqa: B023
    return {"seconds": seconds, "compute_s": compute_alone(task, comm, mine(0)), "loss": losses["ours"][-1]}


def compute_alone(task: Task, comm: Any, tokens: Tensor, times: int = 5) -> float:
    """Seconds of torch's step without its communication: each rank's own step as if it had no peers, forward and
    backward over tp, the optimizer over all who share its state."""
    alone = Theirs(task, alone=True)
    alone.step(tokens)
    owners = 1 if task.kind == "ddp" else comm.world_size
    whole, optimizer = [], []
    for _ in range(times):
        whole.append(timed_together(comm, lambda: alone.step(tokens)))
        optimizer.append(timed_together(comm, alone.optimizer.step))
    update = statistics.median(optimizer)
    return (statistics.median(whole) - update) / task.tp(comm.world_size) + update / owners


# --- overlap ---
class Nothing:
    """What a hook that sends nothing returns."""

    def wait(self) -> None: ...


@keeps_order
def nothing_hook(state: Any, bucket: Any) -> Nothing:
    return Nothing()


class Watched:
    """The default hook with the times at which each bucket left and was there, seen by a thread that looks often."""

    PAUSE_S = 0.001

    def __init__(self) -> None:
        self.spans: list[list[float]] = []
        self._open: list[tuple[list[float], Any]] = []
        self._lock = threading.Lock()
        self._stop = False
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        self.hook = keeps_order(lambda comm, bucket: self._start(comm, bucket))

    def _start(self, comm: Any, bucket: Any) -> Any:
        span = [time.perf_counter()]
        work = all_reduce_hook(comm, bucket)
        with self._lock:
            self.spans.append(span)
            self._open.append((span, work))
        return work

    def _look(self) -> None:
        while not self._stop:
            with self._lock:
                while self._open and self._open[0][1].done():  # they are done in the order in which they left
                    self._open.pop(0)[0].append(time.perf_counter())
            time.sleep(self.PAUSE_S)

    def take(self) -> list[list[float]]:
        """The spans of a step whose finish() has returned."""
        while self._open:
            time.sleep(self.PAUSE_S)
        spans, self.spans = self.spans, []
        return spans

    def close(self) -> None:
        self._stop = True
        self._thread.join()


def overlap(task: Task, comm: Any) -> dict[str, Any]:
    """Of each step, in turns with and without communication: seconds by three measures."""
    parallel = DataParallel(task.model(), comm, bucket_bytes=task.bucket_mib * MIB)
    optimizer, watched = parallel.optimizer(torch.optim.AdamW, lr=1e-3, fused=True), Watched()
    rows: dict[str, list[float]] = {name: [] for name in ("step", "backward", "blocked", "events", "quiet", "alone")}

    def step(index: int) -> tuple[float, float, float]:
        """When it began, when backward ended, when it was over."""
        tokens = task.tokens(index).tensor_split(comm.world_size)[comm.rank]
        comm.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        total, count = parallel(tokens[:, :-1], tokens[:, 1:])
        begun = time.perf_counter()
        (total / count).backward()
        done = time.perf_counter()
        parallel.finish()
        optimizer.step()
        end = time.perf_counter()
        rows["backward"].append(done - begun)
        return start, done, end

    for index in range(task.rounds):
        parallel.reducer.set_hook(watched.hook)
        before = parallel.blocked_s
        start, done, end = step(index)
        spans = watched.take()
        rows["step"].append(end - start)
        rows["blocked"].append(parallel.blocked_s - before)
        rows["events"].append(max(0.0, max(span[1] for span in spans) - done))
        parallel.reducer.set_hook(nothing_hook)
        start, _, end = step(index)
        rows["quiet"].append(end - start)
        comm.barrier()
        rows["alone"].append(timed(lambda: reduce_all(parallel, comm)))
    watched.close()
    sent = sum(bucket.data.nbytes for bucket in parallel.reducer.buckets if bucket.data is not None)
    return {"rows": {name: values[1:] for name, values in rows.items()}, "bytes": sent}


def reduce_all(parallel: DataParallel, comm: Any) -> None:
    """A step's communication with nothing beside it."""
    for work in [all_reduce_hook(comm, bucket) for bucket in parallel.reducer.buckets]:
        work.wait()


def serve(path: str, answer: Callable[[Any], dict[str, Any]]) -> None:
    """Connects this rank, and gives what answer(communicator) gives whenever it is asked to measure."""
    torch.set_num_threads(1)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as control:
        control.connect(path)
        stream = control.makefile("rw", encoding="utf-8")

        def say(reply: dict[str, Any]) -> None:
            stream.write(json.dumps(reply) + "\n")
            stream.flush()

        try:
            comm = paracomm.init()
        except BaseException:
            say({"error": traceback.format_exc(limit=-3), "pid": os.getpid()})
            raise
        say({"rank": comm.rank, "pid": os.getpid()})
        for line in stream:
            if json.loads(line)["do"] == "quit":
                break
            try:
                say(answer(comm))
            except Exception:
                say({"error": traceback.format_exc(limit=-3)})
        comm.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def main(path: str, described: str) -> None:
    task = Task(**json.loads(described))
    serve(path, lambda comm: (overlap if task.kind == "overlap" else against_torch)(task, comm))


if __name__ == "__main__":
    main(*sys.argv[1:])
