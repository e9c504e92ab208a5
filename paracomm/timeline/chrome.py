"""Records as Chrome's trace format: a process is a rank, a thread is a lane.

    compute   | step                                                     |
              | forward | backward                | optimizer |
    wait                          | all_reduce |
    dp                    | all_reduce ........|                           as long as it ran, here or on a thread
    dp 2                      | send |                                     what ran beside it
    tp          ||  ||        ||  ||

(Google, "Trace Event Format", complete events "X", whose ts and dur are microseconds.)
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paracomm.errors import InvalidArgument

if TYPE_CHECKING:
    from paracomm.timeline.record import Event, Record

COMPUTE, WAIT = "compute", "wait"
OURS = "paracomm"
"""The key of a document's own facts: rank, world_size, ... of a record; a list of them where ranks are merged."""
FOREIGN_LANE = 1_000_000
"""Added to the numbers of torch's threads, which are as small as ours in a container."""

Document = dict[str, Any]


def write(record: Record, path: Path) -> None:
    """As JSON; a file that is there is replaced at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document(record)))
    os.replace(part, path)


def document(record: Record) -> Document:
    """The whole file of one rank. Times are rank 0's."""
    clock = record.clock
    lanes = _lanes(record)
    numbers = {lane: number for number, lane in enumerate(lanes, 1)}
    since = clock.began_ns - clock.ahead_ns
    traced = _metadata("process", record.rank, 0, f"rank {record.rank}", record.rank)
    for lane, events in lanes.items():
        traced += _metadata("thread", record.rank, numbers[lane], lane, numbers[lane])
        for event in sorted(events, key=lambda event: (event.start_ns, -event.end_ns)):
            traced.append(_complete(event, record.rank, numbers[lane], since))
    facts = {
        "rank": record.rank,
        "world_size": record.world_size,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "clock_error_us": clock.error_ns / 1000,
        "own_clock_ahead_us": (clock.own_unix_ns - clock.unix_ns - clock.ahead_ns) / 1000,
        "start_us": (record.start_ns - since) / 1000,
        "end_us": (record.end_ns - since) / 1000,
    }
    base = clock.unix_ns + clock.began_ns
    return {"displayTimeUnit": "ms", "baseTimeNanoseconds": base, OURS: facts, "traceEvents": traced}


def _complete(event: Event, rank: int, lane: int, since: int) -> dict[str, Any]:
    details = dict(event.details)
    if event.asked_ns:
        details["queued_us"] = max(0, event.start_ns - event.asked_ns) / 1000
    times = {"ts": (event.start_ns - since) / 1000, "dur": (event.end_ns - event.start_ns) / 1000}
    return {"ph": "X", "cat": event.kind, "name": event.name, "pid": rank, "tid": lane, **times, "args": details}


def _metadata(of: str, rank: int, lane: int, name: str, place: int) -> list[dict[str, Any]]:
    where = {"ph": "M", "pid": rank, "tid": lane}
    return [
        {**where, "name": f"{of}_name", "args": {"name": name}},
        {**where, "name": f"{of}_sort_index", "args": {"sort_index": place}},
    ]


def _lanes(record: Record) -> dict[str, list[Event]]:
    """Events by lane; in a lane they lie inside of each other or apart, as viewers expect."""
    lanes: dict[str, list[Event]] = {COMPUTE: [], WAIT: []}
    threads: dict[int, list[Event]] = {}
    under_way: dict[str, list[Event]] = {}
    for event in record.events:
        if event.lane:
            under_way.setdefault(event.lane, []).append(event)
        elif event.thread == record.thread:
            lanes[COMPUTE if event.kind in ("step", "compute") else WAIT].append(event)
        else:
            threads.setdefault(event.thread, []).append(event)
    for lane in sorted(under_way):
        for number, events in enumerate(_apart(under_way[lane]), 1):
            lanes[lane if number == 1 else f"{lane} {number}"] = events
    for thread, events in threads.items():
        name = f"thread {record.threads[thread]}"
        lanes[name if name not in lanes else f"{name} ({thread})"] = events
    return lanes


def _apart(events: Iterable[Event]) -> list[list[Event]]:
    """As few rows as can be in which no two overlap."""
    rows: list[list[Event]] = []
    for event in sorted(events, key=lambda event: (event.start_ns, event.end_ns)):
        row = next((row for row in rows if row[-1].end_ns <= event.start_ns), None)
        if row is None:
            rows.append([event])
        else:
            row.append(event)
    return rows


def read(folder: str | Path) -> list[Document]:
    """The files rank-0.json, rank-1.json, ... of one run.

    Raises InvalidArgument for a rank without a file, a file that is none of ours, and one of another run.
    """
    first = _read(Path(folder) / "rank-0.json")
    found = [first]
    for rank in range(1, first[OURS]["world_size"]):
        path = Path(folder) / f"rank-{rank}.json"
        found.append(_read(path))
        if found[-1]["baseTimeNanoseconds"] != first["baseTimeNanoseconds"]:
            raise InvalidArgument(f"trace: '{path}' is of another run than 'rank-0.json' beside it")
    return found


def _read(path: Path) -> Document:
    found = read_json(path)
    if not isinstance(found.get(OURS), dict):
        raise InvalidArgument(f"trace: '{path}' was not written by paracomm")
    return found


def read_json(path: Path) -> Document:
    """Raises InvalidArgument where there is no trace."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise InvalidArgument(f"trace: cannot read '{path}': {error.strerror}") from error
    except ValueError as error:
        raise InvalidArgument(f"trace: '{path}' is no JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("traceEvents"), list):
        raise InvalidArgument(f"trace: '{path}' is no trace: it has no list \"traceEvents\"")
    return found


def merged(documents: Sequence[Document], foreign: Sequence[Document] = ()) -> Document:
    """One trace of all ranks; each of `foreign`, which torch.profiler exported, lies below the rank of its process.

    The times of torch are of its host's wall clock: those of another host than rank 0's are moved to rank 0's. What is
    of no rank's process keeps its own place.
    """
    base = documents[0]["baseTimeNanoseconds"]
    events = [event for each in documents for event in each["traceEvents"]]
    by_process = {(each[OURS]["host"], each[OURS]["process"]): each[OURS] for each in documents}
    for each in foreign:
        host = each.get("host_name", documents[0][OURS]["host"])
        ahead = next((facts["own_clock_ahead_us"] for (at, _), facts in by_process.items() if at == host), 0.0)
        move = (each.get("baseTimeNanoseconds", 0) - base) / 1000 - ahead
        events += [_adopted(event, move, host, by_process) for event in each["traceEvents"]]
    return {
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": base,
        OURS: [each[OURS] for each in documents],
        "traceEvents": [event for event in events if event],
    }


def _adopted(event: dict[str, Any], move: float, host: str, by_process: dict[Any, Any]) -> dict[str, Any]:
    """An event of torch's in its rank; {} for what would rename the rank."""
    event = dict(event)
    if "ts" in event:
        event["ts"] += move
    facts = by_process.get((host, event.get("pid")))
    if facts is None:
        return event
    if event["ph"] == "M" and event["name"].startswith("process"):
        return {}
    event["pid"] = facts["rank"]
    if isinstance(event.get("tid"), int):
        event["tid"] += FOREIGN_LANE
        if event["ph"] == "M" and event["name"] == "thread_sort_index":
            event["args"] = {"sort_index": event["tid"]}
    return event
