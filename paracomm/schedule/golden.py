"""The dumps that tests compare with: `python -m paracomm.schedule.golden [folder]` writes them anew.

A change of a dump is a change of an algorithm: look at it before committing it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .registry import algorithms, build
from .schedule import COLLECTIVES

WORLDS = (2, 3, 4, 5, 8)
FOLDER = Path("tests/golden")


def dumps() -> dict[str, str]:
    """File name -> text, one file an algorithm."""
    return {
        f"{collective}.{name}.txt": "\n".join(build(collective, name, n).dump() for n in WORLDS)
        for collective in COLLECTIVES
        for name in algorithms(collective)
    }


def write(folder: Path) -> list[Path]:
    """Write all dumps; returns the files whose text changed."""
    changed = []
    for name, text in dumps().items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            changed.append(path)
    return changed


if __name__ == "__main__":
    for path in write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER):
        sys.stdout.write(f"wrote {path}\n")
