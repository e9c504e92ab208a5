"""The bars that the project holds itself to, each a command: `python bench/bars.py NAME` (or `all`).

Each prints what it saw, what is asked, and PASS or SHORT, and appends JSON lines to bench/results/NAME.jsonl. Ratios
are of one run in which contenders take turns; on a shared machine a figure is worth little and a ratio some more.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from paracomm.cli.contest import report
from paracomm.cli.contest.case import Case, Sample, parse_sizes, show_size
from paracomm.cli.contest.contenders import GroupRunner, Runner, start_contender, start_ours
from paracomm.cli.contest.contest import Contest, Effort
from paracomm.cli.contest.launch import ContenderError, Place
from paracomm.cli.contest.peers import MPIS

HERE = Path(__file__).resolve().parent
MI = 1 << 20


@dataclass
class Bar:
    """One bar: collects figures beside what is asked."""

    name: str
    short: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)

    def hold(self, what: str, figure: float | None, asked: float, at_least: bool = True, unit: str = "x") -> None:
        """Prints one figure beside its bar. A figure that could not be had is short of any bar."""
        good = figure is not None and (figure >= asked if at_least else figure <= asked)
        self.short += not good
        sign = ">=" if at_least else "<="
        shown = "no figure" if figure is None else f"{figure:.3g} {unit}"
        typer.echo(f"  {'PASS ' if good else 'SHORT'}  {what:<64} {shown:>14}   asked {sign} {asked:g} {unit}")
        self.records.append(
            {"what": what, "figure": figure, "asked": asked, "at_least": at_least, "unit": unit, "pass": good}
        )

    def save(self) -> None:
        about = report.about_this_run() | {"bar": self.name}
        report.append_json(HERE / "results" / f"{self.name}.jsonl", (about | record for record in self.records))


Figures = dict[tuple[str, int], list[float]]
"""Seconds by label and size: the p50 of every round."""


def start_all(place: Place, names: Sequence[str]) -> list[Runner]:
    """Peers that can start; the others are named."""
    runners: list[Runner] = []
    for name in names:
        try:
            runners += start_contender(name, place)
        except ContenderError as error:
            typer.echo(f"  left out: {name}: {error}")
    return runners


def measure(runners: Sequence[Runner], sizes: Sequence[int], ranks: int, effort: Effort, bar: Bar) -> Figures:
    """Of the in-place float32 sum, for every label and size."""
    contest = Contest(runners, effort)
    figures: Figures = {}
    for nbytes in sizes:
        cells = contest.run_size([Case("all_reduce", nbytes, "float32", "sum", 0, True, ranks)])
        row = []
        for cell in cells:
            _, sample = cell.samples[True]
            if sample.p50s and not sample.wrong:
                figures[cell.runner.label, nbytes] = sample.p50s
                row.append(f"{cell.runner.label} {report.number(sample.p50 * 1e6)}")
            elif sample.wrong:
                row.append(f"{cell.runner.label} WRONG")
            else:
                row.append(f"{cell.runner.label}: {sample.trouble.splitlines()[0] if sample.trouble else '-'}")
        typer.echo(f"  {ranks} ranks {show_size(nbytes):>6}  us: " + ", ".join(row))
        bar.records += [record | {"what": "row"} for record in report.records(cells, {})]
    return figures


def ratio(figures: Figures, over: str, under: str, nbytes: int) -> float | None:
    """Time of `over` / time of `under`; `mpi`: the fastest MPI.

    The median of the rounds' ratios: within a round the contenders run one after the other, between rounds the host may
    have moved the cores to other caches.
    """
    top, bottom = rounds_of(figures, over, nbytes), rounds_of(figures, under, nbytes)
    if not top or not bottom:
        return None
    if len(top) != len(bottom):
        return statistics.median(top) / statistics.median(bottom)
    return statistics.median(t / b for t, b in zip(top, bottom, strict=True))


def rounds_of(figures: Figures, label: str, nbytes: int) -> list[float] | None:
    labels = tuple(MPIS) if label == "mpi" else (label,)
    return min(
        (figures[name, nbytes] for name in labels if (name, nbytes) in figures), key=statistics.median, default=None
    )


def p50(figures: Figures, label: str, nbytes: int) -> float | None:
    rounds = rounds_of(figures, label, nbytes)
    return statistics.median(rounds) if rounds else None


@contextlib.contextmanager
def closing(runners: list[Runner]) -> Iterator[list[Runner]]:
    try:
        yield runners
    finally:
        for runner in runners:
            runner.close()


# --- one host ---


def shm_private(bar: Bar, effort: Effort) -> None:
    """2 ranks, private tensors, 8 B to 64 MiB."""
    ours, sizes = "paracomm private", parse_sizes("8:64M")
    place = Place(2)
    with closing(start_ours(place, ["private"])) as runners:
        runners += start_all(place, ["gloo", *MPIS, "floor"])
        f = measure(runners, sizes, 2, effort, bar)
    bar.hold("share of the floor at 64 MiB", ratio(f, "floor", ours, 64 * MI), 0.6)
    bar.hold("share of the floor at 16 MiB", ratio(f, "floor", ours, 16 * MI), 0.45)
    for nbytes in (n for n in sizes if n >= MI):
        bar.hold(f"speed over Gloo at {show_size(nbytes)}", ratio(f, "gloo", ours, nbytes), 5)
    bar.hold("speed over the fastest MPI at 64 MiB", ratio(f, "mpi", ours, 64 * MI), 2.5)
    bar.hold("speed over the fastest MPI at 16 MiB", ratio(f, "mpi", ours, 16 * MI), 1.2)
    for nbytes in (n for n in sizes if n < 16 * MI):
        bar.hold(
            f"time over the fastest MPI's at {show_size(nbytes)}", ratio(f, ours, "mpi", nbytes), 1.2, at_least=False
        )


def shm_arena(bar: Bar, effort: Effort) -> None:
    """2, 4 and 8 ranks, arena tensors, 4 to 64 MiB."""
    sizes = [4 * MI, 16 * MI, 64 * MI]
    for ranks, asked in ((2, 0.85), (4, 0.7), (8, 0.7)):
        place = Place(ranks)
        with closing(start_ours(place, ["arena"])) as runners:
            runners += start_all(place, ["floor"])
            f = measure(runners, sizes, ranks, effort, bar)
        for nbytes in sizes:
            share = ratio(f, "floor", "paracomm arena", nbytes)
            bar.hold(f"share of the floor, {ranks} ranks at {show_size(nbytes)}", share, asked)


def latency(bar: Bar, effort: Effort) -> None:
    """2 ranks, 8 B to 1 KiB: the native loop beside IMB-MPI1, Python beside mpi4py."""
    sizes, place = parse_sizes("8:1K"), Place(2)
    with closing(start_ours(place, ["private"], arrays="numpy", native=True)) as runners:
        on_torch = start_ours(place, ["private"], arrays="torch")
        on_torch[0].label = "paracomm torch"
        runners += on_torch
        runners += start_all(place, ["impi", "openmpi", "imb"])
        f = measure(runners, sizes, 2, effort, bar)
    for nbytes in sizes:
        at = f"at {show_size(nbytes)}"
        bar.hold(f"native time over IMB-MPI1's {at}", ratio(f, "native private", "imb", nbytes), 1.2, at_least=False)
        numpy_ratio = ratio(f, "paracomm private", "mpi", nbytes)
        bar.hold(f"NumPy array: time over mpi4py's {at}", numpy_ratio, 1.0, at_least=False)
        on_tensor = p50(f, "paracomm torch", nbytes)
        bar.hold(f"torch tensor: time {at}", on_tensor and on_tensor * 1e6, 3.0, at_least=False, unit="us")


def oversubscribed(bar: Bar, effort: Effort) -> None:
    """4 and 8 ranks, with the default settings, 8 B to 64 MiB; and an idle communicator."""
    ours, sizes = "paracomm private", sorted({*parse_sizes("8:64M:4"), 16 * MI, 64 * MI})
    for ranks in (4, 8):
        place = Place(ranks)
        with closing(start_ours(place, ["private"])) as runners:
            bar.hold(f"CPU of an idle communicator, {ranks} ranks", idle_cpu(runners[0], ranks), 2, False, "%")
            runners += start_all(place, ["gloo", *MPIS])
            f = measure(runners, sizes, ranks, effort, bar)
        for nbytes in sizes:
            at = f"{ranks} ranks at {show_size(nbytes)}"
            bar.hold(f"speed over the fastest MPI, {at}", ratio(f, "mpi", ours, nbytes), 2 if nbytes >= 16 * MI else 1)
            if nbytes <= MI:
                bar.hold(f"speed over Gloo, {at}", ratio(f, "gloo", ours, nbytes), 10)


def idle_cpu(runner: Runner, ranks: int, seconds: float = 4.0) -> float:
    """Percent of a core that the busiest rank uses while nobody calls anything, after it has been used."""
    assert isinstance(runner, GroupRunner)
    runner.prepare(Case("all_reduce", 4 * MI, "float32", "sum", 0, True, ranks), Sample())
    before = runner.group.ask({"do": "cpu"})
    time.sleep(seconds)
    after = runner.group.ask({"do": "cpu"})
    shares = [(b["cpu_s"] - a["cpu_s"]) / (b["clock_s"] - a["clock_s"]) for a, b in zip(before, after, strict=True)]
    return 100 * max(shares)


# --- several hosts ---


@contextlib.contextmanager
def hosts(count: int, rate: str = "none") -> Iterator[None]:
    script = str(HERE / "hosts.sh")
    subprocess.run([script, "up", str(count), rate], check=True)
    try:
        yield
    finally:
        subprocess.run([script, "down"], check=True)


def iperf3(server: int = 1, client: int = 0, seconds: int = 3) -> float:
    """Bytes a second that one TCP stream delivers between two hosts."""
    inside = [["ip", "netns", "exec", f"pc{host}", "iperf3"] for host in (server, client)]
    with subprocess.Popen([*inside[0], "-s", "-1"], stdout=subprocess.DEVNULL) as listener:
        time.sleep(0.5)
        target = f"10.77.0.{server + 1}"
        done = subprocess.run(
            [*inside[1], "-c", target, "-t", str(seconds), "-J"], capture_output=True, text=True, check=False
        )
        listener.wait(10)
    return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 8


def tcp_hosts(bar: Bar, effort: Effort) -> None:
    """4 hosts of 1 rank, links of 1 Gbit/s, beside what iperf3 gets."""
    nbytes = 64 * MI
    with hosts(4, "1gbit"):
        place = Place(4, (0, 1, 2, 3))
        streams = [iperf3()]
        with closing(start_ours(place, ["private"])) as runners:
            runners += start_all(place, ["gloo"])
            f = measure(runners, [MI, 16 * MI, nbytes], 4, effort, bar)
        streams.append(iperf3())
    case, ours = Case("all_reduce", nbytes, "float32", "sum", 0, True, 4), p50(f, "paracomm private", nbytes)
    typer.echo(f"  iperf3: {streams[0] / 1e9:.4f} and {streams[1] / 1e9:.4f} GB/s")
    busbw = ours and case.bus_factor * nbytes / ours
    bar.hold("bus bandwidth over iperf3's, 64 MiB", busbw and busbw / statistics.mean(streams), 0.95)


def tcp_hierarchical(bar: Bar, effort: Effort) -> None:
    """2 hosts of 2 ranks, links of 1 Gbit/s, 64 MiB: beside Gloo, and the bytes between the hosts counted."""
    nbytes, place = 64 * MI, Place(4, (0, 0, 1, 1))
    with hosts(2, "1gbit"), closing(start_ours(place, ["private"], algorithm="hierarchical")) as runners:
        ours = runners[0]
        runners += start_all(place, ["gloo"])
        f = measure(runners, [MI, nbytes], 4, effort, bar)
        sent = between_hosts(ours, place, nbytes)
    bar.hold("speed over Gloo, 64 MiB", ratio(f, "gloo", "paracomm private", nbytes), 1.4)
    # 2S(h-1)/h with h = 2.
    for host, count in enumerate(sent):
        bar.hold(f"bytes that host {host} sends to the other, over the formula's", count / nbytes, 1.0, at_least=False)


def between_hosts(runner: Runner, place: Place, nbytes: int, iterations: int = 2) -> list[float]:
    """Payload bytes that each host's ranks send to other hosts in one all-reduce."""
    assert isinstance(runner, GroupRunner)
    runner.prepare(Case("all_reduce", nbytes, "float32", "sum", 0, True, place.ranks), Sample())
    replies = runner.group.ask({"do": "time", "iterations": iterations, "warm_up": 0})
    sent = [0.0] * (max(place.hosts) + 1)
    for rank, reply in enumerate(replies):
        for peer, after in reply["bytes_sent"].items():
            if place.hosts[int(peer)] != place.hosts[rank]:
                sent[place.hosts[rank]] += (after - reply["bytes_before"][peer]) / iterations
    return sent


