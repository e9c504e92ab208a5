"""Steps per second of the training loop: our reducer and communicator against torch DDP over Gloo, in one run.

    python bench/train_vs_ddp.py [--ranks 2] [--rounds 40] [--block 4] [--width 128] [--batch 12] [--json FILE]

Both train the same model on the same batches, in the same processes, in turns of `--block` steps whose order changes
every round, so that whatever else the machine does falls on both. First their losses must agree. The bar is a ratio of
at least 1: the median over the rounds of (DDP's time / our time).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from paracomm.models import GPTConfig
from paracomm.train.config import TrainConfig
from paracomm.train.data import load_corpus
from paracomm.train.loop import Trainer
from paracomm.train.replicas import MeshReplicas, TorchReplicas, use_one_thread

RESULTS = Path(__file__).with_name("results") / "train_vs_ddp.jsonl"
AGREEMENT = 1e-4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--block", type=int, default=4, help="steps a turn")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=12, help="sequences a step, over all ranks")
    parser.add_argument("--bucket-mib", type=float, default=2.0)
    parser.add_argument("--json", type=Path, default=RESULTS, help="file that the JSON line is added to")
    return parser.parse_args()


def turn(trainer: Trainer, first_step: int, steps: int) -> tuple[float, float]:
    """Seconds that `steps` steps took, and the last loss."""
    trainer.replicas.barrier()
    start = time.perf_counter()
    for step in range(first_step, first_step + steps):
        loss = trainer.backward(step)
        trainer.update(step)
    return time.perf_counter() - start, float(loss)


def measure(args: argparse.Namespace) -> dict[str, object]:
    config = TrainConfig(
        model=GPTConfig(width=args.width, depth=args.depth, context=args.context),
        steps=args.block * (args.rounds + 1),
        batch=args.batch,
        bucket_mib=args.bucket_mib,
    )
    corpus = load_corpus()
    ranks = {"paracomm": MeshReplicas(), "ddp": TorchReplicas("gloo")}
    trainers = {name: Trainer(config, replicas, corpus) for name, replicas in ranks.items()}
    losses = {name: turn(trainer, 0, args.block)[1] for name, trainer in trainers.items()}
    if abs(losses["paracomm"] - losses["ddp"]) > AGREEMENT * losses["ddp"]:
        raise SystemExit(f"losses differ after {args.block} steps: {losses}")
    blocked = trainers["paracomm"].replicated.blocked_s or 0.0
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for index in range(args.rounds):
        names = list(trainers) if index % 2 == 0 else list(reversed(trainers))
        for name in names:
            seconds[name].append(turn(trainers[name], args.block * (index + 1), args.block)[0])
    blocked = (trainers["paracomm"].replicated.blocked_s or 0.0) - blocked
    ratios = [ddp / ours for ours, ddp in zip(seconds["paracomm"], seconds["ddp"], strict=True)]
    result = {
        "bench": "train_vs_ddp",
        "ranks": args.ranks,
        "parameters": trainers["paracomm"].parameter_count,
        "batch": args.batch,
        "context": args.context,
        "bucket_mib": args.bucket_mib,
        "steps_per_s": {name: args.block / statistics.median(times) for name, times in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "wait_share": blocked / sum(seconds["paracomm"]),
        "cores": os.cpu_count(),
        "cpu": platform.machine(),
        "torch": torch.__version__,
        "command": " ".join(["python", "bench/train_vs_ddp.py", *sys.argv[1:]]),
    }
    for replicas in ranks.values():
        replicas.close()
    return result


def report(result: dict, file: Path) -> None:
    speeds = result["steps_per_s"]
    print(
        f"{result['parameters']:,} parameters, batch {result['batch']} x {result['context']}, {result['ranks']} ranks"
    )
    print(f"{'reducer':<12}{'steps/s':>10}")
    print(f"{'paracomm':<12}{speeds['paracomm']:>10.2f}   waiting {result['wait_share']:.1%} of the step")
    print(f"{'ddp + gloo':<12}{speeds['ddp']:>10.2f}")
    print(f"ratio {result['ratio']:.3f} ({result['ratio_low']:.3f} to {result['ratio_high']:.3f}); the bar is 1")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(result) + "\n")


def main() -> None:
    args = arguments()
    if "RANK" not in os.environ:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.execv(sys.executable, [*launch, *sys.argv])
    use_one_thread()
    result = measure(args)
    if os.environ["RANK"] == "0":
        report(result, args.json)


if __name__ == "__main__":
    main()
