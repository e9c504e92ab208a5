"""What ranks really do lands in the record: every operation, its axis, who was blocked, and what ran behind compute."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Rank, run_ranks

from paracomm import hooks, timeline
from paracomm.comm import spans
from paracomm.parallel import DataParallel, Mesh
from paracomm.timeline import shares
from paracomm.timeline.chrome import document
from paracomm.timeline.record import Record


@contextmanager
def telling_when_blocked(rank: Rank, times: int = 1) -> Iterator[None]:
    """Takes part in an exchange of all ranks when this one has been blocked `times` times inside."""
    entered, blocked = threading.Semaphore(0), spans.blocked

    def tell() -> None:
        for _ in range(times):
            entered.acquire()
        rank.exchange(b"")

    def enter(label: Any) -> Any:
        entered.release()
        return blocked(label)

    teller = threading.Thread(target=tell)
    teller.start()
    spans.blocked = enter
    try:
        yield
    finally:
        spans.blocked = blocked
    teller.join()


def of_kind(record: Record, kind: str) -> list[Any]:
    return [event for event in record.events if event.kind == kind]


def calls(comm: Any) -> dict[str, Any]:
    """Every call of a communicator, by the operation it is recorded as."""
    n, x = comm.world_size, np.ones(4)
    return {
        "all_reduce": lambda: comm.all_reduce(x.copy()),
        "reduce": lambda: comm.reduce(x.copy()),
        "broadcast": lambda: comm.broadcast(x.copy()),
        "all_gather": lambda: comm.all_gather(x),
        "reduce_scatter": lambda: comm.reduce_scatter(x),
        "all_to_all": lambda: comm.all_to_all(x),
        "gather": lambda: comm.gather(x),
        "scatter": lambda: comm.scatter(x if comm.rank == 0 else None, out=np.empty(4 // n)),
        "barrier": comm.barrier,
        "send": lambda: comm.rank == 0 and comm.send(x, 1),
        "recv": lambda: comm.rank == 1 and comm.recv(x, 0),
    }


def every_call(rank: Rank, transport: str | None) -> None:
    comm = rank.connect(transport=transport)
    comm.name = "dp"
    for operation, call in calls(comm).items():
        call()
        timeline.start()
        before = time.perf_counter_ns()
        called = call() is not False
        after = time.perf_counter_ns()
        record = timeline.stop()
        communication, waits = of_kind(record, "communication"), of_kind(record, "wait")
        assert len(record.events) == len(communication) + len(waits)
        if not called:
            assert record.events == []
            continue
        (event,) = communication
        assert event.name == event.details["operation"] == operation
        assert event.lane == event.details["axis"] == "dp"
        # A send may end before its peer has taken it in, and there was nothing to wait for then.
        assert len(waits) == 1 or (operation in ("send", "recv") and not waits)
        assert all(wait.details == event.details for wait in waits)
        assert before <= event.start_ns <= event.end_ns <= after
        blocks = comm.world_size if operation in ("all_gather", "gather") else operation != "barrier"
        assert event.details["bytes"] == 32 * blocks
        assert ("algorithm" in event.details) == (operation not in ("send", "recv"))
    timeline.start()
    comm.all_gather_v(np.ones((comm.rank + 1, 2)), rows=[1, 2])
    comm.all_to_all_v(np.ones((3, 2)), [1, 2] if comm.rank == 0 else [2, 1], [1, 2] if comm.rank == 0 else [2, 1])
    sizes = [event.details["bytes"] for event in of_kind(timeline.stop(), "communication")]
    assert sizes == [48, 16, 48]  # the second one tells all ranks of the largest block, and whether all can go on


@pytest.mark.parametrize("transport", [None, "tcp"])
def test_every_call_is_recorded(transport):
    run_ranks(2, every_call, transport)


def last_end(traced: dict[str, Any], kind: str) -> float:
    return max(event["ts"] + event["dur"] for event in traced["traceEvents"] if event.get("cat") == kind)


def behind_compute(rank: Rank) -> Any:
    """Ranks compute while operations go on by themselves; rank 1 comes to the last one when rank 0 waits for it."""
    comm = rank.connect()
    comm.barrier()
    timeline.start(comm)
    with timeline.span("step", "step 0"):
        x = torch.ones(1000)
        works = [comm.all_reduce(x, async_op=True) for _ in range(3)]
        with timeline.span("compute", "busy"):
            while not works[-1].done():
                time.sleep(0.001)
        for work in works:
            work.wait()
        if rank.rank == 0:
            with telling_when_blocked(rank):
                comm.all_reduce(x, async_op=True).wait()
        else:
            with timeline.span("compute", "more"):
                rank.exchange(b"")
            comm.all_reduce(x, async_op=True).wait()
    record = timeline.stop()
    assert x[0] == 16
    return document(record)


def test_only_what_is_waited_for_is_exposed():
    first, second = run_ranks(2, behind_compute)
    found = [shares(first), shares(second)]
    for each in found:
        assert set(each.exposed_ns) <= {("world", "all_reduce")}
        assert each.compute_ns + sum(each.exposed_ns.values()) + each.rest_ns == each.total_ns
        assert 0 < each.overlapped_ns <= each.total_ns
        assert sum(value for name, value in each.described().items() if name in ("compute", "bubble", "rest")) + sum(
            value for axis in each.described()["exposed"].values() for value in axis.values()
        ) == pytest.approx(1)
    # Rank 0 waited for rank 1, which computed meanwhile.
    assert found[0].exposed_ns["world", "all_reduce"] > 0
    assert last_end(first, "wait") >= last_end(second, "compute") > last_end(first, "compute")
    under_way = [event for event in first["traceEvents"] if event.get("cat") == "communication"]
    assert len(under_way) == 4 and all("queued_us" in event["args"] for event in under_way)
    ends = [event["ts"] + event["dur"] for event in under_way]
    assert all(event["ts"] >= end for event, end in zip(under_way[1:], ends, strict=False))  # one after the other


def launched_before(rank: Rank) -> None:
    """What was launched before the record began, and who waits on another thread."""
    comm = rank.connect()
    work = None if rank.rank else comm.all_reduce(np.ones(4), async_op=True)
    timeline.start()
    if rank.rank == 0:
        with telling_when_blocked(rank, times=2):
            thread = threading.Thread(target=lambda: comm.recv(np.ones(4), 1), name="beside")
            thread.start()
            work.wait()
            thread.join()
    else:
        rank.exchange(b"")
        comm.all_reduce(np.ones(4))
        comm.send(np.ones(4), 0)
    record = timeline.stop()
    if rank.rank == 0:
        waits = {record.threads[event.thread]: event.details["operation"] for event in of_kind(record, "wait")}
        assert waits == {"MainThread": "operation", "beside": "recv"}
        assert [event.name for event in of_kind(record, "communication")] == ["recv"]


def test_waits_of_other_threads_and_of_earlier_operations():
    run_ranks(2, launched_before)


def on_axes(rank: Rank) -> None:
    comm = rank.connect()
    with Mesh(comm, dp=2, tp=2) as mesh:
        names = [mesh.group(*axes).name for axes in (("dp",), ("tp",), ("dp", "tp"), ("dp", "cp"), ("cp",))]
        assert names == ["dp", "tp", "dp+tp", "dp", ""]
        assert mesh.group("dp").split(0).name == "dp"  # a twin
        assert mesh.group("tp").split(rank.rank).name == ""
        timeline.start()
        mesh.group("tp").all_reduce(np.ones(1))
        mesh.group("cp").all_reduce(np.ones(1))  # of one rank: nothing
        mesh.group("cp").all_reduce(np.ones(1), async_op=True).wait()
        assert [event.details["axis"] for event in timeline.stop().events] == ["tp", "tp"]


def test_groups_of_a_mesh_have_their_axes_as_names():
    run_ranks(4, on_axes)


def reduced(rank: Rank, hooked: bool) -> Any:
    comm = rank.connect()
    model = torch.nn.Linear(100, 100)
    with Mesh(comm) as mesh:
        options: dict[str, Any] = {}
        if hooked:
            options = {"hook": hooks.int8_hook, "state": hooks.QuantizedState(mesh.group("dp"), bits=8)}
        parallel = DataParallel(model, mesh, **options)
        for _ in range(2):
            parallel(torch.randn(3, 100)).sum().backward()
            parallel.finish()
        timeline.start(comm)
        with timeline.span("step", "a step"):
            loss = parallel(torch.randn(3, 100)).sum()
            if rank.rank:
                with timeline.span("compute", "late"):
                    rank.exchange(b"")
            with telling_when_blocked(rank) if rank.rank == 0 else nullcontext():
                loss.backward()
                parallel.finish()
        record = timeline.stop()
    operations = {event.name for event in of_kind(record, "communication")}
    assert ("all_to_all" in operations) == hooked
    assert {event.lane for event in of_kind(record, "communication")} == {"dp"}
    return document(record)


@pytest.mark.parametrize("hooked", [False, True])
def test_what_the_reducer_waits_for(hooked):
    first, second = run_ranks(2, reduced, hooked)
    assert {axis for axis, _ in shares(first).exposed_ns} == {"dp"}
    assert last_end(first, "wait") >= last_end(second, "compute")


def through_torch(rank: Rank) -> None:
    dist.init_process_group("paracomm")
    dist.all_reduce(torch.ones(3))
    timeline.start()
    dist.all_reduce(torch.ones(3))
    names = [event.name for event in of_kind(timeline.stop(), "communication")]
    assert names == ["all_reduce"]
    dist.destroy_process_group()


def test_the_backends_calls_are_recorded_too():
    run_ranks(2, through_torch)
