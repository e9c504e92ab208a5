"""What the timeline costs, off and on: a span, an all_reduce of 8 bytes, a step of the training loop.

    python bench/timeline.py [--ranks 2] [--rounds 40] [--block 4] [--json FILE]

Spans and calls are counted in time of the processor, which others on the machine take nothing of. "Untested" is
all_reduce without the question whether a record is on. Steps are traced and not traced in turns of
`--block`, whose order changes every round; the same weights and batches for both. There is no bar: off, all that may
show is noise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import paracomm
from paracomm import timeline
from paracomm.models import GPTConfig
from paracomm.train.config import TrainConfig
from paracomm.train.data import load_corpus
from paracomm.train.loop import Trainer
from paracomm.train.replicas import MeshReplicas, use_one_thread

RESULTS = Path(__file__).with_name("results") / "timeline.jsonl"
CALLS = 20_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--block", type=int, default=4, help="steps a turn")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file that the JSON line is added to")
    return parser.parse_args()


def ns_a_call(call: Callable[[], Any]) -> float:
    start = time.thread_time_ns()
    for _ in range(CALLS):
        call()
    return (time.thread_time_ns() - start) / CALLS


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median of each call, nanoseconds of the processor; the order changes every round."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in list(calls) if index % 2 == 0 else list(reversed(calls)):
            found[name].append(ns_a_call(calls[name]))
    return {name: statistics.median(each) for name, each in found.items()}


def one_span() -> None:
    with timeline.span("compute", "2F0"):
        pass


def spans() -> dict[str, float]:
    """Nanoseconds of the processor for one_span(), and for a function that does nothing."""
    found = in_turns({"nothing": lambda: None, "span, off": one_span}, 20)
    timeline.start()
    found["span, on"] = ns_a_call(one_span)
    timeline.stop()
    return found


def calls(rounds: int) -> dict[str, float]:
    """Nanoseconds of the processor for an all_reduce of 8 bytes of one rank by itself: what Python adds."""
    comm, x = paracomm.connect(0, 1, exchange=lambda blob: [blob], transport="local"), torch.zeros(2)

    def untested(x: Any, op: str = "sum", *, out: Any = None, async_op: bool = False, algorithm: Any = None,
                 timeout_s: float | None = None) -> Any:  # fmt: skip
        plain = not async_op and algorithm is None and timeout_s is None
        if plain and comm.fast_all_reduce(x, op, out):
            return x
        raise AssertionError("the fast path took no torch tensor")

    both = {"all_reduce, untested": lambda: untested(x), "all_reduce, off": lambda: comm.all_reduce(x)}
    found = in_turns(both, rounds)
    comm.close()
    return found


def turn(trainer: Trainer, first_step: int, steps: int, traced: bool) -> float:
    """Milliseconds a step."""
    trainer.replicas.barrier()
    if traced:
        timeline.start()
    start = time.perf_counter()
    for step in range(first_step, first_step + steps):
        with timeline.span("step", f"step {step}"):
            trainer.backward(step)
            trainer.update(step)
    took = time.perf_counter() - start
    if traced:
        timeline.stop()
    return took * 1e3 / steps


def measure(args: argparse.Namespace) -> dict[str, Any]:
    replicas = MeshReplicas()
    config = TrainConfig(model=GPTConfig(), steps=args.block * (2 * args.rounds + 1))
    trainer = Trainer(config, replicas, load_corpus())
    turn(trainer, 0, args.block, False)
    steps: dict[bool, list[float]] = {False: [], True: []}
    first = args.block
    for index in range(args.rounds):
        for traced in (False, True) if index % 2 == 0 else (True, False):
            steps[traced].append(turn(trainer, first, args.block, traced))
            first += args.block
    found = {
        "bench": "timeline",
        "ranks": args.ranks,
        "ns": spans() | calls(args.rounds),
        "step_ms": {"off": statistics.median(steps[False]), "on": statistics.median(steps[True])},
        "step_ratio": statistics.median(on / off for off, on in zip(steps[False], steps[True], strict=True)),
        "command": " ".join(["python", "bench/timeline.py", *sys.argv[1:]]),
    }
    replicas.close()
    return found


def report(found: dict[str, Any], file: Path) -> None:
    for name, ns in found["ns"].items():
        print(f"{name:<22}{ns:>10.0f} ns")
    print(
        f"step {found['step_ms']['off']:.2f} ms, traced {found['step_ms']['on']:.2f}; ratio {found['step_ratio']:.3f}"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(found) + "\n")


def main() -> None:
    args = arguments()
    if "RANK" not in os.environ:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.execv(sys.executable, [*launch, *sys.argv])
    use_one_thread()
    found = measure(args)
    if os.environ["RANK"] == "0":
        report(found, args.json)


if __name__ == "__main__":
    main()
