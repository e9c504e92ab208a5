"""An operation is complete when it says so: every collective and memory form, however it is or is not waited for."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import paracomm
from tests.comm.cases import run_over

Numbers = np.ndarray
POLL_S = 5.0
LIMIT_S = 10.0


@dataclass
class Started:
    """A call under way: `read` gives its outputs as they are now, `want` what they hold when it is complete."""

    name: str
    work: Any
    read: Callable[[], Numbers]
    want: Numbers

    def right(self) -> None:
        found = self.read()
        if not np.array_equal(found, self.want):
            wrong = f"{found.flatten()[:4].tolist()}, right is {self.want.flatten()[:4].tolist()}"
            raise AssertionError(f"the output begins with {wrong}")


# --- memory ---
def _torch(shape: tuple[int, ...], dtype: torch.dtype, form: str) -> Any:
    if form == "strided":
        return torch.zeros(*shape, 2, dtype=dtype)[..., 0]
    if form == "transposed" and len(shape) == 2:
        return torch.zeros(shape[::-1], dtype=dtype).t()
    return torch.zeros(shape, dtype=dtype)


def _numpy(shape: tuple[int, ...], dtype: Any, form: str) -> Any:
    if form == "strided":
        return np.zeros((*shape, 2), dtype)[..., 0]
    if form == "backwards":
        return np.zeros(shape, dtype)[::-1]
    return np.zeros(shape, dtype)


Make = Callable[[Any, tuple[int, ...]], Any]
FORMS: dict[str, Make] = {
    "numpy contiguous": lambda comm, shape: _numpy(shape, np.float32, ""),
    "numpy strided": lambda comm, shape: _numpy(shape, np.float32, "strided"),
    "numpy backwards": lambda comm, shape: _numpy(shape, np.int64, "backwards"),
    "numpy bool strided": lambda comm, shape: _numpy(shape, np.bool_, "strided"),
    "numpy arena": lambda comm, shape: comm.empty(shape, np.float32, like="numpy"),
    "torch contiguous": lambda comm, shape: _torch(shape, torch.float32, ""),
    "torch strided": lambda comm, shape: _torch(shape, torch.float32, "strided"),
    "torch bfloat16 strided": lambda comm, shape: _torch(shape, torch.bfloat16, "strided"),
    "torch arena": lambda comm, shape: comm.empty(shape, torch.float32, like="torch"),
    "torch arena strided": lambda comm, shape: comm.empty((*shape, 2), torch.float32, like="torch")[..., 1],
    "torch uint16": lambda comm, shape: _torch(shape, torch.uint16, "strided"),
    "torch negated": lambda comm, shape: torch._neg_view(_torch(shape, torch.float32, "strided")),
}  # fmt: skip
SHAPES: tuple[tuple[int, ...], ...] = ((6,), (6, 2), (0,), (3000,))


def _fill(x: Any, values: Numbers) -> None:
    if isinstance(x, torch.Tensor):
        x.copy_(torch.from_numpy(np.ascontiguousarray(values)).to(x.dtype))
    else:
        x[...] = values


def _now(x: Any) -> Numbers:
    if isinstance(x, torch.Tensor):
        x = x.resolve_neg()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy().astype(np.float64)
    return np.asarray(x).astype(np.float64)


def _mine(rank: int, shape: tuple[int, ...]) -> Numbers:
    return (np.arange(np.prod(shape, dtype=int)).reshape(shape) + rank) % 2 + 0.0 if rank >= 0 else np.zeros(shape)


def _is_bool(x: Any) -> bool:
    return str(x.dtype) in ("bool", "torch.bool")


def started(comm: Any, make: Make, shape: tuple[int, ...]) -> Iterator[Callable[[], Started]]:
    """Every collective, a send and a receive, each started with `async_op`."""
    n, rank = comm.world_size, comm.rank
    everybodys = [_mine(r, shape) for r in range(n)]

    def filled() -> Any:
        x = make(comm, shape)
        _fill(x, everybodys[rank])
        return x

    total = sum(everybodys) if not _is_bool(make(comm, (0,))) else np.logical_or.reduce(everybodys).astype(float)
    rows = shape[0] // n
    blocks = [e[: rows * n].reshape(n, rows, *shape[1:]) for e in everybodys]

    def all_reduce() -> Started:
        x = filled()
        return Started("all_reduce", comm.all_reduce(x, async_op=True), lambda: _now(x), total)

    def all_reduce_out() -> Started:
        out = make(comm, shape)
        return Started("all_reduce out", comm.all_reduce(filled(), out=out, async_op=True), lambda: _now(out), total)

    def reduce() -> Started:
        x = filled()
        want = total if rank == 1 else everybodys[rank]
        return Started("reduce", comm.reduce(x, 1, async_op=True), lambda: _now(x), want)

    def broadcast() -> Started:
        x = filled()
        return Started("broadcast", comm.broadcast(x, 1, async_op=True), lambda: _now(x), everybodys[1])

    def all_gather() -> Started:
        out = make(comm, (n, *shape))
        want = np.stack(everybodys)
        return Started("all_gather", comm.all_gather(filled(), out=out, async_op=True), lambda: _now(out), want)

    def all_gather_v() -> Started:
        own = [shape[0] // 2, shape[0], shape[0] // 3][:n]
        out, x = make(comm, (sum(own), *shape[1:])), filled()[: own[rank]]
        want = np.concatenate([e[:r] for e, r in zip(everybodys, own, strict=True)])
        work = comm.all_gather_v(x, out=out, rows=own, async_op=True)
        return Started("all_gather_v", work, lambda: _now(out), want)

    def reduce_scatter() -> Started:
        out = make(comm, (rows, *shape[1:]))
        want = total[: rows * n].reshape(n, rows, *shape[1:])[rank]
        work = comm.reduce_scatter(filled()[: rows * n], out=out, async_op=True)
        return Started("reduce_scatter", work, lambda: _now(out), want)

    def reduce_scatter_v() -> Started:
        own = [shape[0], *[0] * (n - 1)]
        out = make(comm, (own[rank], *shape[1:]))
        work = comm.reduce_scatter_v(filled(), own, out=out, async_op=True)
        return Started("reduce_scatter_v", work, lambda: _now(out), total[: own[rank]])

    def all_to_all() -> Started:
        out = make(comm, (rows * n, *shape[1:]))
        want = np.concatenate([b[rank] for b in blocks])
        work = comm.all_to_all(filled()[: rows * n], out=out, async_op=True)
        return Started("all_to_all", work, lambda: _now(out), want)

    def all_to_all_v() -> Started:
        out = make(comm, (rows * n, *shape[1:]))
        want = np.concatenate([b[rank] for b in blocks])
        work = comm.all_to_all_v(filled()[: rows * n], [rows] * n, [rows] * n, out=out, async_op=True)
        return Started("all_to_all_v", work, lambda: _now(out), want)

    def gather() -> Started:
        out = make(comm, (n, *shape)) if rank == 1 else None
        want = np.stack(everybodys) if rank == 1 else np.zeros(0)
        work = comm.gather(filled(), 1, out=out, async_op=True)
        return Started("gather", work, lambda: np.zeros(0) if out is None else _now(out), want)

    def scatter() -> Started:
        out = make(comm, (rows, *shape[1:]))
        work = comm.scatter(filled()[: rows * n] if rank == 1 else None, 1, out=out, async_op=True)
        return Started("scatter", work, lambda: _now(out), blocks[1][rank])

    def exchange() -> Started:
        out = make(comm, shape)
        work = comm.recv(out, (rank - 1) % n, async_op=True)
        comm.send(filled(), (rank + 1) % n, async_op=True)
        return Started("recv", work, lambda: _now(out), everybodys[(rank - 1) % n])

    def barrier() -> Started:
        return Started("barrier", comm.barrier(async_op=True), lambda: np.zeros(0), np.zeros(0))

    yield from (all_reduce, all_reduce_out, reduce, broadcast, all_gather, all_gather_v, reduce_scatter,
                reduce_scatter_v, all_to_all, all_to_all_v, gather, scatter, exchange, barrier)  # fmt: skip


def everything(comm: Any) -> Iterator[tuple[str, Callable[[], Started]]]:
    for form, make in FORMS.items():
        for shape in SHAPES:
            for start in started(comm, make, shape):
                yield f"{form} {shape}", start


def checked(comm: Any, end: Callable[[Any, Started], None]) -> int:
    """Every call of every form, ended by `end`; all that is wrong is in one message. Returns the number of calls."""
    wrong: list[str] = []
    calls = 0
    for form, start in everything(comm):
        calls += 1
        try:
            one = start()
            end(comm, one)
            one.right()
        except Exception as error:
            wrong.append(f"{form}: {start.__name__}: {type(error).__name__}: {str(error)[:150]}")
            if isinstance(error, paracomm.PeerLost | paracomm.Timeout | paracomm.Mismatch):
                break
    assert not wrong, f"{len(wrong)} of {calls} are wrong:\n" + "\n".join(wrong)
    return calls


# --- ways to end ---
def until_done(one: Started) -> None:
    end = time.monotonic() + POLL_S
    while not one.work.done():
        assert time.monotonic() < end, f"{one.name} is never done"
        time.sleep(0)


def polled(comm: Any, one: Started) -> None:
    until_done(one)
    one.right()
    assert one.work.exception() is None


def dropped(comm: Any, one: Started) -> None:
    """A message may come after the barrier: the next one of the pair comes after it."""
    one.work = None
    gc.collect(0)
    comm.barrier()
    if one.name == "recv":
        token = np.zeros(1)
        work = comm.recv(token, (comm.rank - 1) % comm.world_size, async_op=True)
        comm.send(np.ones(1), (comm.rank + 1) % comm.world_size)
        work.wait()
        end = time.monotonic() + 0.5
        while not np.array_equal(one.read(), one.want) and time.monotonic() < end:
            time.sleep(0.001)


def waited_twice(comm: Any, one: Started) -> None:
    first = one.work.wait()
    one.right()
    assert one.work.wait() is first and one.work.done() and one.work.exception() is None


def polled_and_waited(comm: Any, one: Started) -> None:
    until_done(one)
    one.right()
    one.work.wait()


def waited_by_two(comm: Any, one: Started) -> None:
    seen: list[Any] = []

    def wait() -> None:
        try:
            one.work.wait()
            seen.append(np.array_equal(one.read(), one.want))
        except BaseException as error:
            seen.append(error)

    other = threading.Thread(target=wait)
    other.start()
    wait()
    other.join()
    assert seen == [True, True], f"{one.name}: {seen}"


@pytest.mark.parametrize("transport", ["shm", "local", "tcp"])
@pytest.mark.parametrize(
    "end", [polled, dropped, waited_twice, polled_and_waited, waited_by_two], ids=lambda end: end.__name__
)
def test_every_call_and_memory(transport: str, end: Any) -> None:
    counts = run_over(transport, 2, checked, end, timeout_s=LIMIT_S)
    assert min(counts) == len(FORMS) * len(SHAPES) * 14


@pytest.mark.parametrize("end", [polled, waited_by_two], ids=lambda end: end.__name__)
def test_three_ranks(end: Any) -> None:
    run_over("shm", 3, checked, end, timeout_s=LIMIT_S)


def wrongly(comm: Any, one: Started) -> None:
    one.work.wait()
    one.want = one.want + 1


def test_a_wrong_value_is_noticed() -> None:
    with pytest.raises(AssertionError, match="are wrong"):
        run_over("shm", 2, checked, wrongly, timeout_s=LIMIT_S)


def many_rounds(comm: Any) -> None:
    """Two threads wait for one strided all_reduce: both return with the result in place."""
    early = 0
    for turn in range(200):
        x = torch.zeros(4000, 2)[:, 0]
        x.fill_(comm.rank + 1.0)
        work = comm.all_reduce(x, async_op=True)
        gate, seen = threading.Barrier(2), []

        def wait(x: Any = x, work: Any = work, gate: Any = gate, seen: Any = seen) -> None:
            gate.wait()
            work.wait()
            seen.append(bool((x == 3).all()))

        threads = [threading.Thread(target=wait) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        early += seen != [True, True]
        assert turn >= 0
    assert not early, f"{early} of 200 times a thread returned before x was written"


def test_two_threads_wait_for_one_strided_call() -> None:
    run_over("shm", 2, many_rounds, timeout_s=LIMIT_S)


# --- the communicator ends ---
def waited_after_close(comm: Any) -> None:
    """What was complete stays right; what was not raises a named error, as often as it is asked."""
    complete = [start() for _, start in everything(comm)]
    comm.barrier()
    for one in complete:
        until_done(one)
    if comm.rank == 0:
        pending_out = torch.zeros(4, 2)[:, 0]
        pending = comm.recv(pending_out, 1, async_op=True)
    comm.barrier()
    comm.close()
    wrong = []
    for one in complete:
        try:
            one.work.wait()
            assert one.work.done() and one.work.exception() is None
            one.right()
        except Exception as error:
            wrong.append(f"{one.name}: {type(error).__name__}: {str(error)[:150]}")
    assert not wrong, f"{len(wrong)} of {len(complete)}:\n" + "\n".join(sorted(set(wrong)))
    if comm.rank == 0:
        errors = set()
        for _ in range(3):
            with pytest.raises(paracomm.Error) as caught:
                pending.wait()
            errors.add((type(caught.value), type(pending.exception())))
        assert len(errors) == 1 and pending.done()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_waited_after_close(transport: str) -> None:
    run_over(transport, 2, waited_after_close, timeout_s=LIMIT_S)


# --- failures ---
def same_error_every_time(comm: Any) -> None:
    strided = torch.zeros(6, 2)[:, 0]
    if comm.rank == 1:
        time.sleep(1.0)
        return
    works = [comm.all_reduce(x, timeout_s=0.2, async_op=True) for x in (np.ones(6), strided)]
    for work in works:
        kinds = set()
        for _ in range(4):
            with pytest.raises(paracomm.Timeout) as caught:
                work.wait()
            kinds.add((type(caught.value), str(caught.value), type(work.exception()), str(work.exception())))
        assert len(kinds) == 1, kinds
        assert work.done()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_the_same_error_every_time(transport: str) -> None:
    run_over(transport, 2, same_error_every_time, timeout_s=LIMIT_S)


def interrupted(comm: Any, form: str) -> None:
    """Ctrl-C in wait(), while the peer sleeps; then wait() and exception() again."""
    if comm.rank == 1:
        time.sleep(2.0)
        return
    x = np.ones(6) if form == "contiguous" else torch.ones(6, 2)[:, 0]
    work = comm.recv(x, 1, async_op=True) if form == "recv" else comm.all_reduce(x, async_op=True)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        work.wait()
    assert time.monotonic() - began < 1.5
    timer.join()
    for _ in range(3):
        with pytest.raises((KeyboardInterrupt, paracomm.Error)):
            work.wait()
        work.exception()
    gc.collect()


@pytest.mark.parametrize("form", ["contiguous", "strided", "recv"])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_interrupted(transport: str, form: str) -> None:
    run_over(transport, 2, interrupted, form, timeout_s=LIMIT_S)


# --- memory that goes away ---
def taken_away(comm: Any) -> None:
    peer = 1 - comm.rank
    room = bytearray(4096)
    work = comm.recv(room, peer, async_op=True)
    try:
        del room[:]
    except BufferError:
        emptied = False
    else:
        emptied = True
    comm.send(np.full(4096, 7, np.uint8), peer, async_op=True).wait()
    work.wait()
    assert not emptied, "the bytearray could be emptied while a message was to come into it"
    assert set(room) == {7}
    del work
    gc.collect()
    del room[:]  # nobody holds it any more


def replaced(comm: Any) -> None:
    """The tensor gets other storage while its old one is written; then only the operation knows the old one."""
    peer = 1 - comm.rank
    for turn in range(20):
        x = torch.zeros(200_000)
        work = comm.recv(x, peer, async_op=True)
        with torch.no_grad():
            x.set_(torch.full((200_000,), 5.0))
        gc.collect(0)
        others = [torch.full((200_000,), -1.0) for _ in range(3)]
        comm.send(torch.full((200_000,), float(turn)), peer, async_op=True).wait()
        work.wait()
        assert (x == 5).all(), "the tensor's new storage was written"
        assert all((other == -1).all() for other in others), "memory of others was written"


def resized(comm: Any) -> None:
    """Freed storage of a tensor in flight: the call ends, right or with a named error, and nobody dies."""
    peer = 1 - comm.rank
    x = torch.zeros(100_000)
    work = comm.recv(x, peer, async_op=True)
    sent = comm.send(torch.ones(100_000), peer, async_op=True)
    work.wait()
    sent.wait()
    assert (x == 1).all()


def only_reference(comm: Any) -> None:
    """The arrays of a call are dropped at once, strided ones and outputs too."""
    for turn in range(30):
        if comm.rank == 0:
            time.sleep(0.001)
        work = comm.all_reduce(torch.full((50_000, 2), 1.0 + comm.rank)[:, 0], async_op=True)
        late = comm.all_gather(np.full(50_000, 1.0 + comm.rank), out=np.zeros((2, 50_000, 2))[..., 0], async_op=True)
        gc.collect(0)
        others = [np.full(100_000, -1.0) for _ in range(4)]
        assert (work.wait() == 3).all(), turn
        assert (late.wait() == np.array([[1.0], [2.0]])).all(), turn
        assert all((other == -1).all() for other in others), turn


@pytest.mark.parametrize("check", [taken_away, replaced, resized, only_reference], ids=lambda check: check.__name__)
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_memory_in_flight(transport: str, check: Any) -> None:
    run_over(transport, 2, check, timeout_s=LIMIT_S)


def inference(comm: Any) -> None:
    """Started in inference mode, waited for outside of it."""
    with torch.inference_mode():
        x = torch.zeros(6, 2)[:, 0]
        x.fill_(comm.rank + 1.0)
        work = comm.all_reduce(x, async_op=True)
        out = torch.zeros(2, 6, 2)[..., 0]
        gathered = comm.all_gather(torch.full((6,), comm.rank + 1.0), out=out, async_op=True)
    work.wait()
    gathered.wait()
    assert x.tolist() == [3.0] * 6 and out.tolist() == [[1.0] * 6, [2.0] * 6]
    leaf = torch.ones(6, 2)[:, 0].requires_grad_()
    with torch.no_grad():
        comm.all_reduce(leaf, async_op=True).wait()
    assert leaf.tolist() == [2.0] * 6


def test_inference_mode() -> None:
    run_over("shm", 2, inference, timeout_s=LIMIT_S)
