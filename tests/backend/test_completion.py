"""A Work of torch.distributed is complete when it says so, whoever holds it and however it is waited for."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Rank, free_port, run_ranks
from torch import nn
from torch.distributed import _functional_collectives as funcol
from torch.nn.parallel import DistributedDataParallel

import paracomm

LIMIT_S = 10.0
POLL_S = 5.0


@dataclass
class Started:
    """A call under way: its outputs, and what they hold when it is complete."""

    name: str
    work: Any
    outputs: list[torch.Tensor]
    wants: list[torch.Tensor]

    def right(self) -> None:
        for number, (out, want) in enumerate(zip(self.outputs, self.wants, strict=True)):
            found = out.detach().resolve_conj().resolve_neg()
            if not torch.equal(found, want):
                wrong = f"{found.flatten()[:4].tolist()}, right is {want.flatten()[:4].tolist()}"
                raise AssertionError(f"output {number} begins with {wrong}")


# --- memory ---
def strided(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(n, 2, dtype=dtype)[:, 0]


Make = Callable[[int], torch.Tensor]
FORMS: dict[str, Make] = {
    "contiguous": lambda n: torch.zeros(n),
    "strided": strided,
    "part of a larger": lambda n: torch.zeros(n + 4)[2 : n + 2],
    "arena": lambda n: dist.group.WORLD.comm.empty(n, torch.float32, like="torch"),
    "arena strided": lambda n: dist.group.WORLD.comm.empty((n, 2), torch.float32, like="torch")[:, 0],
    "complex": lambda n: torch.zeros(n, dtype=torch.complex64),
    "complex strided": lambda n: strided(n, torch.complex64),
    "conjugated": lambda n: strided(n, torch.complex64).conj(),
    "negated": lambda n: torch._neg_view(strided(n)),
    "uint16": lambda n: torch.zeros(n, dtype=torch.uint16),
    "uint32 strided": lambda n: strided(n, torch.uint32),
    "bool": lambda n: torch.zeros(n, dtype=torch.bool),
    "bfloat16 strided": lambda n: strided(n, torch.bfloat16),
    "requires grad": lambda n: torch.zeros(n, requires_grad=True),
    "inference": lambda n: _inference(n),
}


def _inference(n: int) -> torch.Tensor:
    with torch.inference_mode():
        return strided(n)


COUNTS = (4, 0, 3000)


def mine(rank: int, n: int, like: torch.Tensor) -> torch.Tensor:
    whole = (torch.arange(n) + rank) % 2
    return whole.to(like.dtype)


def total(n: int, world_size: int, like: torch.Tensor) -> torch.Tensor:
    whole = sum(mine(r, n, torch.zeros(0, dtype=torch.int64)) for r in range(world_size))
    return torch.as_tensor(whole).to(like.dtype)


def starters(make: Make, n: int) -> Iterator[Callable[[], Started]]:
    """Every collective, a receive and a batch, each started with `async_op`."""
    size, rank = dist.get_world_size(), dist.get_rank()
    like = make(0)
    everybodys = [mine(r, n, like) for r in range(size)]
    sums = total(n, size, like)

    def filled(values: torch.Tensor | None = None) -> torch.Tensor:
        values = everybodys[rank] if values is None else values
        x = make(len(values))
        with torch.inference_mode(x.is_inference()), torch.no_grad():
            x.copy_(values)
        return x

    def all_reduce() -> Started:
        x = filled()
        return Started("all_reduce", dist.all_reduce(x, async_op=True), [x], [sums])

    def all_reduce_coalesced() -> Started:
        xs = [filled(), filled(everybodys[rank][: n // 2])]
        work = dist.all_reduce_coalesced(xs, async_op=True)
        return Started("all_reduce_coalesced", work, xs, [sums, sums[: n // 2]])

    def mixed_dtypes() -> Started:
        """Of several dtypes in one call; the integers are exact."""
        large = torch.full((3,), (1 << 40) + 1 + rank)
        x = filled()
        with dist._coalescing_manager(async_ops=True) as manager:
            dist.all_reduce(x)
            dist.all_reduce(large)
        want = torch.full((3,), size * ((1 << 40) + 1) + sum(range(size)))
        return Started("mixed dtypes", manager, [x, large], [sums, want])

    def reduce() -> Started:
        x = filled()
        work = dist.reduce(x, 1, async_op=True)
        return Started("reduce", work, [x] if rank == 1 else [], [sums] if rank == 1 else [])

    def broadcast() -> Started:
        x = filled()
        return Started("broadcast", dist.broadcast(x, 1, async_op=True), [x], [everybodys[1]])

    def all_gather() -> Started:
        outs = [make(n) for _ in range(size)]
        return Started("all_gather", dist.all_gather(outs, filled(), async_op=True), outs, everybodys)

    def all_gather_joined() -> Started:
        outs = list(make(n * size).split(n)) if n else [make(0) for _ in range(size)]
        return Started("all_gather joined", dist.all_gather(outs, filled(), async_op=True), outs, everybodys)

    def all_gather_uneven() -> Started:
        rows = [n // (r + 1) for r in range(size)]
        outs = [make(k) for k in rows]
        work = dist.all_gather(outs, filled(everybodys[rank][: rows[rank]]), async_op=True)
        return Started("all_gather uneven", work, outs, [e[:k] for e, k in zip(everybodys, rows, strict=True)])

    def all_gather_into_tensor() -> Started:
        out = make(n * size)
        work = dist.all_gather_into_tensor(out, filled(), async_op=True)
        return Started("all_gather_into_tensor", work, [out], [torch.cat(everybodys)])

    def all_gather_into_tensor_coalesced() -> Started:
        outs = [make(n * size), make(n // 2 * size)]
        with dist._coalescing_manager(async_ops=True) as manager:
            dist.all_gather_into_tensor(outs[0], filled())
            dist.all_gather_into_tensor(outs[1], filled(everybodys[rank][: n // 2]))
        wants = [torch.cat(everybodys), torch.cat([e[: n // 2] for e in everybodys])]
        return Started("all_gather_into_tensor coalesced", manager, outs, wants)

    def all_gather_coalesced() -> Started:
        outs = [[make(n), make(n // 2)] for _ in range(size)]
        work = dist.all_gather_coalesced(outs, [filled(), filled(everybodys[rank][: n // 2])], async_op=True)
        wants = [part for e in everybodys for part in (e, e[: n // 2])]
        return Started("all_gather_coalesced", work, [out for row in outs for out in row], wants)

    def reduce_scatter() -> Started:
        out = make(n)
        work = dist.reduce_scatter(out, [filled() for _ in range(size)], async_op=True)
        return Started("reduce_scatter", work, [out], [sums])

    def reduce_scatter_uneven() -> Started:
        rows = [n // (r + 1) for r in range(size)]
        out = make(rows[rank])
        work = dist.reduce_scatter(out, [filled(everybodys[rank][:k]) for k in rows], async_op=True)
        return Started("reduce_scatter uneven", work, [out], [sums[: rows[rank]]])

    def reduce_scatter_tensor() -> Started:
        out = make(n)
        work = dist.reduce_scatter_tensor(out, filled(torch.cat([everybodys[rank]] * size)), async_op=True)
        return Started("reduce_scatter_tensor", work, [out], [sums])

    def reduce_scatter_tensor_coalesced() -> Started:
        outs = [make(n), make(n // 2)]
        with dist._coalescing_manager(async_ops=True) as manager:
            for out in outs:
                dist.reduce_scatter_tensor(out, filled(torch.cat([everybodys[rank][: len(out)]] * size)))
        return Started("reduce_scatter_tensor coalesced", manager, outs, [sums, sums[: n // 2]])

    def all_to_all() -> Started:
        outs = [make(n) for _ in range(size)]
        work = dist.all_to_all(outs, [filled() for _ in range(size)], async_op=True)
        return Started("all_to_all", work, outs, everybodys)

    def all_to_all_single() -> Started:
        out = make(n * size)
        work = dist.all_to_all_single(out, filled(torch.cat([everybodys[rank]] * size)), async_op=True)
        return Started("all_to_all_single", work, [out], [torch.cat(everybodys)])

    def all_to_all_single_splits() -> Started:
        rows = [n // (peer + 1) for peer in range(size)]
        out = make(rows[rank] * size)
        source = filled(torch.cat([everybodys[rank][:k] for k in rows]))
        work = dist.all_to_all_single(out, source, [rows[rank]] * size, rows, async_op=True)
        return Started("all_to_all_single splits", work, [out], [torch.cat([e[: rows[rank]] for e in everybodys])])

    def gather() -> Started:
        outs = [make(n) for _ in range(size)] if rank == 1 else []
        work = dist.gather(filled(), outs or None, 1, async_op=True)
        return Started("gather", work, outs, everybodys if outs else [])

    def scatter() -> Started:
        out = make(n)
        work = dist.scatter(out, [filled(e) for e in everybodys] if rank == 1 else None, 1, async_op=True)
        return Started("scatter", work, [out], [everybodys[rank]])

    def receive() -> Started:
        out = make(n)
        work = dist.irecv(out, (rank - 1) % size)
        dist.isend(filled(), (rank + 1) % size)
        return Started("irecv", work, [out], [everybodys[(rank - 1) % size]])

    def receive_any() -> Started:
        """From any source, of two ranks."""
        out = make(n)
        work = dist.irecv(out, tag=3)
        dist.isend(filled(), (rank + 1) % size, tag=3)
        return Started("irecv from any", work, [out], [everybodys[(rank - 1) % size]])

    def batch() -> Started:
        out = make(n)
        ops = [
            dist.P2POp(dist.irecv, out, (rank - 1) % size),
            dist.P2POp(dist.isend, filled(), (rank + 1) % size),
        ]
        works = dist.batch_isend_irecv(ops)
        return Started("batch", works[0], [out], [everybodys[(rank - 1) % size]])

    def barrier() -> Started:
        return Started("barrier", dist.barrier(async_op=True), [], [])

    yield from (
        all_reduce, all_reduce_coalesced, mixed_dtypes, reduce, broadcast, all_gather, all_gather_joined,
        all_gather_uneven, all_gather_into_tensor, all_gather_into_tensor_coalesced, all_gather_coalesced,
        reduce_scatter, reduce_scatter_uneven, reduce_scatter_tensor, reduce_scatter_tensor_coalesced, all_to_all,
        all_to_all_single, all_to_all_single_splits, gather, scatter, receive, batch, barrier,
    )  # fmt: skip
    if size == 2:
        yield receive_any


CALLS = 24


def zero_dimensional(make: Make) -> Started:
    """0-d tensors, where the call takes them."""
    outs = [make(1).reshape(()) for _ in range(dist.get_world_size())]
    x = make(1).reshape(())
    with torch.inference_mode(x.is_inference()), torch.no_grad():
        x.fill_(1)
    return Started("all_gather 0-d", dist.all_gather(outs, x, async_op=True), outs, [torch.ones((), dtype=x.dtype)] * 2)


VIEWED_BY_TORCH = {
    "all_reduce", "all_reduce_coalesced", "mixed_dtypes", "broadcast", "all_gather", "all_gather_joined",
    "all_gather_uneven", "all_gather_into_tensor", "all_gather_into_tensor_coalesced", "all_gather_coalesced",
    "all_to_all", "all_to_all_single", "all_to_all_single_splits", "scatter", "receive", "receive_any", "batch",
}  # fmt: skip
"""Here torch.distributed itself calls view_as_real on complex tensors, which raises for conjugated ones."""


def everything() -> Iterator[tuple[str, Callable[[], Started]]]:
    for form, make in FORMS.items():
        for n in COUNTS:
            for start in starters(make, n):
                if form == "conjugated" and start.__name__ in VIEWED_BY_TORCH:
                    continue
                yield f"{form} x {n}: {start.__name__}", start
        if form not in ("requires grad", "conjugated"):
            yield f"{form} 0-d", lambda make=make: zero_dimensional(make)


class OfFuture:
    """What torch's coalesced calls return: a future, with a Work's methods."""

    def __init__(self, future: Any) -> None:
        self.get_future = lambda: future
        self.wait, self.is_completed, self.is_success = future.wait, future.done, future.done

    def exception(self) -> None:
        return None


def works_of(one: Started) -> list[Any]:
    works = list(one.work.works) if hasattr(one.work, "works") else [one.work]
    return [work if isinstance(work, dist.Work) else OfFuture(work) for work in works]


def checked(rank: Rank, end: Callable[[Started], None]) -> int:
    """Every call of every form, ended by `end`; all that is wrong is in one message. Returns the number of calls."""
    dist.init_process_group("paracomm", timeout=timedelta(seconds=LIMIT_S))
    wrong: list[str] = []
    calls = 0
    for name, start in everything():
        calls += 1
        try:
            one = start()
            end(one)
            one.right()
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:150]}")
            dist.distributed_c10d._world.pg_coalesce_state.clear()
            if isinstance(error, paracomm.PeerLost | paracomm.Timeout | paracomm.Mismatch):
                break
    assert not wrong, f"{len(wrong)} of {calls} are wrong:\n" + "\n".join(wrong)
    dist.destroy_process_group()
    return calls


# --- ways to end ---
def until_completed(one: Started) -> None:
    end = time.monotonic() + POLL_S
    for work in works_of(one):
        while not work.is_completed():
            assert time.monotonic() < end, f"{one.name} is never complete"
            time.sleep(0)


def polled(one: Started) -> None:
    until_completed(one)
    one.right()
    assert all(work.is_success() and work.exception() is None for work in works_of(one))


def dropped(one: Started) -> None:
    """What nobody waits for: a barrier ends collectives, a message of the same pair and tag ends receives."""
    tag = 3 if one.name == "irecv from any" else 0
    one.work = None
    gc.collect(0)
    dist.barrier()
    if one.name.startswith(("irecv", "batch")):
        size, rank = dist.get_world_size(), dist.get_rank()
        token = torch.zeros(1)
        works = [dist.irecv(token, (rank - 1) % size, tag=tag), dist.isend(torch.ones(1), (rank + 1) % size, tag=tag)]
        for work in works:
            work.wait()
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            try:
                return one.right()
            except AssertionError:
                time.sleep(0.001)


def waited_twice(one: Started) -> None:
    one.work.wait()
    one.right()
    one.work.wait()
    assert all(work.is_completed() and work.exception() is None for work in works_of(one))


def waited_by_two(one: Started) -> None:
    seen: list[Any] = []

    def wait() -> None:
        try:
            one.work.wait()
            one.right()
            seen.append(True)
        except BaseException as error:
            seen.append(error)

    other = threading.Thread(target=wait)
    other.start()
    wait()
    other.join()
    assert seen == [True, True], f"{one.name}: {seen}"


def future_waited(one: Started) -> None:
    """The future's value is there and the outputs are written; callbacks run."""
    futures = [work.get_future() for work in works_of(one)]
    ran = threading.Event()
    followed = [future.then(lambda done: (done.value(), ran.set())) for future in futures]
    for future in (*futures, *followed):
        future.wait()
    one.right()
    assert ran.is_set() and all(future.done() for future in futures)


