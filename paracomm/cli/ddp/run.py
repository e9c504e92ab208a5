"""Runs arrangements one after the other, each on ranks of its own, and shows what they came to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from paracomm.cli.contest.launch import ContenderError, Group, Place
from paracomm.cli.ddp.case import Arrangement, Job, Outcome
from paracomm.errors import Error, InvalidArgument

WORKER = Path(__file__).with_name("worker.py")
HOUR_S = 3600.0


def run(job: Job, arrangements: Sequence[Arrangement], place: Place, say: Callable[[str], None]) -> list[Outcome]:
    """Every arrangement's outcome, in their order; one that fails says why in `trouble`."""
    job.check(place.ranks)
    outcomes = []
    for arrangement in arrangements:
        say(f"{arrangement.label} ...")
        outcome = Outcome(arrangement)
        outcomes.append(outcome)
        try:
            described = json.dumps(arrangement.described(job))
            group = Group(arrangement.label, place.ranks, place.starts(), [described], worker=WORKER)
        except ContenderError as error:
            outcome.trouble = str(error)
            continue
        try:
            replies = group.ask({"do": "train"}, timeout_s=HOUR_S)
            for name in ("step_s", "compute_s", "bytes_per_step"):
                setattr(outcome, name, max(reply[name] for reply in replies))
            outcome.counted_by, outcome.parameters = replies[0]["counted_by"], replies[0]["parameters"]
            outcome.losses = [sum(step) / len(step) for step in zip(*(r["losses"] for r in replies), strict=True)]
        except Error as error:
            outcome.trouble = str(error)
        finally:
            group.close()
    return outcomes


def table(outcomes: Sequence[Outcome], title: str) -> Table:
    """A row each; ratios are over the first one."""
    found = Table(title=title, title_justify="left")
    for name in ("engine", "hook", "ms", "exposed", "faster", "MB sent", "fewer", "loss", "%"):
        found.add_column(name, justify="left" if name in ("engine", "hook") else "right", no_wrap=True)
    first = outcomes[0]
    for o in outcomes:
        names = (o.arrangement.engine, o.arrangement.hook)
        if o.trouble:
            found.add_row(*names, o.trouble.strip().splitlines()[0])
            continue
        loss, plain = o.final_loss, first.final_loss
        found.add_row(
            *names, f"{o.step_s * 1e3:.1f}", f"{o.exposed_s * 1e3:.1f}", times(first.step_s, o.step_s),
            f"{o.bytes_per_step / 1e6:.3f}", times(first.bytes_per_step, o.bytes_per_step), f"{loss:.4f}",
            f"{100 * (loss / plain - 1):+.2f}" if loss and plain else "-",
        )  # fmt: skip
    return found


def times(over: float, under: float) -> str:
    return f"{over / under:.2f}" if over and under else "-"


def picture(outcomes: Sequence[Outcome], file: Path) -> None:
    """Step times, with the exposed communication, and bytes, as bars. Raises InvalidArgument without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise InvalidArgument("a picture needs matplotlib: pip install 'paracomm[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [o for o in outcomes if not o.trouble]
    labels, at = [o.arrangement.label for o in shown], range(len(shown))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 1.2 + 0.4 * len(shown)), sharey=True)
    left.barh(at, [o.step_s * 1e3 - o.exposed_s * 1e3 for o in shown], color="#4878a8", label="computing")
    left.barh(
        at, [o.exposed_s * 1e3 for o in shown], left=[(o.step_s - o.exposed_s) * 1e3 for o in shown], color="#d8843a",
        label="exposed communication",
    )  # fmt: skip
    left.set_yticks(list(at), labels)
    left.invert_yaxis()
    left.set_xlabel("ms a step")
    left.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    right.barh(at, [o.bytes_per_step / 1e6 for o in shown], color="#6a9a58")
    right.set_xlabel("MB that a rank sends a step")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
