"""Trainers from PyPI, unmodified, on 2 processes: on Gloo and on this backend the losses must be the same.

    python bench/real_programs.py                   # makes its own venv in build/real-programs; about 1.5 GB
    python bench/real_programs.py deepspeed --venv FOLDER

docs/real_programs.md tells what each does; the programs are in examples/trainers/. Models have random weights, data is
random: nothing is fetched but the packages. Appends to bench/results/real_programs.jsonl. The status is 1 where a
program fails on this backend, or ends with other losses than on Gloo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
PINS = ["torch==2.13.0", "setuptools<81", "wheel", "psutil==7.2.2"]
LIMIT_S = 180
TOLERANCE = 1e-4  # relative; the sums of two ranks round alike on both backends, unless a trainer adds up otherwise


@dataclass
class Program:
    """A script of examples/trainers and its packages; `losses`: it prints them (otherwise it checks itself)."""

    script: str
    packages: list[str]
    arguments: list[str] = field(default_factory=list)
    losses: bool = True


PROGRAMS = {
    "lightning": Program("with_lightning.py", ["lightning==2.6.6"]),
    "transformers": Program("with_transformers.py", ["transformers==5.24.0", "accelerate==1.15.0"]),
    "deepspeed": Program("with_deepspeed.py", ["deepspeed==0.19.8"]),
    "fairscale": Program("with_fairscale.py", ["fairscale==0.4.13"]),
    "accelerate-sync": Program("with_accelerate.py", ["accelerate==1.15.0"], ["test_sync"], losses=False),
    "accelerate-ops": Program("with_accelerate.py", ["accelerate==1.15.0"], ["test_ops"], losses=False),
}


def make_venv(folder: Path, packages: list[str]) -> None:
    """A virtual environment with the packages at their pins, and this tree."""
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not (folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([*pip, *PINS], check=True)
        subprocess.run([*pip, str(ROOT)], check=True)
    subprocess.run([*pip, "--no-build-isolation", PINS[0], *packages], check=True)


def run(venv: Path, program: Program, backend: str) -> dict[str, Any]:
    """How the program ended: seconds, losses, trouble."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as folder:
        command = [str(venv / "bin" / "python"), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [str(ROOT / "examples" / "trainers" / program.script), backend, folder, *program.arguments]
        start = time.monotonic()
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, cwd=folder)
            output, trouble = done.stdout, "" if done.returncode == 0 else done.stderr[-2000:]
        except subprocess.TimeoutExpired as error:
            output, trouble = "", f"not done after {error.timeout} s"
        found: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1), "trouble": trouble, "losses": []}
    for line in output.splitlines():
        if line.startswith('{"losses"'):
            said = json.loads(line)
            if said["backend"] != backend:
                found["trouble"] = f"it ran on {said['backend']}"
            found["losses"] = said["losses"]
    if program.losses and not found["losses"] and not trouble:
        found["trouble"] = "it printed no losses"
    return found


def difference(ours: list[float], gloos: list[float]) -> float:
    """The largest relative difference; infinite if there are more of one."""
    if len(ours) != len(gloos):
        return float("inf")
    return max((abs(a - b) / max(abs(b), 1e-6) for a, b in zip(ours, gloos, strict=True)), default=0.0)


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(PROGRAMS)}; all if none is given")] = None,
    venv: Annotated[Path, typer.Option(help="is made where it does not exist")] = ROOT / "build" / "real-programs",
) -> None:
    """Run trainers from PyPI on Gloo and on paracomm."""
    chosen = {name: PROGRAMS[name] for name in names or PROGRAMS}
    make_venv(venv, [package for program in chosen.values() for package in program.packages])
    failed = 0
    with open(ROOT / "bench" / "results" / "real_programs.jsonl", "a") as lines:
        for name, program in chosen.items():
            gloo, ours = (run(venv, program, backend) for backend in ("gloo", "paracomm"))
            apart = difference(ours["losses"], gloo["losses"])
            good = not ours["trouble"] and (apart <= TOLERANCE or bool(gloo["trouble"]))
            failed += not good
            ends = f"{ours['losses'][0]:.4f} .. {ours['losses'][-1]:.4f}" if ours["losses"] else "it checks itself"
            typer.echo(f"{'PASS ' if good else 'SHORT'} {name:<16} {ends}, losses apart by {apart:.1e} at most")
            for backend, end in (("gloo", gloo), ("paracomm", ours)):
                if end["trouble"]:
                    typer.echo(f"  {backend}: {end['trouble']}")
            record = {"program": name, "packages": program.packages, "gloo": gloo, "paracomm": ours, "apart": apart}
            lines.write(json.dumps(record | {"pass": good, "time": time.time()}) + "\n")
    raise typer.Exit(int(failed > 0))


if __name__ == "__main__":
    typer.run(main)