def future_polled(one: Started) -> None:
    futures = [work.get_future() for work in works_of(one)]
    end = time.monotonic() + POLL_S
    while not all(future.done() for future in futures):
        assert time.monotonic() < end, f"the future of {one.name} is never done"
        time.sleep(0)
    one.right()


def held_by_cpp(one: Started) -> None:
    """Only the C++ half is held: it goes through torch's registry of works, and the Python half is collected."""
    works, one.work = works_of(one), None
    if not one.outputs or any(isinstance(work, OfFuture) for work in works):
        for work in works:
            work.wait()
        return
    token = torch.zeros(1)
    for work in works:
        torch._C._distributed_c10d._register_work(token, work)
    del works, work
    gc.collect(0)
    torch.ops._c10d_functional.wait_tensor(token)


ENDS = [polled, dropped, waited_twice, waited_by_two, future_waited, future_polled, held_by_cpp]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_every_call_and_memory(end: Any) -> None:
    counts = run_ranks(2, checked, end)
    assert min(counts) == len(COUNTS) * (len(FORMS) * CALLS - len(VIEWED_BY_TORCH)) + len(FORMS) - 2


def wrongly(one: Started) -> None:
    one.work.wait()
    one.wants = [want + 1 for want in one.wants if want.dtype == torch.float32]
    one.outputs = [out for out in one.outputs if out.dtype == torch.float32]


