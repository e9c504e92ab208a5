"""`paracomm verify`: the proof of every algorithm at every world size, and how many wrong schedules it catches."""

from __future__ import annotations

import importlib
import json as json_module
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from paracomm.cli.options import count, parts, real
from paracomm.errors import Error
from paracomm.schedule import build
from paracomm.schedule import verify as prove
from paracomm.schedule.mutate import Verdict, campaign
from paracomm.schedule.registry import cases, get
from paracomm.schedule.schedule import COLLECTIVES

MOST_RANKS = 1 << 14

Case = tuple[str, str, int, "int | None", dict[str, Any]]


def verify(
    worlds: Annotated[str, typer.Option(help="World sizes: 1-64, or 2,4,8.")] = "1-64",
    collective: Annotated[list[str] | None, typer.Option("--collective", "-c", help="Only these.")] = None,
    algorithm: Annotated[list[str] | None, typer.Option("--algorithm", "-a", help="Only these.")] = None,
    mutants: Annotated[int, count("Judge so many seeded wrong schedules instead.", 0, 10_000_000)] = 0,
    seed: Annotated[int, count("Of the mutants.", 0, 2**63 - 1)] = 0,
    least: Annotated[float, real("Share of wrong mutants that must be caught.", most=1)] = 0.99,
    table: Annotated[bool, typer.Option("--table", help="Print the schedules instead, ranks x levels.")] = False,
    module: Annotated[list[str] | None, typer.Option("--import", help="Modules that register own algorithms.")] = None,
    jobs: Annotated[int, count("Processes; 0: one a core.", 0, 1024)] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Prove that schedules compute what they should, on every interleaving, without races or deadlocks."""
    load(module or [])
    if mutants:
        judge_mutants(mutants, seed, least, json)
        return
    chosen = tuple(collective or COLLECTIVES)
    wanted = set(algorithm or [])
    todo = [(c, a, n, root, params) for n in sizes(worlds) for c, a, root, params in cases(n, chosen)
            if not wanted or a in wanted]  # fmt: skip
    if not todo:
        raise typer.BadParameter("no such collective, algorithm or world size")
    if table:
        for c, a, n, root, params in todo:
            print(f"{c} [{a}] world_size={n} {params or ''}\n{build(c, a, n, root, **params).table()}")
        return
    prove_all(todo, jobs or len(os.sched_getaffinity(0)), module or [], json)


def sizes(text: str) -> list[int]:
    """ "1-3,8" -> [1, 2, 3, 8]."""
    return [size for span in parts(text, "--worlds", _span) for size in span]


def _span(text: str) -> range:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if found is None:
        raise ValueError(f"world sizes must look like 1-64 or 2,4,8, got {text!r}")
    low, high = int(found[1]), int(found[2] or found[1])
    if low > high:
        raise ValueError(f"world sizes must rise from the first to the last, got {text!r}")
    if low < 1 or high > MOST_RANKS:
        raise ValueError(f"world sizes must be from 1 to {MOST_RANKS}, got {text!r}")
    return range(low, high + 1)


def load(modules: list[str]) -> None:
    sys.path.insert(0, os.getcwd())
    for name in modules:
        importlib.import_module(name)


def prove_case(case: Case) -> tuple[Case, float, str | None]:
    collective, name, world_size, root, params = case
    begin = time.perf_counter()
    try:
        prove(get(collective, name).build(world_size, root, **params))
    except Error as error:
        return case, time.perf_counter() - begin, str(error)
    return case, time.perf_counter() - begin, None


def run(todo: list[Case], jobs: int, modules: list[str]) -> Iterator[tuple[Case, float, str | None]]:
    if jobs == 1:
        yield from map(prove_case, todo)
        return
    todo = sorted(todo, key=lambda case: -case[2])
    with ProcessPoolExecutor(jobs, initializer=load, initargs=(modules,)) as pool:
        yield from pool.map(prove_case, todo, chunksize=8)


def prove_all(todo: list[Case], jobs: int, modules: list[str], json: bool) -> None:
    begin = time.perf_counter()
    rows: dict[tuple[str, str], list[tuple[Case, float, str | None]]] = {}
    for result in run(todo, jobs, modules):
        rows.setdefault(result[0][:2], []).append(result)
    wall_s = time.perf_counter() - begin
    shown = Table("collective", "algorithm", "schedules", "worlds", "time s", "result")
    failed = [result for results in rows.values() for result in results if result[2]]
    for (collective, name), results in sorted(rows.items(), key=lambda row: COLLECTIVES.index(row[0][0])):
        bad = sum(1 for r in results if r[2])
        worlds = sorted({r[0][2] for r in results})
        line = {
            "collective": collective,
            "algorithm": name,
            "schedules": len(results),
            "worlds": f"{worlds[0]}-{worlds[-1]}" if len(worlds) > 1 else str(worlds[0]),
            "time_s": round(sum(r[1] for r in results), 3),
            "failed": bad,
        }
        if json:
            print(json_module.dumps(line))
        shown.add_row(*(str(x) for x in list(line.values())[:-1]), f"{bad} FAILED" if bad else "proved")
    if not json:
        Console().print(shown)
        print(f"{len(todo)} schedules, {len(failed)} failed, {wall_s:.1f} s on {jobs} processes")
    for case, _, message in failed[:5]:
        print(f"\n{case}\n{message}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def judge_mutants(count: int, seed: int, least: float, json: bool) -> None:
    begin = time.perf_counter()
    verdicts = campaign(count, seed)
    wall_s = time.perf_counter() - begin
    fates = ("caught", "reordered", "correct", "missed")
    tally = Counter((v.kind, v.fate) for v in verdicts)
    total: dict[str, int] = Counter(v.fate for v in verdicts)
    share = total["caught"] / max(1, total["caught"] + total["missed"])
    if json:
        print(json_module.dumps({"mutants": count, "seed": seed, **{f: total[f] for f in fates}, "share": share}))
    else:
        show(verdicts, tally, total, fates)
        wrong = total["caught"] + total["missed"]
        print(f"{total['caught']} of {wrong} wrong mutants caught ({share:.2%}), seed {seed}, {wall_s:.1f} s")
    for v in verdicts:
        if v.fate == "missed":
            print(f"missed: {v.what}", file=sys.stderr)
    if share < least:
        raise typer.Exit(1)


def show(
    verdicts: list[Verdict], tally: Counter[tuple[str, str]], total: dict[str, int], fates: tuple[str, ...]
) -> None:
    shown = Table("mutation", *fates)
    for kind in sorted({v.kind for v in verdicts}):
        shown.add_row(kind, *(str(tally[kind, fate]) for fate in fates))
    shown.add_row("all", *(str(total[fate]) for fate in fates))
    Console().print(shown)
    print("reordered: the same operations and results in another order; correct: another schedule with the right")
    print("result. Both are judged by running them on numbers, with ranks interleaved at random.")
