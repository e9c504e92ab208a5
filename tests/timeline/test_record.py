"""The record: off and on, what it keeps, whose time it has, and what is written and read again."""

from __future__ import annotations

import json
import random
import threading
import time
from types import SimpleNamespace

import pytest
from ranks import Rank, run_ranks

from paracomm import timeline
from paracomm.errors import Error, InvalidArgument
from paracomm.timeline import clock, merged, read, record, shares
from paracomm.timeline.chrome import document


@pytest.fixture(autouse=True)
def off():
    assert record.current is None
    yield
    record.current = None


def test_off_there_is_nothing():
    with timeline.span("compute", "a") as inside:
        assert inside is None
    assert timeline.span("compute", "a") is timeline.span("wait", "b", bytes=3)  # nothing is made for it
    timeline.add("communication", "c", 1, 2, lane="dp")
    timeline.later("communication", "d", lambda: (1, 2), lane="dp")
    assert timeline.start().events == []
    with pytest.raises(Error, match=r"start\(\) came twice"):
        timeline.start()
    assert timeline.stop().events == []
    with pytest.raises(Error, match=r"without a start\(\)"):
        timeline.stop()


def test_spans_of_threads_errors_and_ends():
    timeline.start()
    with pytest.raises(ZeroDivisionError), timeline.span("compute", "fails", turn=1):
        1 / 0  # noqa: B018
    thread = threading.Thread(target=lambda: timeline.span("compute", "beside").__enter__(), name="lane")
    thread.start()
    thread.join()
    with timeline.span("step", "cut off"):
        timeline.add("communication", "known", 5, 9, lane="dp", bytes=8)
        timeline.later("communication", "ended", lambda: (10, 20), lane="dp")
        timeline.later("communication", "under way", lambda: None, lane="dp")
        found = timeline.stop()
    names = {event.name: event for event in found.events}
    assert set(names) == {"fails", "known", "ended", "under way"}
    assert names["fails"].details == {"turn": 1} and names["fails"].end_ns >= names["fails"].start_ns
    assert names["known"][2:5] == (5, 9, "dp")
    assert names["ended"][2:4] == (10, 20) and names["ended"].asked_ns > found.start_ns
    assert found.start_ns <= names["under way"].start_ns <= names["under way"].end_ns == found.end_ns