def test_a_wrong_value_is_noticed() -> None:
    with pytest.raises(AssertionError, match="are wrong"):
        run_ranks(2, checked, wrongly)


def in_world(rank: Rank, check: Callable[..., None], *args: Any) -> None:
    dist.init_process_group("paracomm", timeout=timedelta(seconds=LIMIT_S))
    check(rank.rank, *args)
    if dist.is_initialized():
        dist.destroy_process_group()


# --- two threads, many rounds ---
def many_rounds(rank: int) -> None:
    early = 0
    for _ in range(200):
        x = strided(4000)
        x.fill_(rank + 1.0)
        work = dist.all_reduce(x, async_op=True)
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
    assert not early, f"{early} of 200 times a thread returned before x was written"


# --- destroyed ---
def waited_after_destroy(rank: int) -> None:
    """What was complete before stays right; what was not raises a named error, as often as it is asked."""
    complete = [(name, start()) for name, start in everything()]
    dist.barrier()
    late = []
    for name, one in complete:
        try:
            until_completed(one)
        except AssertionError:
            late.append(name)
    pending = dist.irecv(strided(4), 1, tag=9) if rank == 0 else None
    dist.barrier()
    # Receives are not waited for: nobody may send what they ask for.
    ends = [
        each for each in everything() if "x 4:" in each[0] and not each[0].endswith(("receive", "receive_any", "batch"))
    ]
    complete += [(f"just before the end: {name}", start()) for name, start in ends]
    dist.destroy_process_group()
    wrong = list(late)
    for name, one in complete:
        try:
            one.work.wait()
            one.right()
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:150]}")
    assert not wrong, f"{len(wrong)} of {len(complete)} are wrong:\n" + "\n".join(wrong)
    if pending is not None:
        kinds = set()
        for _ in range(3):
            with pytest.raises(paracomm.Error) as caught:
                pending.wait()
            kinds.add((type(caught.value), type(pending.exception())))
        assert len(kinds) == 1 and pending.is_completed()


