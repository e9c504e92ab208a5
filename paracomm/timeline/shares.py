"""What the steps of a rank were made of, from its trace.

A moment of the main thread belongs to the innermost span around it, once, whatever else was under way meanwhile:

    thread    | step: forward | wait: all_reduce | forward | bubble: | wait: recv | : bubble | |
    counts as   compute         exposed dp all_reduce      bubble                              rest
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from paracomm.timeline.chrome import COMPUTE, OURS, WAIT, Document

Interval = tuple[int, int]


@dataclass
class Shares:
    """Nanoseconds of a rank's steps. compute, exposed, bubble and rest add up to total.

    exposed_ns: what the rank was blocked on a collective or a message, by (axis of the mesh, operation).
    rest_ns: neither: batches, copies into buckets, Python.
    overlapped_ns: communication that was under way while the rank was not blocked, counted once.
    """

    rank: int
    steps: int = 0
    total_ns: int = 0
    compute_ns: int = 0
    bubble_ns: int = 0
    exposed_ns: dict[tuple[str, str], int] = field(default_factory=dict)
    overlapped_ns: int = 0

    @property
    def rest_ns(self) -> int:
        return self.total_ns - self.compute_ns - self.bubble_ns - sum(self.exposed_ns.values())

    def described(self) -> dict[str, Any]:
        """As JSON takes it: shares of the step, which add up to 1 but for `overlapped`."""
        whole = max(self.total_ns, 1)
        exposed: dict[str, dict[str, float]] = {}
        for (axis, operation), ns in sorted(self.exposed_ns.items()):
            exposed.setdefault(axis, {})[operation] = ns / whole
        return {
            "rank": self.rank,
            "steps": self.steps,
            "step_ms": self.total_ns / 1e6 / max(self.steps, 1),
            "compute": self.compute_ns / whole,
            "exposed": exposed,
            "bubble": self.bubble_ns / whole,
            "rest": self.rest_ns / whole,
            "overlapped": self.overlapped_ns / whole,
        }


class _Span(NamedTuple):
    start: int
    end: int
    kind: str
    name: str
    details: dict[str, Any]


def shares(document: Document) -> Shares:
    """Of one rank's trace, as read() gives it. Without a span of kind "step" the whole record is one step."""
    facts = document[OURS]
    spans, under_way = _spans(document)
    steps = [span for span in spans if span.kind == "step"]
    if not steps:
        steps = [_Span(_ns(facts["start_us"]), _ns(facts["end_us"]), "step", "record", {})]
        spans += steps
    found = Shares(facts["rank"], len(steps), sum(span.end - span.start for span in steps))
    blocked: list[Interval] = []
    for inside, start, end in innermost(spans):
        if inside[0].kind != "step":
            continue
        kind, ns = _kind(inside), end - start
        if kind == "compute":
            found.compute_ns += ns
        elif kind == "bubble":
            found.bubble_ns += ns
        elif kind == "wait":
            key = _what(inside[-1])
            found.exposed_ns[key] = found.exposed_ns.get(key, 0) + ns
        if kind in ("bubble", "wait"):
            blocked.append((start, end))
    within = [(span.start, span.end) for span in steps]
    found.overlapped_ns = common(under_way, within) - common(under_way, blocked)
    return found


def _ns(us: float) -> int:
    return round(us * 1000)


def _spans(document: Document) -> tuple[list[_Span], list[Interval]]:
    """Of the main thread, and when communication was under way: sorted, apart."""
    events = document["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans, under_way = [], []
    for event in events:
        if event["ph"] != "X":
            continue
        start = _ns(event["ts"])
        end = start + _ns(event["dur"])
        if lanes[event["tid"]] in (COMPUTE, WAIT):
            spans.append(_Span(start, end, event["cat"], event["name"], event["args"]))
        elif event["cat"] == "communication":
            under_way.append((start, end))
    return spans, union(under_way)


def _kind(inside: Sequence[_Span]) -> str:
    kind = "wait" if inside[-1].kind == "communication" else inside[-1].kind
    return "bubble" if kind == "wait" and any(span.kind == "bubble" for span in inside) else kind


def _what(span: _Span) -> tuple[str, str]:
    return str(span.details.get("axis", "")), str(span.details.get("operation", span.name))


def innermost(spans: Iterable[_Span]) -> Iterator[tuple[list[_Span], int, int]]:
    """(spans around it, outermost first; start; end) of each piece of time that lies in a span."""
    around: list[_Span] = []
    at = 0
    for span in [*sorted(spans, key=lambda span: (span.start, -span.end)), None]:
        while around and (span is None or around[-1].end <= span.start):
            if around[-1].end > at:
                yield list(around), at, around[-1].end
                at = around[-1].end
            around.pop()
        if span is None:
            return
        if around and span.start > at:
            yield list(around), at, span.start
        at = max(at, span.start)
        around.append(span)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time in intervals that are sorted and apart."""
    apart: list[Interval] = []
    for start, end in sorted(intervals):
        if apart and start <= apart[-1][1]:
            apart[-1] = apart[-1][0], max(apart[-1][1], end)
        else:
            apart.append((start, end))
    return apart


def common(one: Sequence[Interval], other: Sequence[Interval]) -> int:
    """How long both are; each is sorted and apart."""
    i = j = total = 0
    while i < len(one) and j < len(other):
        total += max(0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return total
