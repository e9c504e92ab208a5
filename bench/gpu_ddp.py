"""DistributedDataParallel on GPUs through the backend "paracomm": gradients of the whole batch, equal on all ranks.

    torchrun --standalone --nproc-per-node 2 bench/gpu_ddp.py

Plain, and with the hooks that cast to 16 bits and that quantise. Ranks beyond the number of GPUs share them. With
PARACOMM_DEVICE=emulated it runs on emulated GPUs. A line a case; the exit code is 1 if one is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from paracomm import hooks

STEPS = 5
ROWS = 8
BUCKET_MB = 0.05
CASES: dict[str, tuple[Callable[..., Any] | None, float]] = {
    "plain": (None, 1e-5),
    "bf16": (hooks.bf16_hook, 2**-6),
    "int8": (hooks.int8_hook, 2**-5),
}
"""The hook, and how far the first step's gradients may be off, beside the largest of them."""


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(97, 513), nn.GELU(), nn.Linear(513, 129), nn.GELU(), nn.Linear(129, 7))


def batch(step: int, rank: int, where: torch.device) -> Tensor:
    return torch.randn(ROWS, 97, generator=torch.Generator().manual_seed(100 * step + rank)).to(where)


def loss(output: Tensor) -> Tensor:
    return output.square().mean()


def whole_gradients(module: nn.Module, step: int, world_size: int, where: torch.device) -> list[Tensor]:
    """The mean over all ranks' batches, computed here."""
    losses = [loss(module(batch(step, rank, where))) for rank in range(world_size)]
    return list(torch.autograd.grad(torch.stack(losses).mean(), list(module.parameters())))


def furthest(ddp: DistributedDataParallel, step: int, where: torch.device) -> float:
    """One step's gradients beside the whole batch's: the largest difference over the largest gradient."""
    want = whole_gradients(ddp.module, step, dist.get_world_size(), where)
    ddp.zero_grad()
    loss(ddp(batch(step, dist.get_rank(), where))).backward()
    largest = max(float(gradient.abs().max()) for gradient in want)
    got = [parameter.grad for parameter in ddp.parameters() if parameter.grad is not None]
    return max(float((g - w).abs().max()) for g, w in zip(got, want, strict=True)) / largest


def equal_on_all_ranks(ddp: DistributedDataParallel) -> bool:
    flat = torch.cat([parameter.grad.reshape(-1) for parameter in ddp.parameters() if parameter.grad is not None])
    everybodys = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everybodys, flat)
    return all(torch.equal(theirs, flat) for theirs in everybodys)


def check(name: str, where: torch.device) -> bool:
    hook, tolerance = CASES[name]
    ddp = DistributedDataParallel(model().to(where), bucket_cap_mb=BUCKET_MB)
    if hook is not None:
        hooks.register(ddp, hook)
    errors, same = [], True
    for step in range(STEPS):
        errors.append(furthest(ddp, step, where))
        same = same and equal_on_all_ranks(ddp)
    # What a lossy step loses comes back in the next one, so that only the first can be held to the hook's error.
    good = same and errors[0] <= tolerance and (hook is not None or max(errors) <= tolerance)
    if dist.get_rank() == 0:
        ranks = "equal on all ranks" if same else "DIFFER between ranks"
        typer.echo(f"ddp {name:6} error {errors[0]:.1e} (at most {tolerance:.1e}), {ranks}{'' if good else '  WRONG'}")
    return good


def main() -> None:
    emulated = os.environ.get("PARACOMM_DEVICE") == "emulated"
    where = torch.device("cpu")
    if not emulated:
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(where)
    dist.init_process_group("paracomm", timeout=timedelta(seconds=60))
    try:
        good = [check(name, where) for name in CASES]
    finally:
        dist.destroy_process_group()
    raise typer.Exit(0 if all(good) else 1)


if __name__ == "__main__":
    typer.run(main)
