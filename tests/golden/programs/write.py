"""The programs that the C++ tests run, one file an algorithm: `python tests/golden/programs/write.py` writes them anew.

A line `program` (its fields: see `HEAD`), then one line an op, its columns `paracomm.schedule.program.OP_COLUMNS`.
"""

import sys
from pathlib import Path

from paracomm.schedule import Program, Schedule, build, project_all
from paracomm.schedule.registry import algorithms
from paracomm.schedule.schedule import COLLECTIVES, ROOTED

FOLDER = Path(__file__).resolve().parent
WORLDS = (2, 3, 4, 5, 8)
HEAD = (
    "collective", "name", "rank", "world_size", "root", "chunks", "scratch_chunks", "volume", "levels", "pair_depth",
    "fingerprint", "n_ops",
)  # fmt: skip


def schedules(collective: str, name: str) -> list[Schedule]:
    """One a world; a root that is not 0 where there is one; two hosts of uneven size where hosts matter."""
    params = {n: {"hosts": [r * 2 // n for r in range(n)]} if name == "hierarchical" else {} for n in WORLDS}
    return [build(collective, name, n, 1 if collective in ROOTED else None, **params[n]) for n in WORLDS]


def text(program: Program) -> str:
    values = {field: getattr(program, field) for field in HEAD[:-1]} | {"n_ops": len(program.ops)}
    values["root"] = -1 if program.root is None else program.root
    values["fingerprint"] &= 0xFFFFFFFF
    lines = ["program " + " ".join(str(value) for value in values.values())]
    return "\n".join(lines + [" ".join(map(str, op)) for op in program.ops.tolist()]) + "\n"


def files() -> dict[str, str]:
    """File name -> text."""
    return {
        f"{collective}.{name}.txt": "".join(text(p) for s in schedules(collective, name) for p in project_all(s))
        for collective in COLLECTIVES
        for name in algorithms(collective)
    }


if __name__ == "__main__":
    for name, content in files().items():
        (FOLDER / name).write_text(content)
        sys.stdout.write(f"wrote {name}\n")
