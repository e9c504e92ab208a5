"""The bars of the gradient hooks, one function each: `python bench/ddp_hooks.py links [loss hierarchy]`.

links      needs root and iproute2: hosts are network namespaces (hosts.sh) on links of 1 Gbit/s.
loss       500 steps of the train command's model with its defaults, on 2 ranks of this host, from several seeds.
hierarchy  needs root; its MPI leg needs `paracomm bench --install-peers`.
hooks      needs root; no bar: every hook of ours on the jobs of `links` and `loss`, for the README.

A bar prints PASS or SHORT with its figure, and JSON lines go to bench/results/. How communication-bound a job is
follows from its own step without communication, which is measured beside it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer
from bars import Bar, hosts, run_bars
from hierarchy import hierarchy
from rich.console import Console

from paracomm.cli.contest.launch import Place
from paracomm.cli.ddp.case import PLAIN, Arrangement, Job, Outcome
from paracomm.cli.ddp.run import run, table

Found = dict[tuple[str, str], Outcome]
"""By engine and hook."""


def measure(bar: Bar, job: Job, place: Place, names: list[tuple[str, str]], title: str) -> Found:
    outcomes = run(job, [Arrangement(engine, hook) for engine, hook in names], place, lambda text: None)
    Console(width=120).print(table(outcomes, title))
    bar.records += [o.record() | {"what": "row", "title": title} for o in outcomes]
    for outcome in outcomes:
        if outcome.trouble:
            typer.echo(f"  {outcome.arrangement.label}: {outcome.trouble}")
    return {(o.arrangement.engine, o.arrangement.hook): o for o in outcomes if not o.trouble}


def over(found: Found, engine: str, hook: str, what: str) -> float | None:
    """Plain's figure / the hook's, on one engine."""
    plain, other = found.get((engine, PLAIN)), found.get((engine, hook))
    if plain is None or other is None or not getattr(other, what):
        return None
    return float(getattr(plain, what) / getattr(other, what))


def on_links(ranks: int) -> Job:
    """GPT of 13 M parameters, one sequence of 16 bytes a rank: a step is communication for the most part."""
    return Job(width=512, depth=4, heads=8, context=16, batch=ranks, steps=8, warm_up=2, bucket_mib=4)


def links(bar: Bar) -> None:
    """GPT of 13 M parameters, sequences of 16 bytes, 2 and 4 hosts of 1 rank, links of 1 Gbit/s."""
    for ranks in (2, 4):
        names = [(engine, hook) for engine in ("paracomm", "gloo") for hook in (PLAIN, "int8")]
        job, place, title = on_links(ranks), Place(ranks, tuple(range(ranks))), f"{ranks} hosts, 1 Gbit/s"
        with hosts(ranks, "1gbit"):
            found = measure(bar, job, place, names, title)
            found |= measure(bar, job.warmed_up(["int4"]), place, [("paracomm", "int4")], title)
        plain = found.get(("paracomm", PLAIN))
        if plain is not None:
            share = plain.exposed_s / plain.step_s
            typer.echo(f"  exposed communication is {share:.0%} of plain's step")
        for engine in ("paracomm", "gloo"):
            at = f"{engine}, {ranks} hosts"
            bar.hold(f"int8: fewer bytes, {at}", over(found, engine, "int8", "bytes_per_step"), 3.5)
            bar.hold(f"int8: step rate over plain's, {at}", over(found, engine, "int8", "step_s"), 2.5)
        bar.hold(f"int4: fewer bytes, paracomm, {ranks} hosts", over(found, "paracomm", "int4", "bytes_per_step"), 6.5)
        faster = over(found, "paracomm", "int4", "step_s")
        if faster is not None:
            typer.echo(f"  int4: step rate over plain's, paracomm, {ranks} hosts: {faster:.2f} x")


COMPRESSING = ("fp16", "bf16", "int8", "int4", "topk", "powersgd", "batched_powersgd")
MAIN_JOB = Job(steps=497, warm_up=3, lr_steps=500)
"""The train command's default model, text and optimizer, 500 steps."""
SEEDS = range(4)


def every_hook(bar: Bar) -> None:
    """Every compressing hook of ours: on the job of `links` with 2 hosts, and on the job of `loss` with one seed."""
    names = [("paracomm", hook) for hook in (PLAIN, *COMPRESSING)]
    with hosts(2, "1gbit"):
        measure(bar, on_links(2).warmed_up(COMPRESSING), Place(2, (0, 1)), names, "2 hosts, 1 Gbit/s")
    measure(bar, MAIN_JOB, Place(2), names, "500 steps of the main job's model")


def loss(bar: Bar) -> None:
    """The train command's default model, text and optimizer, 500 steps, 2 ranks: the mean loss of the last 50. One
    seed tells little, because a run that differs by rounding alone ends up to 1 % away: the mean over seeds counts."""
    hooks = ("int8", "int4")
    apart: dict[str, list[float]] = {hook: [] for hook in hooks}
    fewer: dict[str, float | None] = {}
    for seed in SEEDS:
        names = [("paracomm", hook) for hook in (PLAIN, *hooks)]
        found = measure(bar, replace(MAIN_JOB, seed=seed), Place(2), names, f"500 steps, seed {seed}")
        plain = found.get(("paracomm", PLAIN))
        for hook in hooks:
            other = found.get(("paracomm", hook))
            if plain is not None and other is not None and plain.final_loss and other.final_loss:
                apart[hook].append(100 * (other.final_loss / plain.final_loss - 1))
            fewer[hook] = over(found, "paracomm", hook, "bytes_per_step")
    for hook, by_seed in apart.items():
        typer.echo(f"  {hook}, by seed: {', '.join(f'{x:+.2f} %' for x in by_seed)}")
        mean = sum(by_seed) / len(by_seed) if len(by_seed) == len(SEEDS) else None
        bar.hold(f"{hook}: final loss above plain's", mean, 0.5, at_least=False, unit="%")
    for hook, least in (("int8", 3.5), ("int4", 6.5)):
        bar.hold(f"{hook}: fewer bytes, all 500 steps", fewer.get(hook), least)


BARS = {"links": links, "loss": loss, "hierarchy": hierarchy, "hooks": every_hook}


def main(names: Annotated[list[str], typer.Argument(help=f"{', '.join(BARS)}, or all")]) -> None:
    """Measure bars. The status is 1 where one is short."""
    run_bars(BARS, names, "hooks-")


if __name__ == "__main__":
    typer.run(main)