# --- futures ---
def futures_in_crossed_order(rank: int) -> None:
    """Two groups; the ranks ask for their futures in crossed order."""
    groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    xs = [torch.full((5,), rank + 1.0) for _ in groups]
    works = [dist.all_reduce(x, group=g, async_op=True) for x, g in zip(xs, groups, strict=True)]
    if rank == 1:
        # Nothing of rank 1 runs in the order that rank 0 waits in.
        works.reverse()
    began = time.monotonic()
    futures = [work.get_future() for work in works]
    assert time.monotonic() - began < 2.0
    for future in futures:
        future.wait()
    assert all((x == 3).all() for x in xs)


def futures_started_in_crossed_order(rank: int) -> None:
    """Rank 0: a future of group a, then a call of b; rank 1 the other way round."""
    a, b = dist.new_group([0, 1]), dist.new_group([0, 1])
    order = (a, b) if rank == 0 else (b, a)
    xs, futures = [], []
    began = time.monotonic()
    for group in order:
        xs.append(torch.full((5,), rank + 1.0))
        futures.append(dist.all_reduce(xs[-1], group=group, async_op=True).get_future())
    assert time.monotonic() - began < 2.0, "get_future() blocked"
    for future in futures:
        future.wait()
    assert all((x == 3).all() for x in xs)