def test_threads_of_one_name_have_lanes_of_their_own():
    """Of the hooks, say: what they did may overlap."""
    meet = threading.Barrier(2)

    def work() -> None:
        with timeline.span("compute", "beside"):
            meet.wait()

    timeline.start()
    threads = [threading.Thread(target=work, name="twin") for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = document(timeline.stop())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    found = [lanes[event["tid"]] for event in events if event["name"] == "beside"]
    assert len(set(found)) == 2 and all(name.startswith("thread twin") for name in found)


def test_a_file_is_chromes_format(tmp_path):
    timeline.start()
    with timeline.span("step", "step 0"), timeline.span("compute", "forward", turn=0):
        wall = time.time_ns()
    timeline.stop().write(tmp_path / "new" / "rank-0.json")
    (read_again,) = read(tmp_path / "new")
    assert read_again == json.loads((tmp_path / "new/rank-0.json").read_text())
    (forward,) = [event for event in read_again["traceEvents"] if event.get("cat") == "compute"]
    assert forward["ph"] == "X" and forward["pid"] == 0 and forward["args"] == {"turn": 0}
    # Wall clock, as torch's profiler has it.
    began = read_again["baseTimeNanoseconds"] + forward["ts"] * 1000
    assert began - 50e3 <= wall <= began + forward["dur"] * 1000 + 50e3
    processes = [event["args"] for event in read_again["traceEvents"] if event["name"] == "process_name"]
    assert processes == [{"name": "rank 0"}]
    found = shares(read_again)
    assert found.compute_ns + found.rest_ns == found.total_ns and found.compute_ns > 0


def skewed_exchange(rank: Rank, offset_ns: int, spread_s: float):
    """A communicator whose messages take any time, and a clock that is `offset_ns` off."""
    delays = random.Random(rank.rank)

    def exchange(blob: bytes) -> list[bytes]:
        time.sleep(delays.random() * spread_s)
        found = rank.exchange(blob)
        time.sleep(delays.random() * spread_s)
        return found

    clock.now = lambda: time.perf_counter_ns() + offset_ns
    hosts = list(range(rank.world_size))
    comm = SimpleNamespace(rank=rank.rank, world_size=rank.world_size, exchange=exchange, host_indices=hosts)
    return clock.align(comm)


def skewed(rank: Rank, spread_s: float):
    offset_ns = [0, 5_000_000_000, -70_000_000_000][rank.rank]
    found = skewed_exchange(rank, offset_ns, spread_s)
    return found, found.ahead_ns + offset_ns


@pytest.mark.parametrize("spread_s", [0.0, 0.004])
def test_clocks_of_hosts_are_aligned_within_the_bound(spread_s):
    results = run_ranks(3, skewed, spread_s)
    for found, error in results:
        assert abs(error) <= found.error_ns < 0.2e9
        assert found.began_ns == results[0][0].began_ns and found.unix_ns == results[0][0].unix_ns
    assert results[0][0].error_ns == 0 and results[1][0].error_ns > 0


def one_host(rank: Rank, host_id: str):
    comm = rank.connect(host_id=host_id or f"host {rank.rank}")
    if rank.rank == 1 and not host_id:
        clock.now = record.now = lambda: time.perf_counter_ns() + 3_000_000_000
    started = timeline.start(comm)
    comm.barrier()
    with timeline.span("compute", "after the barrier"):
        pass
    stopped = timeline.stop()
    assert started is stopped
    return document(stopped)


@pytest.mark.parametrize("host_id", ["same", ""])
def test_ranks_have_one_time(host_id):
    first, second = run_ranks(2, one_host, host_id)
    assert first["baseTimeNanoseconds"] == second["baseTimeNanoseconds"]
    limit_us = second["paracomm"]["clock_error_us"]
    assert (limit_us == 0) == (host_id == "same") and limit_us < 1e5
    assert [each["paracomm"]["rank"] for each in (first, second)] == [0, 1]
    (a,), (b,) = ([e for e in each["traceEvents"] if e.get("cat") == "compute"] for each in (first, second))
    (barrier,) = [e for e in first["traceEvents"] if e.get("cat") == "communication" and e["name"] == "barrier"]
    assert a["ts"] >= barrier["ts"]
    # Whoever is after the barrier is after the beginning of both.
    assert b["ts"] + limit_us >= barrier["ts"]


def written(folder, ranks=2, run=0):
    """Files of made-up ranks."""
    for rank in range(ranks):
        of = record.Record(rank, ranks, clock.Clock(0, 0, 7 + run, 7 + run, 100))
        of.events = [record.Event("compute", "work", 200, 300, "", of.thread, {})]
        of.close()
        of.write(folder / f"rank-{rank}.json")


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InvalidArgument, match=r"cannot read '.*rank-0.json': No such file"):
        read(tmp_path)
    written(tmp_path, ranks=3)
    written(tmp_path, ranks=2)  # a smaller run later: what the larger one left is not of it
    assert len(read(tmp_path)) == 2
    written(tmp_path / "other", run=1)
    (tmp_path / "other/rank-0.json").rename(tmp_path / "rank-0.json")
    with pytest.raises(InvalidArgument, match=r"rank-1.json' is of another run"):
        read(tmp_path)
    (tmp_path / "rank-1.json").unlink()
    with pytest.raises(InvalidArgument, match=r"cannot read '.*rank-1.json'"):
        read(tmp_path)
    for text, why in (("{", "is no JSON"), ("[]", "is no trace"), ('{"traceEvents": []}', "was not written by")):
        (tmp_path / "rank-0.json").write_text(text)
        with pytest.raises(InvalidArgument, match=why):
            read(tmp_path)


def test_torchs_trace_goes_below_its_rank(tmp_path):
    written(tmp_path)
    documents = read(tmp_path)
    documents[1]["paracomm"] |= {"process": 77, "host": "far", "own_clock_ahead_us": 500.0}
    base = documents[0]["baseTimeNanoseconds"]
    foreign = {
        "host_name": "far",
        "baseTimeNanoseconds": base - 2_000_000,
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 77, "tid": 0, "ts": 0.0, "args": {"name": "python"}},
            {"ph": "M", "name": "thread_name", "pid": 77, "tid": 5, "args": {"name": "thread 5"}},
            {"ph": "X", "name": "aten::mm", "pid": 77, "tid": 5, "ts": 2600.0, "dur": 3.0},
            {"ph": "i", "name": "a mark", "pid": "Traces", "tid": "t", "ts": 2600.0},
        ],
    }
    whole = merged(documents, [foreign])
    by_name = {event["name"]: event for event in whole["traceEvents"] if event["pid"] in (1, "Traces")}
    mm = by_name["aten::mm"]
    assert mm["pid"] == 1 and mm["ts"] == 100.0 and mm["tid"] not in (1, 2)
    assert by_name["thread_name"]["tid"] == mm["tid"] and by_name["process_name"]["args"] == {"name": "rank 1"}
    assert by_name["a mark"]["ts"] == 100.0
    assert len(whole["traceEvents"]) == sum(len(each["traceEvents"]) for each in documents) + 3
    assert [facts["rank"] for facts in whole["paracomm"]] == [0, 1]
