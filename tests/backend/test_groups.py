"""Process groups: how they start, split, time out, fail and end; point-to-point; works and futures."""

from __future__ import annotations

import _thread
import inspect
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Rank, rank_outcomes, run_ranks

from paracomm import InvalidArgument, Mismatch, PeerLost, Timeout
from paracomm.bootstrap import fresh_store

SCRIPT = """
import torch, torch.distributed as dist
dist.init_process_group("paracomm")
x = torch.ones(3) * (dist.get_rank() + 1)
dist.all_reduce(x)
assert x.tolist() == [3.0] * 3 and dist.get_backend() == "paracomm"
import sys
assert type(dist.group.WORLD).__module__ == "paracomm.backend.process_group"
dist.destroy_process_group()
"""


def total(x: float = 1.0, group: Any = None) -> float:
    tensor = torch.tensor([x])
    dist.all_reduce(tensor, group=group)
    return float(tensor)


# --- start and end ---
def test_nothing_is_imported(tmp_path: Path) -> None:
    """Under torchrun, by the entry point: the script imports torch alone."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_autoload_is_light_and_never_raises() -> None:
    code = (
        "import sys, paracomm._auto as auto; assert 'torch' not in sys.modules and 'paracomm._C' not in sys.modules\n"
        "import types; sys.modules['torch'] = types.ModuleType('torch')\n"
        "import warnings; warnings.simplefilter('ignore'); auto.register()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def start(rank: Rank, method: str, folder: str) -> None:
    arguments: dict[str, Any] = {"rank": rank.rank, "world_size": rank.world_size}
    if method == "file":
        dist.init_process_group("paracomm", init_method=f"file://{folder}/init", **arguments)
    elif method == "store":
        dist.init_process_group("paracomm", store=dist.FileStore(f"{folder}/store", rank.world_size), **arguments)
    else:
        dist.init_process_group(method)
    assert total(rank.rank + 1.0) == 3
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["paracomm", "cpu:paracomm", "cpu:paracomm,cuda:gloo", "file", "store"])
def test_start(method: str, tmp_path: Path) -> None:
    run_ranks(2, start, method, str(tmp_path))


def again(rank: Rank) -> None:
    for turn in range(3):
        dist.init_process_group("paracomm", pg_options={"transport": "tcp"} if turn == 1 else None)
        assert total() == rank.world_size
        dist.destroy_process_group()
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    with pytest.raises(InvalidArgument, match="pg_options"):
        dist.init_process_group("paracomm", pg_options=3)


def groups(rank: Rank) -> None:
    dist.init_process_group("paracomm")
    low, high = dist.new_group([0, 1]), dist.new_group([2, 3], timeout=timedelta(seconds=30))
    mine = low if rank.rank < 2 else high
    assert total(rank.rank, mine) == (1 if rank.rank < 2 else 5)
    own, _ = dist.new_subgroups(1)
    assert total(7.0, own) == 7
    odd = dist.group.WORLD.split_group([r for r in range(4) if r % 2 == rank.rank % 2])
    assert odd.size() == 2 and odd.rank() == rank.rank // 2
    x = torch.tensor([float(rank.rank)])
    odd.allreduce([x]).wait()
    assert x.item() == (2 if rank.rank % 2 == 0 else 4)
    odd.shutdown()
    dist.destroy_process_group(mine)
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    assert total(1.0, mesh["tp"].get_group()) == 2 and dist.get_backend(mesh["dp"].get_group()) == "paracomm"
    assert total() == 4
    dist.destroy_process_group()


def test_what_the_dead_left_in_a_store() -> None:
    """Two ranks, twice over one Store, as when torchrun restarts its workers; the second time rank 1 comes late."""
    shared = dist.HashStore()

    def meet(rank: int) -> bytes:
        time.sleep(0.1 * rank)
        store = fresh_store(shared, rank, 2, time.monotonic() + 20)
        store.set(f"from {rank}", secrets.token_hex(4))
        return b"".join(bytes(store.get(f"from {r}")) for r in range(2))

    with ThreadPoolExecutor(2) as threads:
        first, second = (list(threads.map(meet, range(2))) for _ in range(2))
    assert first[0] == first[1] and second[0] == second[1] and first[0] != second[0]
    shared.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(Timeout, match="rank 0 met not all 2"):
        fresh_store(shared, 0, 2, time.monotonic() + 0.2)
    with pytest.raises(Timeout, match=r"rank 0 met not all 2 ranks in the Store .*: rank 1 did not come"):
        fresh_store(dist.HashStore(), 0, 2, time.monotonic() + 0.2)


def test_again() -> None:
    run_ranks(2, again)


def test_groups() -> None:
    run_ranks(4, groups)


# --- timeouts and failures ---
def timeouts(rank: Rank) -> None:
    dist.init_process_group("paracomm")
    slow = dist.new_group(timeout=timedelta(seconds=0.3))
    dist.barrier(slow)
    if rank.rank == 0:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"all_reduce.* rank 1 \(.*timed out after 0.3 s") as caught:
            total(1.0, slow)
        assert isinstance(caught.value, Timeout) and isinstance(caught.value, TimeoutError)
        assert 0.25 < time.monotonic() - start < 5
    dist.barrier()
    brief = dist.new_group()
    if rank.rank == 0 and "timeout" in inspect.signature(dist.barrier).parameters:  # not in torch 2.6
        with pytest.raises(Timeout, match=r"0\.2 s"):
            dist.barrier(brief, timeout=timedelta(seconds=0.2))
    dist.barrier()
    for setting in ("wait", "set"):
        group = dist.new_group()
        if rank.rank == 0 and setting == "set":
            group.set_timeout(timedelta(seconds=0.2))
            with pytest.raises(Timeout, match=r"0\.2 s"):
                total(1.0, group)
        elif rank.rank == 0:
            with pytest.raises(Timeout, match=r"0\.2"):
                dist.all_reduce(torch.ones(1), group=group, async_op=True).wait(timedelta(seconds=0.2))
        dist.barrier()
    dist.destroy_process_group()


def monitored(rank: Rank) -> None:
    dist.init_process_group("paracomm")
    dist.monitored_barrier()
    dist.monitored_barrier(timeout=timedelta(seconds=5), wait_all_ranks=True)
    if rank.rank == 0:
        with pytest.raises(RuntimeError, match=r"Ranks 1, 2 failed to pass monitoredBarrier in 200 ms \(host"):
            dist.monitored_barrier(timeout=timedelta(seconds=0.2), wait_all_ranks=True)
        with pytest.raises(RuntimeError, match="Rank 0 timed out in monitoredBarrier"):
            dist.distributed_c10d._get_default_group().monitored_barrier(timedelta(0))
    assert total() == 3  # the group is as it was
    dist.destroy_process_group()


def mismatch(rank: Rank) -> None:
    dist.init_process_group("paracomm")
    with pytest.raises(RuntimeError, match="count") as caught:
        dist.all_reduce(torch.ones(3 + rank.rank))
    assert isinstance(caught.value, Mismatch)
    dist.destroy_process_group()


def killed(rank: Rank, how: str) -> str:
    dist.init_process_group("paracomm", timeout=timedelta(seconds=60))
    total()
    if rank.rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f"rank 1 .*{socket.gethostname()}") as caught:
        if how == "future":
            dist.all_reduce(torch.ones(1000), async_op=True).get_future().then(lambda f: f.value()).wait()
        elif how == "recv":
            dist.recv(torch.ones(4), 1)
        else:
            total()
    assert time.monotonic() - start < 10
    assert how == "future" or isinstance(caught.value, PeerLost)
    return str(caught.value)


@pytest.mark.parametrize(("check", "world_size"), [(timeouts, 2), (monitored, 3), (mismatch, 2)])
def test_failures(check: Any, world_size: int) -> None:
    run_ranks(world_size, check)


@pytest.mark.parametrize("how", ["sync", "future", "recv"])
def test_killed(how: str) -> None:
    outcomes = rank_outcomes(3, killed, how, casualties=[1])
    for rank in (0, 2):
        assert not outcomes[rank].failure, outcomes[rank].failure
        assert ("recv" if how == "recv" and rank == 0 else "all_reduce") in outcomes[rank].value or how == "recv"


# --- point-to-point ---
def messages(rank: Rank) -> None:
    dist.init_process_group("paracomm")
    me, n = rank.rank, rank.world_size
    for dtype in (torch.float32, torch.bool, torch.complex64):
        for size in (0, 5, 200_000):
            outs = [torch.zeros(size, dtype=dtype) for _ in range(n)]
            ops = [dist.P2POp(dist.irecv, outs[peer], peer) for peer in range(n)]  # from itself, too
            ops += [dist.P2POp(dist.isend, torch.full((size,), me + 1, dtype=dtype), peer) for peer in range(n)]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            for peer, out in enumerate(outs):
                assert torch.equal(out, torch.full((size,), peer + 1, dtype=dtype))
    if me == 0:
        heard = {}
        for _ in range(n - 1):
            x = torch.zeros(1)
            sender = dist.recv(x, tag=3)
            heard[sender] = x.item()
        assert heard == {peer: peer for peer in range(1, n)}
        for tag in (2, 1):
            x = torch.zeros(3, 2)
            assert dist.recv(x.t(), 1, tag=tag) == 1
            assert (x == tag).all()
    else:
        dist.send(torch.tensor([float(me)]), 0, tag=3)
        if me == 1:
            works = [dist.isend(torch.full((2, 3), float(tag)), 0, tag=tag) for tag in (1, 2)]
            for work in works:
                work.wait()
    dist.destroy_process_group()


# --- works and futures ---
def futures(rank: Rank) -> None:
    dist.init_process_group("paracomm")
    n = rank.world_size
    other = dist.new_group()
    x = torch.ones(2)
    future = dist.all_reduce(x, async_op=True).get_future()
    assert future.then(lambda f: f.value()[0] * 2).then(lambda f: f.value() + 1).wait().tolist() == [2 * n + 1] * 2

    def ask_again(_: Any) -> torch.Tensor:
        """What torch's PowerSGD hook does: wait, inside a callback, for another operation's future."""
        y = torch.ones(1)
        return dist.all_reduce(y, async_op=True).get_future().wait()[0]

    waiting = [dist.all_reduce(torch.ones(1), async_op=True, group=other).get_future() for _ in range(20)]
    for future in waiting:
        assert future.then(ask_again).wait().item() == n

    def refuse(_: Any) -> None:
        raise ValueError("no")

    with pytest.raises(RuntimeError, match="no"):
        dist.all_reduce(x, async_op=True).get_future().then(refuse).wait()
    works = [dist.all_reduce(torch.ones(1), async_op=True) for _ in range(50)]
    values = torch.futures.wait_all([work.get_future() for work in works])
    assert all(value[0].item() == n for value in values)
    assert all(work.result()[0].item() == n for work in works)
    # What they hold is what NCCL's hold.
    for dtype in (torch.float32, torch.complex64, torch.float8_e5m2):
        mine = torch.full((2, 3), rank.rank + 1.0).to(dtype)
        outs = [torch.empty_like(mine) for _ in range(n)]
        (stacked,) = dist.group.WORLD.allgather([outs], [mine]).get_future().wait()
        assert stacked.dtype == dtype and stacked.shape == (n, 2, 3)
        assert stacked[:, 0, 0].to(torch.complex64).real.tolist() == [r + 1.0 for r in range(n)]
    out = torch.empty(3)
    (one,) = dist.reduce_scatter(out, [torch.ones(3)] * n, async_op=True).get_future().wait()
    assert one is out and out.tolist() == [n] * 3
    outs = [torch.empty(1) for _ in range(n)]
    found = dist.all_to_all(outs, [torch.ones(1)] * n, async_op=True).get_future().wait()
    assert all(a is b for a, b in zip(found, outs, strict=True))
    wide = torch.zeros(4, 2)
    work = dist.all_reduce(wide[:, 0].add_(1), async_op=True)
    assert work.get_future().wait()[0].tolist() == [n] * 4 and wide.sum() == 4 * n
    dist.destroy_process_group()


def no_frames(rank: Rank) -> None:
    """A call in a thread that has no Python frame below it: DDP's, in a backward pass of distributed autograd, or of a
    GPU."""
    dist.init_process_group("paracomm")
    x = torch.ones(1)
    _thread.start_new_thread(dist.group.WORLD.allreduce, ([x],))
    deadline = time.monotonic() + 20
    while x.item() == 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert x.item() == rank.world_size
    dist.destroy_process_group()


@pytest.mark.parametrize("check", [messages, futures, no_frames])
@pytest.mark.parametrize("world_size", [2, 3])
def test_operations(world_size: int, check: Any) -> None:
    run_ranks(world_size, check)


def trace(rank: Rank) -> None:
    dist.init_process_group("paracomm")
    x = torch.ones(3)
    with warnings.catch_warnings(), torch.autograd.profiler.profile(record_shapes=True) as profile:
        warnings.simplefilter("ignore")
        dist.all_reduce(x)
        dist.all_reduce(x, async_op=True).wait()
        dist.broadcast(x, 0)
        dist.all_gather([torch.ones(3) for _ in range(2)], x)
        dist.barrier()
    found = [(e.name, e.input_shapes) for e in profile.function_events if e.name.startswith("paracomm:")]
    assert found == [
        ("paracomm:all_reduce", [[3]]), ("paracomm:all_reduce", [[3]]), ("paracomm:broadcast", [[3]]),
        ("paracomm:all_gather", [[3]]), ("paracomm:barrier", []),
    ]  # fmt: skip
    dist.destroy_process_group()


def test_profiler() -> None:
    run_ranks(2, trace)