def tcp_unshaped(bar: Bar, effort: Effort) -> None:
    """2 hosts of 1 rank, links as fast as they are, 64 MiB, beside Gloo."""
    nbytes, place = 64 * MI, Place(2, (0, 1))
    with hosts(2), closing(start_ours(place, ["private"])) as runners:
        runners += start_all(place, ["gloo"])
        f = measure(runners, [MI, 16 * MI, nbytes], 2, effort, bar)
        typer.echo(f"  iperf3: {iperf3() / 1e9:.3f} GB/s")
    bar.hold("speed over Gloo, 64 MiB", ratio(f, "gloo", "paracomm private", nbytes), 1.5)


def run_bars(bars: Mapping[str, Callable[..., None]], names: list[str], prefix: str = "", *arguments: Any) -> None:
    """Calls bars[name](Bar, *arguments) for each of `names` ("all": all), and exits, with 1 where a bar is short."""
    wanted = list(bars) if names == ["all"] else names
    unknown = [name for name in wanted if name not in bars]
    if unknown:
        raise typer.BadParameter(f"no bar '{unknown[0]}'; there are {', '.join(bars)}")
    short = 0
    for name in wanted:
        bar = Bar(f"{prefix}{name}")
        typer.echo(f"{name}: {bars[name].__doc__}")
        try:
            bars[name](bar, *arguments)
        except ContenderError as error:
            bar.hold(f"did not run: {error}", None, 1)
        finally:
            bar.save()
        short += bar.short
    typer.echo(f"{short} short" if short else "all bars hold")
    raise typer.Exit(1 if short else 0)


BARS = {
    "shm-private": shm_private,
    "shm-arena": shm_arena,
    "latency": latency,
    "oversubscribed": oversubscribed,
    "tcp-hosts": tcp_hosts,
    "tcp-hierarchical": tcp_hierarchical,
    "tcp-unshaped": tcp_unshaped,
}


def main(
    names: Annotated[list[str], typer.Argument(help=f"{', '.join(BARS)}, or all")],
    rounds: Annotated[int, typer.Option(help="visits of every contender per size")] = 3,
    seconds: Annotated[float, typer.Option(help="about how long one visit measures")] = 0.2,
) -> None:
    """Measure bars. The status is 1 where one is short."""
    run_bars(BARS, names, "", Effort(rounds=rounds, seconds=seconds))


if __name__ == "__main__":
    typer.run(main)
