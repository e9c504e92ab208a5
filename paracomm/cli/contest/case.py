"""What is measured: cases, samples, and nccl-tests' definitions of size and bandwidth.

https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md: algbw is size / time; busbw scales it so that it
can be held against a link or a memory bus whatever the number of ranks.
"""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass, field

from paracomm.errors import InvalidArgument

COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "gather",
    "scatter",
    "barrier",
)
REDUCING = ("all_reduce", "reduce", "reduce_scatter")
ROOTED = ("reduce", "broadcast", "gather", "scatter")
# The size covers one block per rank, so that the count is a multiple of the ranks.
BLOCKED = ("all_gather", "reduce_scatter", "all_to_all", "gather", "scatter")
# Whether input and output may be one buffer here: always, by choice, or never.
IN_PLACE = {"all_reduce": (False, True), "reduce": (True,), "broadcast": (True,)}
ITEM_SIZE = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "bool": 1,
}


@dataclass(frozen=True)
class Case:
    """One cell's work. `nbytes` is nccl-tests' size: the larger of a rank's input and output."""

    collective: str
    nbytes: int
    dtype: str
    op: str
    root: int
    in_place: bool
    world_size: int

    @property
    def count(self) -> int:
        """Elements of `nbytes`, at least one, a multiple of the ranks where each has a block."""
        if self.collective == "barrier":
            return 0
        count = max(1, self.nbytes // ITEM_SIZE[self.dtype])
        if self.collective in BLOCKED:
            count = max(1, count // self.world_size) * self.world_size
        return count

    @property
    def size(self) -> int:
        """Bytes really moved through the definition: count elements."""
        return self.count * ITEM_SIZE[self.dtype]

    @property
    def bus_factor(self) -> float:
        n = self.world_size
        if self.collective == "all_reduce":
            return 2 * (n - 1) / n
        return (n - 1) / n if self.collective in BLOCKED else 1.0

    def command(self, memory: str) -> dict[str, object]:
        return {
            "do": "prepare",
            "collective": self.collective,
            "count": self.count,
            "dtype": self.dtype,
            "op": self.op,
            "root": self.root,
            "in_place": self.in_place,
            "memory": memory,
        }


def cases_of(collective: str, sizes: list[int], dtype: str, op: str, root: int, world_size: int) -> list[list[Case]]:
    """For each size, the case out of place and in place, as far as the collective has them."""
    sizes = [0] if collective == "barrier" else sizes
    ways = IN_PLACE.get(collective, (False,))
    return [[Case(collective, size, dtype, op, root, way, world_size) for way in ways] for size in sizes]


@dataclass
class Sample:
    """What a contender showed in a case, over all rounds. Times are in seconds and the slowest rank's."""

    p50s: list[float] = field(default_factory=list)  # one a round
    p99s: list[float] = field(default_factory=list)
    wrong: int | None = None
    algorithm: str = ""
    transport: str = ""
    trouble: str = ""  # why there is no figure

    @property
    def p50(self) -> float:
        """The median over the rounds of the slowest rank's median."""
        return statistics.median(self.p50s)

    @property
    def p99(self) -> float | None:
        return max(self.p99s) if self.p99s else None

    def add(self, seconds_by_rank: list[list[float]]) -> None:
        """One round's times of every rank."""
        self.p50s.append(max(statistics.median(seconds) for seconds in seconds_by_rank))
        self.p99s.append(max(quantile(seconds, 0.99) for seconds in seconds_by_rank))


def quantile(values: list[float], q: float) -> float:
    """The smallest value that at least a share `q` of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-q * len(ordered) // 1) - 1))]


UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
LARGEST = 1 << 40


def parse_size(text: str) -> int:
    """'64M' -> 67108864. Units K, M and G are powers of 1024."""
    match = re.fullmatch(r"(\d+)([KMG]?)(i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise InvalidArgument(f"size '{text}' is not a number of bytes such as 8, 64K, 4M or 1G")
    nbytes = int(match[1]) * UNITS[match[2].upper()]
    if nbytes > LARGEST:
        raise InvalidArgument(f"size '{text}' is more than the 1024G that can be asked for")
    return nbytes


def parse_sizes(text: str, factor: int = 2) -> list[int]:
    """'8:256M' -> 8, 16, ..., 268435456 in steps of `factor` ('8:256M:4' sets it); '8,1K,64M' -> these."""
    if ":" not in text:
        return [parse_size(part) for part in text.split(",")]
    first, last, *step = text.split(":")
    low, high = parse_size(first), parse_size(last)
    if step:
        factor = int(step[0]) if re.fullmatch(r"[0-9]{1,9}", step[0]) else 0
    if low < 1 or high < low or factor < 2 or len(step) > 1:
        raise InvalidArgument(f"sizes '{text}' are not FIRST:LAST[:FACTOR] with 0 < FIRST <= LAST and FACTOR >= 2")
    sizes = []
    while low <= high:
        sizes.append(low)
        low *= factor
    return sizes


def show_size(nbytes: int) -> str:
    for unit in ("G", "M", "K"):
        if nbytes and nbytes % UNITS[unit] == 0:
            return f"{nbytes // UNITS[unit]}{unit}"
    return str(nbytes)
