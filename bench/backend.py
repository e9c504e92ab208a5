"""The bars of the torch.distributed backend, each a command: `python bench/backend.py NAME` (or `all`).

`latency`, `large` and `collectives` time `torch.distributed`'s calls on Gloo and on paracomm, in turns; `ddp` a step of
DistributedDataParallel, one run, both backends in the same two processes. See bench/bars.py for how figures are kept.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from bars import Bar, closing, measure, p50, ratio, run_bars, start_all

from paracomm.cli.contest.case import COLLECTIVES, Case, parse_sizes, show_size
from paracomm.cli.contest.contenders import Runner
from paracomm.cli.contest.contest import Contest, Effort
from paracomm.cli.contest.launch import Place

OURS, GLOO = "torch:paracomm", "gloo"


def both(place: Place) -> list[Runner]:
    return start_all(place, ["torch=paracomm", "gloo"])


def latency(bar: Bar, effort: Effort) -> None:
    """dist.all_reduce of 8 B, 2 ranks."""
    with closing(both(Place(2))) as runners:
        f = measure(runners, [8], 2, effort, bar)
    ours = p50(f, OURS, 8)
    bar.hold("dist.all_reduce of 8 B, 2 ranks", ours and ours * 1e6, 25, at_least=False, unit="us")
    bar.hold("speed over Gloo at 8 B, 2 ranks", ratio(f, GLOO, OURS, 8), 10)


def large(bar: Bar, effort: Effort) -> None:
    """dist.all_reduce of 1 to 64 MiB, 2 ranks."""
    sizes = parse_sizes("1M:64M:4")
    with closing(both(Place(2))) as runners:
        f = measure(runners, sizes, 2, effort, bar)
    for nbytes in sizes:
        bar.hold(f"speed over Gloo at {show_size(nbytes)}, 2 ranks", ratio(f, GLOO, OURS, nbytes), 4)


def collectives(bar: Bar, effort: Effort, ranks: int) -> None:
    """Every collective, 8 B to 16 MiB: not slower than Gloo at any size."""
    with closing(both(Place(ranks))) as runners:
        contest = Contest(runners, effort)
        for collective in COLLECTIVES:
            for nbytes in [0] if collective == "barrier" else parse_sizes("8:16M:128"):
                in_place = collective in ("all_reduce", "reduce", "broadcast")
                cells = contest.run_size([Case(collective, nbytes, "float32", "sum", 0, in_place, ranks)])
                found = {cell.runner.label: cell.samples[in_place][1] for cell in cells}
                figures = {label: s.p50 for label, s in found.items() if s.p50s and not s.wrong}
                speed = figures[GLOO] / figures[OURS] if len(figures) == 2 else None
                what = f"{collective}, {ranks} ranks at {show_size(nbytes)}"
                if speed is None:
                    typer.echo(f"  {what}: " + ", ".join(f"{k}: {s.trouble or s.wrong}" for k, s in found.items()))
                bar.hold(f"speed over Gloo, {what}", speed, 1)


# --- a step of DistributedDataParallel ---

WIDTH, DEPTH, CONTEXT, BATCH = 384, 6, 16, 1


def ddp(bar: Bar, effort: Effort) -> None:
    """A GPT of 10.7 M parameters, 1 sequence of 16 bytes a rank, 2 processes: steps in turns on either backend."""
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    environment = Place(2).starts()
    ranks = [context.Process(target=ddp_rank, args=(start.env, 6 * effort.rounds, queue)) for start in environment]
    for process in ranks:
        process.start()
    found = queue.get()
    for process in ranks:
        process.join()
    typer.echo(
        f"  {found['parameters'] / 1e6:.1f} M parameters; step in ms: gloo {found['gloo_s'] * 1e3:.1f}, paracomm "
        f"{found['ours_s'] * 1e3:.1f}, without communication {found['alone_s'] * 1e3:.1f}"
    )
    bar.records.append({"what": "row", **found})
    bar.hold("share of Gloo's step that is communication", 1 - found["alone_s"] / found["gloo_s"], 0.3, unit="")
    bar.hold("step rate over Gloo's (median of the turns)", found["speed"], 1.3)
    bar.hold("largest difference of gradients from Gloo's, over the largest gradient", found["error"], 1e-5, False, "")
    bar.hold("gradients that differ between the ranks", found["unequal"], 0, False, "")


def ddp_rank(environment: dict[str, str], turns: int, queue: Any) -> None:
    os.environ |= environment
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel as DDP

    from paracomm.models.gpt import GPT, GPTConfig, next_byte_loss

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = {"gloo": dist.group.WORLD, "ours": dist.new_group(backend="paracomm")}
    config = GPTConfig(width=WIDTH, depth=DEPTH, heads=6, context=CONTEXT)
    models: dict[str, Any] = {name: DDP(GPT(config), process_group=group) for name, group in groups.items()}
    tokens = torch.randint(256, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(rank))

    def step(name: str, sync: bool = True) -> float:
        model = models[name]
        model.zero_grad()
        start = time.perf_counter()
        with contextlib.nullcontext() if sync else model.no_sync():
            next_byte_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        return time.perf_counter() - start

    times: dict[str, list[float]] = {"gloo": [], "ours": [], "alone": []}
    for turn in range(turns + 1):
        for name in sorted(times, reverse=turn % 2 == 1):
            dist.barrier(groups["ours"])
            seconds = [step("gloo" if name == "alone" else name, name != "alone") for _ in range(6)]
            times[name] += [statistics.median(seconds[1:])] * (turn > 0)
    step("gloo"), step("ours")
    gradients = {name: torch.cat([p.grad.flatten() for p in m.parameters()]) for name, m in models.items()}
    error = (gradients["gloo"] - gradients["ours"]).abs().max() / gradients["gloo"].abs().max()
    everybodys = [torch.empty_like(gradients["ours"]) for _ in range(2)]
    dist.all_gather(everybodys, gradients["ours"])
    if rank == 0:
        queue.put(
            {
                "parameters": gradients["ours"].numel(),
                **{f"{name}_s": statistics.median(seconds) for name, seconds in times.items()},
                "speed": statistics.median(g / o for g, o in zip(times["gloo"], times["ours"], strict=True)),
                "error": error.item(),
                "unequal": int((everybodys[0] != everybodys[1]).sum()),
            }
        )
    dist.barrier()
    dist.destroy_process_group()


def collectives_of(ranks: int) -> Callable[[Bar, Effort], None]:
    """The bar of that many ranks."""

    def run(bar: Bar, effort: Effort) -> None:
        collectives(bar, effort, ranks)

    run.__doc__ = collectives.__doc__
    return run


BARS = {
    "latency": latency,
    "large": large,
    "collectives-2": collectives_of(2),
    "collectives-4": collectives_of(4),
    "collectives-8": collectives_of(8),
    "ddp": ddp,
}


def main(
    names: Annotated[list[str], typer.Argument(help=f"{', '.join(BARS)}, or all")],
    rounds: Annotated[int, typer.Option(help="visits of every contender per size")] = 3,
    seconds: Annotated[float, typer.Option(help="about how long one visit measures")] = 0.1,
) -> None:
    """Measure bars of the backend. The status is 1 where one is short."""
    run_bars(BARS, names, "backend-", Effort(rounds=rounds, seconds=seconds))


if __name__ == "__main__":
    typer.run(main)
