"""Which lines of the device source the C++ tests of emulated GPUs run; fails below a share. `make coverage-cuda`.

Reads what a build with -DPARACOMM_COVERAGE=ON left behind, by way of gcov. A line of a template counts as run where one
of its instances ran it; lines for nvcc alone are not in this build, and do not count.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

Counts = dict[str, dict[int, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path, help="the build folder")
    parser.add_argument("--under", default="csrc/cuda", help="count the files of this folder, not of those in it")
    parser.add_argument("--least", type=float, default=95.0, help="percent of all lines")
    arguments = parser.parse_args()
    counts = lines_run(arguments.build.resolve(), ROOT / arguments.under)
    if not counts:
        sys.exit(
            f"{arguments.build} holds no counts of {arguments.under}: run the tests of a build with PARACOMM_COVERAGE"
        )
    share = report(counts)
    if share < arguments.least:
        sys.exit(f"{share:.1f} % of the lines ran; {arguments.least:g} % is the least")


def lines_run(build: Path, folder: Path) -> Counts:
    """How often each line of each file in the folder ran, the most over all objects and instances."""
    counts: Counts = defaultdict(lambda: defaultdict(int))
    for notes in sorted(build.rglob("*.gcda")):
        done = subprocess.run(
            ["gcov", "--json-format", "--stdout", str(notes)], capture_output=True, text=True, check=True, cwd=build
        )
        for document in done.stdout.splitlines():
            for file in json.loads(document)["files"]:
                path = (build / file["file"]).resolve()
                if path.parent != folder:
                    continue
                for line in file["lines"]:
                    known = counts[path.name]
                    known[line["line_number"]] = max(known[line["line_number"]], line["count"])
    return counts


def report(counts: Counts) -> float:
    """Prints a line a file, with what did not run; returns the share of all lines in percent."""
    for name, lines in sorted(counts.items()):
        missed = [line for line, count in sorted(lines.items()) if count == 0]
        share = 100 * (1 - len(missed) / len(lines))
        print(f"{share:6.1f} %  {len(lines):5d} lines  {name}" + (f"  not run: {spans(missed)}" if missed else ""))
    total = sum(len(lines) for lines in counts.values())
    run = sum(count > 0 for lines in counts.values() for count in lines.values())
    print(f"{100 * run / total:6.1f} %  {total:5d} lines in all")
    return 100 * run / total


def spans(lines: list[int]) -> str:
    """[1, 2, 3, 7] as "1-3, 7"."""
    ranges: list[list[int]] = []
    for line in lines:
        if ranges and line == ranges[-1][1] + 1:
            ranges[-1][1] = line
        else:
            ranges.append([line, line])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


if __name__ == "__main__":
    main()
