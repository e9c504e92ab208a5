"""The bars of parallel layouts, one function each: `python bench/layouts.py against-torch [overlap memory]`.

against-torch  2 and 4 ranks of this host: the same model on the same mesh, ours and torch's in turns in one run.
overlap        needs root and iproute2: hosts are network namespaces (hosts.sh) on links of 1 Gbit/s.
memory         4 ranks of this host: bytes that a rank holds beside the formula of docs/memory.md.

A bar prints PASS or SHORT with its figure, and JSON lines go to bench/results/.
"""

from __future__ import annotations

import json
import statistics
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from bars import Bar, hosts, run_bars
from layouts_rank import Task

from paracomm.cli.contest.launch import ContenderError, Group, Place
from paracomm.errors import Error

HERE = Path(__file__).resolve().parent
WORKER = HERE / "layouts_rank.py"
LIMIT_S = 600
KINDS = {"ddp": "torch DDP", "fsdp": "fully_shard", "tp": "torch TP", "fsdp+tp": "fully_shard x torch TP"}
BOUND = 0.3
"""Of torch's step: where communication takes as much, ours is asked to be 1.3 times as fast."""


def measure(task: Any, place: Place, worker: Path = WORKER) -> list[dict[str, Any]]:
    """Every rank's reply to a dataclass with a `kind`. Raises ContenderError."""
    group = Group(task.kind, place.ranks, place.starts(), [json.dumps(asdict(task))], worker=worker)
    try:
        return group.ask({"do": "measure"}, timeout_s=LIMIT_S)
    except ContenderError:
        raise
    except Error as error:
        raise ContenderError(str(error)) from error
    finally:
        group.close()


def slowest(replies: list[dict[str, Any]], name: str) -> list[float]:
    """Of every round, the rank that took longest."""
    return [max(turn) for turn in zip(*(reply["seconds"][name] for reply in replies), strict=True)]


def against_torch(bar: Bar) -> None:
    """Decoder of 3.4 M parameters, long and short sequences: torch DDP, fully_shard and tensor parallel on Gloo."""
    for ranks in (2, 4):
        for kind, name in KINDS.items():
            if kind == "fsdp+tp" and ranks == 2:
                continue
            for context in (128, 16):
                task = Task(kind, context=context)
                what = f"{name}, {ranks} ranks, {task.batch} x {context} tokens"
                try:
                    replies = measure(task, Place(ranks))
                except ContenderError as error:
                    typer.echo(f"  {error}")
                    bar.hold(what, None, 1)
                    continue
                ours, theirs = slowest(replies, "ours"), slowest(replies, "torch")
                step = statistics.median(theirs)
                share = max(0.0, 1 - max(reply["compute_s"] for reply in replies) / step)
                typer.echo(
                    f"  {what}: ours {statistics.median(ours) * 1e3:.1f} ms, torch {step * 1e3:.1f} ms, of which "
                    f"communication {share:.0%}"
                )
                figure = statistics.median(t / o for t, o in zip(theirs, ours, strict=True))
                bar.hold(f"step rate over {what}", figure, 1.3 if share >= BOUND else 1.0)
                bar.records.append(
                    asdict(task) | {"what": "row", "ranks": ranks, "ours": ours, "torch": theirs, "share": share}
                )


def overlap(bar: Bar) -> None:
    """2 hosts of 1 rank, a link of 1 Gbit/s, gradients that take at most 0.8 of backward to send."""
    task = Task("overlap", width=192, depth=14, context=128, batch=16, bucket_mib=1, rounds=13)
    with hosts(2, "1gbit"):
        try:
            replies = measure(task, Place(2, (0, 1)))
        except ContenderError as error:
            bar.hold(f"did not run: {error}", None, 1)
            return
    rows = {
        name: [max(turn) for turn in zip(*(r["rows"][name] for r in replies), strict=True)]
        for name in replies[0]["rows"]
    }
    median = {name: statistics.median(values) for name, values in rows.items()}
    median["beyond"] = statistics.median(s - q for s, q in zip(rows["step"], rows["quiet"], strict=True))
    alone, step = median["alone"], median["step"]
    typer.echo(
        f"  step {step * 1e3:.0f} ms, backward {median['backward'] * 1e3:.0f} ms; "
        f"{replies[0]['bytes'] / 1e6:.1f} MB of gradients take {alone * 1e3:.0f} ms alone"
    )
    bar.hold("communication over backward", alone / median["backward"], 0.8, at_least=False)
    measures = {
        "time blocked in waits": median["blocked"],
        "last bucket there after backward": median["events"],
        "step beyond one that sends nothing": median["beyond"],
    }
    for name, exposed in measures.items():
        typer.echo(f"  exposed, {name}: {exposed * 1e3:.1f} ms")
        bar.hold(f"hidden: {name}", 100 * (1 - exposed / alone), 80, unit="%")
    spread = max(measures.values()) - min(measures.values())
    bar.hold("the three measures apart, of a step", 100 * spread / step, 5, at_least=False, unit="%")
    bar.records.append(asdict(task) | {"what": "row", "rows": rows})


def memory(bar: Bar) -> None:
    """ZeRO 1, 2 and 3 at 4 ranks: the most that a rank holds at a time, over docs/memory.md's formula."""
    sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent)]
    warnings.filterwarnings("ignore", category=FutureWarning)  # of names that the measurement comes across
    from ranks import run_ranks

    from tests.parallel.test_memory import formula
    from tests.parallel.test_memory import measure as held

    for precision in (None, "bfloat16"):
        for zero in (1, 2, 3):
            for_ranks = []
            for peak, _, _, sizes in run_ranks(4, held, zero, precision):
                expected = formula(zero, 4, precision is not None, *sizes)
                for_ranks.append(peak["all"] / sum(expected.values()))
            furthest = max(for_ranks, key=lambda ratio: abs(ratio - 1))
            name = f"ZeRO {zero}, {precision or 'float32'}: measured {furthest:.3f} of the formula"
            bar.hold(name, 100 * abs(furthest - 1), 5, at_least=False, unit="% apart")


BARS = {"against-torch": against_torch, "overlap": overlap, "memory": memory}


def main(names: Annotated[list[str], typer.Argument(help=f"{', '.join(BARS)}, or all")]) -> None:
    """Measure bars. The status is 1 where one is short."""
    run_bars(BARS, names, "layouts-")


if __name__ == "__main__":
    typer.run(main)
