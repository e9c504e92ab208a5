"""The table shows each action once, in its rank's row and its time slot, and every fault where it is."""

from __future__ import annotations

import random
import re

import pytest
from rich.console import Console

from paracomm.errors import InvalidArgument
from paracomm.pipeline import SCHEDULES, Costs, build, faults, read_schedule, simulate
from paracomm.pipeline.table import WRONG, plain, slots, table


def cells(text):
    """{(rank, slot): "0F0"} of a table, by the columns that its heads give."""
    found = {}
    for line in text.splitlines():
        if re.fullmatch(r"\s+\d+(\s+\d+)*", line):
            ends = [(int(match[0]), match.end()) for match in re.finditer(r"\d+", line)]
        elif row := re.match(r"rank (\d+) ", line):
            begin = row.end()
            for slot, end in ends:
                if cell := line[begin:end].strip():
                    found[int(row[1]), slot] = cell
                begin = end
            assert not line[begin:].strip()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (2, 4), (4, 8), (3, 12)])
def test_every_action_is_in_the_slot_in_which_the_simulator_begins_it(name, ranks, microbatches):
    schedule = build(name, ranks=ranks, microbatches=microbatches)
    spans = simulate(schedule, Costs(1.0, 1.0, 1.0, whole=1.0)).spans
    expected = {(span.rank, round(span.start_s)): str(span.action) for span in spans}
    assert len(expected) == len(spans)
    assert cells(plain(schedule)) == expected
    assert cells(plain(schedule, width=30)) == expected


def test_a_table_as_it_looks():
    assert plain(build("1f1b", ranks=2, microbatches=2)) == (
        "          0   1   2   3   4   5\n"
        "rank 0  0F0 0F1     0B0     0B1\n"
        "rank 1      1F0 1B0 1F1 1B1\n"
    )  # fmt: skip


def test_long_ones_are_broken_into_lines_that_fit():
    schedule = build("gpipe", ranks=12, microbatches=20)
    text = plain(schedule, width=50)
    assert max(map(len, text.splitlines())) <= 50
    assert len(cells(text)) == 12 * 40
    with pytest.raises(InvalidArgument, match="10 characters"):
        plain(schedule, width=10)


WRONG_ORDER = read_schedule("0F0 0F1 0B0 0B1\n1F0 1B1 1F1 1B0")


def test_faults_are_marked_and_explained():
    found = faults(WRONG_ORDER)
    text = plain(WRONG_ORDER, found)
    marked = {cell for cell in cells(text).values() if cell.endswith("!")}
    assert marked == {"1B1!", "1B0!"}
    for fault in found:
        assert f"! {fault}\n" in text
    assert "!" not in plain(WRONG_ORDER)


def test_faults_are_red():
    console = Console(force_terminal=True, color_system="truecolor", width=200)
    with console.capture() as captured:
        console.print(table(WRONG_ORDER, faults(WRONG_ORDER)))
    red = console.render_str("1B1!", style=WRONG)
    with console.capture() as expected:
        console.print(red, style=WRONG, end="")
    assert expected.get().strip() in captured.get()
    assert captured.get().count("\x1b[1;37;41m") == 2


def test_what_hangs_stands_behind_a_gap():
    schedule = read_schedule("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1")
    text = plain(schedule, faults(schedule))
    assert cells(text) == {
        (0, 0): "0F0", (1, 1): "1F0",
        (0, 3): "0B0!", (0, 4): "0F1", (0, 5): "0B1", (1, 3): "1F1!", (1, 4): "1B0", (1, 5): "1B1",
    }  # fmt: skip
    assert "deadlock" in text


def test_a_fault_of_a_whole_rank_is_below_only():
    schedule = read_schedule("0F0 0B0 0F1", microbatches=2)
    text = plain(schedule, faults(schedule))
    assert "! rank 0: 0B1 is missing" in text
    assert not any("!" in cell for cell in cells(text).values())


@pytest.mark.parametrize("seed", range(40))
def test_nonsense_is_shown_too(seed):
    """Any actions on any ranks: each is shown, in its rank's order, and all that verify() names is marked."""
    rng = random.Random(seed)
    lines = [
        " ".join(f"{rng.randrange(4)}{rng.choice('FBW')}{rng.randrange(3)}" for _ in range(rng.randrange(1, 9)))
        for _ in range(3)
    ]
    schedule = read_schedule("\n".join(lines))
    found = faults(schedule)
    shown = cells(plain(schedule, found))
    for rank, mine in enumerate(schedule.ranks):
        row = [cell for (owner, _), cell in sorted(shown.items()) if owner == rank]
        marked = {fault.position for fault in found if fault.rank == rank}
        assert row == [f"{action}!" if at in marked else str(action) for at, action in enumerate(mine)]


def test_slots_wait_for_what_they_take():
    assert slots(build("gpipe", ranks=2, microbatches=1)) == [[(0, 0), (3, 1)], [(1, 0), (2, 1)]]