def future_then_send(rank: int) -> None:
    x, token = torch.full((5,), rank + 1.0), torch.zeros(3)
    if rank == 0:
        future = dist.all_reduce(x, async_op=True).get_future()
        dist.send(torch.full((3,), 7.0), 1)
        future.wait()
    else:
        dist.recv(token, 0)
        assert (token == 7).all()
        dist.all_reduce(x)
    assert (x == 3).all()


def future_of_what_the_peer_never_calls(rank: int) -> None:
    """get_future() returns at once, is not done, and fails in the end."""
    if rank == 0:
        group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
        work = dist.all_reduce(strided(4), group=group, async_op=True)
        began = time.monotonic()
        future = work.get_future()
        assert time.monotonic() - began < 0.5 and not future.done()
        with pytest.raises(RuntimeError, match=r"timed out|Timeout"):
            future.wait()
        for _ in range(2):
            with pytest.raises(paracomm.Timeout):
                work.wait()
            assert isinstance(work.exception(), paracomm.Timeout)
    else:
        dist.new_group([0, 1], timeout=timedelta(seconds=1))
        time.sleep(2.0)


def chained(rank: int) -> None:
    """Callbacks that start the next collective, as PowerSGD's do."""
    x = torch.full((5,), rank + 1.0)
    y = torch.full((5,), rank + 1.0)

    def follow(done: Any) -> torch.Tensor:
        assert (done.value()[0] == 3).all()
        return dist.all_reduce(y, async_op=True).get_future().wait()[0] + x

    found = dist.all_reduce(x, async_op=True).get_future().then(follow).wait()
    assert (found == 6).all() and (y == 3).all()


