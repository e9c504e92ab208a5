"""A simulated step as a picture: a row a rank, a bar an action, as long as it takes; what is white is bubble."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paracomm.errors import InvalidArgument
from paracomm.pipeline.action import BACKWARD, FORWARD, WEIGHT
from paracomm.pipeline.simulate import Span, Timeline

ENDINGS = (".png", ".svg")
COLOURS = {FORWARD: "Blues", BACKWARD: "Greens", WEIGHT: "Oranges"}
NAMES = {FORWARD: "forward", BACKWARD: "backward", WEIGHT: "gradients of weights"}
NUMBERED = 600
"""Bars up to which each has the number of its microbatch in it: more could not be read."""


def draw(timeline: Timeline, path: str | Path) -> None:
    """Writes a .png or .svg. Kinds have a colour each, the later the stage the darker.

    Raises InvalidArgument for another ending, and without matplotlib.
    """
    where = expect_picture(path)
    figure_of(timeline).savefig(where, dpi=120)


def expect_picture(path: str | Path) -> Path:
    """Raises InvalidArgument for an ending that is no picture's."""
    where = Path(path)
    if where.suffix not in ENDINGS:
        raise InvalidArgument(f"picture: '{where.name}' ends in '{where.suffix}', expected {' or '.join(ENDINGS)}")
    return where


def figure_of(timeline: Timeline) -> Any:
    """The picture as a matplotlib figure. Raises InvalidArgument without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise InvalidArgument("a picture needs matplotlib: pip install 'paracomm[plot]'") from error
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    schedule = timeline.schedule
    figure = Figure(figsize=(12, 1.4 + 0.45 * schedule.world_size), layout="constrained")
    axes = figure.subplots()
    scale, unit = _unit(timeline.step_s)
    maps = {kind: matplotlib.colormaps[name] for kind, name in COLOURS.items()}
    for span in timeline.spans:
        _bar(axes, span, maps[span.action.kind](_shade(span.action.stage, schedule.stages)), scale, len(timeline.spans))
    kinds = [kind for kind in COLOURS if any(span.action.kind == kind for span in timeline.spans)]
    patches = [Patch(color=maps[kind](0.5), label=NAMES[kind]) for kind in kinds]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    axes.set_yticks(range(schedule.world_size), [f"rank {rank}" for rank in range(schedule.world_size)])
    axes.invert_yaxis()
    axes.set_xlim(0, timeline.step_s * scale or 1)
    axes.set_xlabel(unit)
    axes.set_title(
        f"{schedule.name}, {schedule.microbatches} microbatches: {timeline.step_s * scale:.4g} {unit}, "
        f"bubble {timeline.bubble:.1%}"
    )
    return figure


def _bar(axes: Any, span: Span, colour: Any, scale: float, bars: int) -> None:
    begin, length = span.start_s * scale, (span.end_s - span.start_s) * scale
    axes.barh(span.rank, length, left=begin, height=0.8, color=colour, edgecolor="white", linewidth=0.5)
    if bars <= NUMBERED:
        dark = sum(colour[:3]) < 1.5
        axes.text(
            begin + length / 2, span.rank, str(span.action.microbatch),
            ha="center", va="center", fontsize=7, color="white" if dark else "black", clip_on=True,
        )  # fmt: skip


def _shade(stage: int, stages: int) -> float:
    return 0.35 + 0.45 * stage / max(1, stages - 1)


def _unit(seconds: float) -> tuple[float, str]:
    """(factor, unit) in which a step of these seconds has no more digits than need be."""
    for scale, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * scale >= 1:
            return scale, unit
    return 1e6, "us"
