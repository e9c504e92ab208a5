"""What every test gets: an end (nothing hangs), one thread a rank, torch's seed, and a count of skips with reasons."""

import faulthandler
import os
import sys
from collections import Counter
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# One test, however slow. Its ranks have shorter limits of their own (ranks.TIMEOUT_S).
TEST_LIMIT_S = 900


@pytest.fixture(autouse=True)
def end_of_time(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Iterator[None]:
    """Ends the whole run, with every thread's traceback, should one test not end."""
    faulthandler.dump_traceback_later(TEST_LIMIT_S, exit=True, file=pytestconfig.stash[_stderr])
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def seed() -> None:
    """What fails once fails again: the random numbers of a test that sets no seed of its own."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


_stderr: pytest.StashKey = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    # pytest captures descriptor 2 itself, so that only a copy reaches the terminal.
    config.stash[_stderr] = os.fdopen(os.dup(2), "w")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    if report.skipped and isinstance(report.longrepr, tuple) and report.longrepr[2] in ("Skipped", "Skipped: "):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped without saying why"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2] if isinstance(report.longrepr, tuple) else "?" for report in skipped)
    terminalreporter.write_line(f"skips: {len(skipped)}")
    for reason, times in reasons.most_common():
        terminalreporter.write_line(f"  {times:4d} x {reason}")