def callback_order(rank: int) -> None:
    """Futures that are kept and futures that are dropped; each callback sees its own result."""
    seen: list[int] = []
    works, futures = [], []
    for k in range(20):
        x = torch.full((3, 2), float(k))[:, 0]
        work = dist.all_reduce(x, async_op=True)
        futures.append(work.get_future().then(lambda done, k=k: seen.append(k * int((done.value()[0] == 2 * k).all()))))
        works.append(work)
    del works
    gc.collect()
    for future in futures:
        future.wait()
    assert sorted(seen) == list(range(20)), seen


# --- failures and interrupts ---
def same_error_every_time(rank: int) -> None:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=0.5))
    if rank == 1:
        time.sleep(1.5)
        return
    works = [dist.all_reduce(x, group=group, async_op=True) for x in (torch.ones(4), strided(4))]
    works.append(dist.all_gather([strided(4), strided(4)], torch.ones(4), group=group, async_op=True))
    for work in works:
        kinds = set()
        for _ in range(4):
            with pytest.raises(paracomm.Timeout) as caught:
                work.wait()
            kinds.add((type(caught.value), str(caught.value), type(work.exception()), str(work.exception())))
        assert len(kinds) == 1, kinds
        assert work.is_completed() and not work.is_success()


def interrupted(rank: int, form: str) -> None:
    """Ctrl-C in wait() while the peer sleeps; then wait() and exception() again, as often as asked."""
    if rank == 1:
        time.sleep(1.5)
        return
    if form == "irecv":
        work = dist.irecv(torch.zeros(4), 1)
    elif form == "all_gather":
        work = dist.all_gather([torch.zeros(4), torch.zeros(4)], torch.ones(4), async_op=True)
    else:
        work = dist.all_reduce(strided(4) if form == "strided" else torch.ones(4), async_op=True)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        work.wait()
    timer.join()
    for _ in range(3):
        with pytest.raises((KeyboardInterrupt, paracomm.Error)):
            work.wait()
        work.exception()
        work.is_completed()
    del work
    gc.collect()


# --- memory ---
def inference(rank: int) -> None:
    """Started in inference mode, waited for outside of it; and the other way round."""
    with torch.inference_mode():
        x = strided(4)
        x.fill_(rank + 1.0)
        work = dist.all_reduce(x, async_op=True)
        outs = [strided(4), strided(4)]
        gathered = dist.all_gather(outs, torch.full((4,), rank + 1.0), async_op=True)
        received = strided(4)
        receive = dist.irecv(received, 1 - rank)
        dist.isend(torch.full((4,), rank + 1.0), 1 - rank)
    for one in (work, gathered, receive):
        one.wait()
    assert (x == 3).all() and (outs[0] == 1).all() and (outs[1] == 2).all() and (received == 2 - rank).all()
    y = strided(4)
    y.fill_(rank + 1.0)
    work = dist.all_reduce(y, async_op=True)
    with torch.inference_mode():
        work.wait()
    assert (y == 3).all()


def memory_replaced(rank: int) -> None:
    """The tensor's storage changes while the operation has the old one."""
    for turn in range(10):
        x = torch.zeros(100_000)
        work = dist.irecv(x, 1 - rank)
        with torch.no_grad():
            x.set_(torch.full((100_000,), 5.0))
        gc.collect(0)
        others = [torch.full((100_000,), -1.0) for _ in range(3)]
        dist.isend(torch.full((100_000,), float(turn)), 1 - rank).wait()
        work.wait()
        assert (x == 5).all() and all((other == -1).all() for other in others), turn


def only_reference(rank: int) -> None:
    """Everything but the Work, and then the Work too, is dropped."""
    for turn in range(20):
        if rank == 0:
            time.sleep(0.001)
        first = dist.all_reduce(torch.full((50_000, 2), rank + 1.0)[:, 0], async_op=True)
        dist.all_gather([strided(50_000), strided(50_000)], torch.full((50_000,), rank + 1.0), async_op=True)
        gc.collect(0)
        others = [torch.full((100_000,), -1.0) for _ in range(4)]
        assert (first.result()[0] == 3).all(), turn
        dist.barrier()
        assert all((other == -1).all() for other in others), turn


