"""Which algorithm serves which size: a short list by simulation, the choice by measurement, the answer as a JSON table.

    {"all_reduce": [[16384, "one_shot", {}], [4611686018427387904, "direct", {}]], ...}

Calls of at most so many bytes take that algorithm with those parameters; the first row that fits counts. nbytes is the
size of the data buffer: what one rank contributes to all_reduce, reduce, broadcast and all_to_all, all ranks' blocks
together for the others.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InvalidArgument
from .registry import algorithms, build, get
from .schedule import COLLECTIVES, ROOTED
from .simulate import Topology, simulate, simulate_algorithm

UNLIMITED = 2**62
LARGEST = 2**64 - 1  # that the core counts to
FORMAT = 1
CLEARLY = 0.9  # what is not at least so much faster than the default choice is taken for noise
SIZES = (256, 4 << 10, 32 << 10, 256 << 10, 2 << 20, 16 << 20)

Table = dict[str, list[list[Any]]]


class Candidate(NamedTuple):
    """An algorithm with its parameters."""

    algorithm: str
    params: dict[str, Any]


Measure = Callable[[str, Candidate, int], float]


def candidates(collective: str, hosts: Sequence[int]) -> list[Candidate]:
    """What can be tried on ranks of these hosts."""
    found = []
    shared = 1 < len(set(hosts)) < len(hosts)
    for name in algorithms(collective):
        if name == "hierarchical":
            if shared:
                found += [Candidate(name, {"hosts": list(hosts), "between": way}) for way in ("ring", "direct")]
        else:
            found.append(Candidate(name, {}))
    return found


def shortlist(collective: str, nbytes: int, topology: Topology, best: int = 3) -> list[Candidate]:
    """The `best` candidates in simulation, fastest first; equal on all ranks that hold equal topologies."""
    root = 0 if collective in ROOTED else None
    costs = []
    for order, candidate in enumerate(candidates(collective, topology.hosts)):
        if topology.world_size <= 64:
            schedule = build(collective, candidate.algorithm, topology.world_size, root, **candidate.params)
            result = simulate(schedule, nbytes, topology)
        else:
            result = simulate_algorithm(collective, candidate.algorithm, nbytes, topology, root, **candidate.params)
        costs.append((result.time_s, order, candidate))
    return [candidate for _, _, candidate in sorted(costs, key=lambda cost: cost[:2])[:best]]


def tune(
    topology: Topology,
    measure: Measure | None = None,
    collectives: Sequence[str] = COLLECTIVES,
    sizes: Sequence[int] = SIZES,
    best: int = 3,
    budget_s: float = 5.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Table:
    """The table for a topology. Collective if `measure` is.

    Args:
        topology: equal on all ranks (rank 0's measurements of alpha, beta and gamma).
        measure: (collective, candidate, nbytes) -> seconds, equal on all ranks; None lets the simulation decide.
        sizes: bytes to decide at.
        best: how many candidates to measure at each size; the default table's choice is always among them.
        budget_s: no more measuring after so many seconds of `clock`, which must agree on all ranks; what is left goes
            by simulation.
    """
    fallback = default_table(topology.world_size, topology.hosts)
    begin = clock()
    decided: dict[str, list[tuple[int, Candidate]]] = {}
    for nbytes in sizes:
        for collective in collectives:
            listed = shortlist(collective, nbytes, topology, best)
            usual = lookup(fallback, collective, nbytes)
            if measure is None:
                winner = listed[0]
            else:
                if usual not in listed:
                    listed = [*listed[: max(1, best - 1)], usual]
                if len(listed) == 1 or clock() - begin > budget_s:
                    winner = listed[0] if len(listed) == 1 else usual
                else:
                    seconds = [measure(collective, candidate, nbytes) for candidate in listed]
                    winner = listed[seconds.index(min(seconds))]
                    if min(seconds) > CLEARLY * seconds[listed.index(usual)]:
                        winner = usual
            decided.setdefault(collective, []).append((nbytes, winner))
    return {collective: _rows(choices) for collective, choices in decided.items()}


def _rows(choices: list[tuple[int, Candidate]]) -> list[list[Any]]:
    """Rows up to the (geometric) middle between sizes whose winners differ."""
    choices = sorted(choices, key=lambda choice: choice[0])
    rows: list[list[Any]] = []
    for (nbytes, winner), following in zip(choices, [*choices[1:], None], strict=True):
        if following is None:
            rows.append([UNLIMITED, *winner])
        elif following[1] != winner:
            rows.append([math.isqrt(nbytes * following[0]), *winner])
    return rows


def lookup(table: Table, collective: str, nbytes: int) -> Candidate:
    """What a table says.

    Raises:
        InvalidArgument: the table has no row for the collective.
    """
    for limit, name, params in table.get(collective, []):
        if nbytes <= limit:
            return Candidate(name, params)
    raise InvalidArgument(f"the tuning table has no row for {collective} of {nbytes} bytes")


def default_table(world_size: int, hosts: Sequence[int] | None = None) -> Table:
    """Sound choices without any measurement.

    On one host every rank can reach every other one's memory: the fewest steps win, except that everybody reading
    everything (one_shot) costs world_size times the bytes. Between hosts small calls count steps, large ones bytes.

    Args:
        hosts: the host of every rank, None: all on one.
    """
    hosts = [0] * world_size if hosts is None else list(hosts)
    if len(hosts) != world_size:
        raise InvalidArgument(f"hosts must name the host of each of {world_size} ranks, got {len(hosts)}")
    count = len(set(hosts))
    few: dict[str, list[list[Any]]] = {
        "all_to_all": [[UNLIMITED, "direct", {}]],
        "gather": [[UNLIMITED, "direct", {}]],
        "scatter": [[UNLIMITED, "direct", {}]],
        "barrier": [[UNLIMITED, "dissemination", {}]],
    }
    if count <= 1:
        few["all_reduce"] = [[max(2048, 65536 // world_size), "one_shot", {}], [UNLIMITED, "direct", {}]]
        for collective in ("reduce", "broadcast", "all_gather", "reduce_scatter"):
            few[collective] = [[UNLIMITED, "direct", {}]]
        return few
    large = ["hierarchical", {"hosts": hosts}] if count < world_size else ["ring", {}]
    few["all_reduce"] = [[16384, "recursive_doubling", {}], [UNLIMITED, *large]]
    for collective in ("reduce", "broadcast"):
        few[collective] = [[256 << 10, "binomial", {}], [UNLIMITED, "chain", {}]]
    for collective in ("all_gather", "reduce_scatter"):
        few[collective] = [[16384, "bruck", {}], [UNLIMITED, "ring", {}]]
    return few


def device_table(world_size: int) -> Table:
    """Sound choices for GPUs of one host that map each other's memory.

    All reductions add in the order of ranks, so that neither the size of a call, nor whether it is an all_reduce or a
    reduce_scatter, changes a bit. One kernel does one_shot, and ordered up to the size of its staging buffer
    (DeviceOptions), without messages.
    """
    table = default_table(world_size)
    table["all_reduce"] = [[max(4096, 131072 // world_size), "one_shot", {}], [UNLIMITED, "ordered", {}]]
    table["reduce_scatter"] = [[UNLIMITED, "ordered", {}]]
    return table


def cache_path(host: str, hosts: Sequence[int]) -> Path:
    """Where the table of this layout is kept: in XDG_CACHE_HOME or ~/.cache, keyed by rank 0's host and the layout."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    layout = zlib.crc32(",".join(map(str, hosts)).encode())
    safe = re.sub(r"[^A-Za-z0-9.-]", "_", host)
    return Path(folder) / "paracomm" / f"tune-{safe}-{len(hosts)}-{layout:08x}.json"


def save(table: Table, path: Path, about: dict[str, Any] | None = None) -> None:
    """Write a table; readers see the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "about": about or {}, "table": table}, indent=1)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: Path) -> Table | None:
    """The table at `path`, None if there is none.

    Raises:
        InvalidArgument: it cannot be read, or holds something else; it says what.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InvalidArgument("it is no file")  # a pipe would not be read to its end
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise InvalidArgument(f"it holds a {type(content).__name__}")
        if content["format"] != FORMAT:
            return None
        table: Table = content["table"]
        check(table)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InvalidArgument(f"{path} is no tuning table ({why}): delete it, or run `paracomm tune` again") from error
    return table


def check(table: Table) -> None:
    """Raise InvalidArgument unless every row names a known algorithm and sizes grow up to UNLIMITED."""
    if not isinstance(table, dict):
        raise InvalidArgument(f"a tuning table is a mapping of collectives to rows, got a {type(table).__name__}")
    for collective, rows in table.items():
        if not isinstance(rows, list | tuple):
            raise InvalidArgument(f"{collective}: expected a list of rows, got {rows!r}")
        last = -1
        for row in rows:
            if not isinstance(row, list | tuple) or list(map(type, row)) != [int, str, dict]:
                raise InvalidArgument(f"{collective}: a row is [size, algorithm, parameters], got {row!r}")
            limit, name, _ = row
            get(collective, name)
            if not last < limit <= LARGEST:
                raise InvalidArgument(f"{collective}: sizes must grow from row to row, got {limit} after {last}")
            last = limit
        if last < UNLIMITED:
            raise InvalidArgument(f"{collective}: the last row must hold for every size")
