"""The contest: every size, every contender, round after round, so that noise meets all alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from paracomm.cli.contest.case import Case, Sample
from paracomm.cli.contest.contenders import Runner, Unsupported
from paracomm.cli.contest.launch import CaseError, ContenderError


@dataclass
class Effort:
    """How long to measure: `rounds` visits of about `seconds` each, with at least `least` calls."""

    rounds: int = 3
    seconds: float = 0.25
    least: int = 5
    most: int = 2000

    def iterations(self, call_s: float) -> int:
        return int(min(self.most, max(self.least, self.seconds / max(call_s, 1e-7))))


@dataclass
class Cell:
    """A runner's samples at one size: out of place and in place, as far as there are such."""

    runner: Runner
    samples: dict[bool, tuple[Case, Sample]] = field(default_factory=dict)


class Contest:
    """Runs cases over runners. A runner that dies is out; its cells from then on say why."""

    def __init__(self, runners: Sequence[Runner], effort: Effort) -> None:
        self.runners, self.effort = list(runners), effort
        self.out: dict[str, str] = {}

    def run_size(self, cases: Sequence[Case], note: Callable[[str], None] = lambda text: None) -> list[Cell]:
        """All runners over the cases of one size (out of place, in place)."""
        cells = [Cell(runner) for runner in self.runners]
        for case in cases:
            for cell in cells:
                cell.samples[case.in_place] = (case, Sample())
            self._run_case(case, cells, note)
        for runner in self.runners:
            if runner.label not in self.out:
                self._guard(runner, Sample(), runner.forget)
        return cells

    def _run_case(self, case: Case, cells: Sequence[Cell], note: Callable[[str], None]) -> None:
        iterations: dict[str, int] = {}
        for turn in range(self.effort.rounds):
            for cell in cells:
                runner, sample = cell.runner, cell.samples[case.in_place][1]
                if runner.label in self.out:
                    sample.trouble = self.out[runner.label]
                if sample.trouble:
                    continue
                note(f"{case.collective} {case.size} bytes, round {turn + 1}: {runner.label}")
                self._guard(runner, sample, functools.partial(self._visit, runner, case, sample, iterations))

    def _visit(self, runner: Runner, case: Case, sample: Sample, iterations: dict[str, int]) -> None:
        # Prepared at each visit: another runner over the same processes has used the buffers in between.
        fresh = Sample()
        call_s = runner.prepare(case, fresh)
        sample.algorithm, sample.transport = fresh.algorithm, fresh.transport
        if fresh.wrong is not None:
            sample.wrong = (sample.wrong or 0) + fresh.wrong
        count = iterations.setdefault(runner.label, self.effort.iterations(call_s))
        runner.measure(case, sample, count)

    def _guard(self, runner: Runner, sample: Sample, work: Callable[[], object]) -> None:
        try:
            work()
        except (Unsupported, CaseError) as reason:
            sample.trouble = str(reason)
        except ContenderError as error:
            sample.trouble = self.out[runner.label] = str(error)

    def close(self) -> None:
        for runner in self.runners:
            runner.close()