# --- held by C++ alone ---
def joined(rank: int) -> None:
    """DDP's join calls collectives from C++ and keeps the C++ half of their works."""
    torch.manual_seed(0)
    net = DistributedDataParallel(nn.Linear(4, 3))
    steps = 2 + rank  # rank 1 goes on alone
    with net.join(divide_by_initial_world_size=False):
        for step in range(steps):
            net.zero_grad()
            x = torch.ones(2, 4) * (rank + 1)
            net(x).sum().backward()
            # The mean over those that still come: rows of x summed.
            want = (2.0 + 4.0) / 2 if step < 2 else 4.0
            found = net.module.weight.grad
            assert torch.allclose(found, torch.full((3, 4), want)), (step, found)


def joined_unevenly(rank: int) -> None:
    """The same with the default division, static buffers and uneven inputs the other way round."""
    net = DistributedDataParallel(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    with net.join():
        for _ in range(3 - rank):
            net(torch.randn(4, 4)).sum().backward()
    weights = [torch.zeros_like(net.module[0].weight) for _ in range(2)]
    dist.all_gather(weights, net.module[0].weight.detach())
    assert torch.equal(*weights)


def registered(rank: int) -> None:
    """A Work in torch's registry of tensors that wait, its Python half collected."""
    for turn in range(20):
        x = torch.full((1000, 2), rank + 1.0)[:, 0] if turn % 2 else torch.full((1000,), rank + 1.0)
        work = dist.all_reduce(x, async_op=True)
        torch._C._distributed_c10d._register_work(x, work)
        del work
        gc.collect()
        assert (torch.ops._c10d_functional.wait_tensor(x) == 3).all(), turn


def functional(rank: int) -> None:
    """Functional collectives: each result is waited for when it is used, or by torch's registry."""
    group = dist.group.WORLD
    x = torch.full((6,), rank + 1.0)
    for _ in range(5):
        results = [
            (funcol.all_reduce(x, "sum", group), torch.full((6,), 3.0)),
            (funcol.all_gather_tensor(x, 0, group), torch.cat([torch.full((6,), 1.0), torch.full((6,), 2.0)])),
            (funcol.reduce_scatter_tensor(x, "sum", 0, group), torch.full((3,), 3.0)),
            (funcol.broadcast(x, 1, group), torch.full((6,), 2.0)),
            (funcol.all_to_all_single(x, [3, 3], [3, 3], group), torch.tensor([1.0] * 3 + [2.0] * 3)),
        ]
        large = (1 << 60) + 1  # no double
        coalesced = funcol.all_reduce_coalesced([x, x.double(), x.long() * large], "sum", group)
        wants = [torch.full((6,), 3.0), torch.full((6,), 3.0).double(), torch.full((6,), 3 * large)]
        results += list(zip(coalesced, wants, strict=True))
        gc.collect()
        for found, want in results:
            assert torch.equal(funcol.wait_tensor(found), want)
    y = funcol.all_reduce(x, "sum", group)
    dist.all_reduce(y)
    assert torch.equal(funcol.wait_tensor(y), torch.full((6,), 6.0))


CHECKS = [
    many_rounds, waited_after_destroy, futures_in_crossed_order, futures_started_in_crossed_order, future_then_send,
    future_of_what_the_peer_never_calls, chained, callback_order, same_error_every_time, inference, memory_replaced,
    only_reference, joined, joined_unevenly, registered, functional,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_completion(check: Any) -> None:
    run_ranks(2, in_world, check, timeout_s=45)


@pytest.mark.parametrize("form", ["contiguous", "strided", "all_gather", "irecv"])
def test_interrupted(form: str) -> None:
    run_ranks(2, in_world, interrupted, form, timeout_s=30)


# --- the end of the process ---
EXIT = """
import atexit, os, sys
import torch, torch.distributed as dist
rank = int(os.environ["RANK"])
def at_exit():
    dist.barrier()
    x = torch.ones(3)
    dist.all_reduce(x)
    print("exit", x.tolist(), flush=True)
    if sys.argv[1] == "destroy":
        dist.destroy_process_group()
atexit.register(at_exit)
dist.init_process_group("paracomm")
x = torch.ones(3)
dist.all_reduce(x)
"""


@pytest.mark.parametrize("way", ["leave", "destroy"])
def test_exit_handlers_of_the_user(way: str, tmp_path: Path) -> None:
    """Registered before init_process_group, so run after those that were registered in it."""
    (tmp_path / "script.py").write_text(EXIT)
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(tmp_path / "script.py"), way]
    started = [
        subprocess.Popen(
            command, env=shared | {"RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    for process in started:
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 0 and out == "exit [2.0, 2.0, 2.0]\n", err[-2000:]
