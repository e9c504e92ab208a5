"""The backend on device memory. On emulated GPUs: every collective, and groups over two pretended hosts. What only a
GPU has, streams that wait in place of the host, is seen on stand-ins that write down who waits for what."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch._dynamo  # which DDP imports: once here, not on every rank
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from paracomm.backend.work import DeviceWork, future_of
from paracomm.comm.rails import rails_of
from paracomm.comm.streams import SideStream, SideStreams
from paracomm.errors import InvalidArgument, PeerLost
from tests.backend.streams import Cuda
from tests.backend.test_collectives import coalesced, in_world, movements, objects, reductions, sparse, uneven
from tests.ranks import Rank, run_ranks, say_goodbye


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARACOMM_DEVICE", "emulated")


def group() -> Any:
    return dist.group.WORLD


# --- emulated GPUs of one host ---
@pytest.mark.parametrize("check", [reductions, movements, uneven, coalesced, objects, sparse])
def test_collectives(check: Any, emulated: None) -> None:
    run_ranks(2, in_world, check)


def on_its_device(rank: Rank, backend: str) -> None:
    dist.init_process_group(backend)
    x = torch.full((5,), rank.rank + 1.0)
    dist.all_reduce(x)
    assert x.tolist() == [6.0] * 5 and group().comm.device.kind == "emulated"
    send = torch.arange(6.0) + 10 * rank.rank
    rows = [[0, 1, 5], [2, 2, 2], [3, 3, 0]]
    recv = torch.empty(sum(row[rank.rank] for row in rows))
    dist.all_to_all_single(recv, send, [row[rank.rank] for row in rows], rows[rank.rank])
    begins = [sum(row[: rank.rank]) for row in rows]
    want = [10 * r + begins[r] + i for r, row in enumerate(rows) for i in range(row[rank.rank])]
    assert recv.tolist() == want
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["paracomm", "cpu:paracomm,cuda:paracomm"])
def test_they_run_on_the_device(backend: str, emulated: None) -> None:
    run_ranks(3, on_its_device, backend)


# --- emulated GPUs of two hosts ---
def start(rank: Rank, hosts: list[int], timeout_s: float = 20.0) -> None:
    settings = {"host_id": f"host {hosts[rank.rank]}"}
    dist.init_process_group("paracomm", timeout=timedelta(seconds=timeout_s), pg_options=settings)


def over_rails(rank: Rank, hosts: list[int], between: bool) -> None:
    start(rank, hosts)
    if between:
        group().use_between([dist.new_group(ranks, backend="gloo") for ranks in rails_of(hosts)])
    n = len(hosts)
    x, y = torch.arange(7.0) * (rank.rank + 1), torch.full((3,), rank.rank, dtype=torch.complex64)
    works = [dist.all_reduce(x, async_op=True), dist.all_reduce(y, async_op=True)]
    assert isinstance(works[0].get_future().wait()[0], torch.Tensor)
    for work in works:
        assert work.wait() and work.is_completed() and work.exception() is None
    assert x.tolist() == [i * n * (n + 1) / 2 for i in range(7)] and y.tolist() == [n * (n - 1) / 2] * 3
    parts = [torch.ones(2), torch.ones(3)]
    dist.all_reduce_coalesced(parts)
    assert all((part == n).all() for part in parts)
    dist.broadcast(x, 1)
    with pytest.raises(InvalidArgument, match="has carried device memory between hosts already"):
        group().use_between([])
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("between", [False, True], ids=["host's transports", "gloo"])
@pytest.mark.parametrize("hosts", [[0, 0, 1, 1], [0, 0, 1]], ids=["2 x 2", "2 + 1"])
def test_all_reduce_takes_rails(hosts: list[int], between: bool, emulated: None) -> None:
    run_ranks(len(hosts), say_goodbye, over_rails, hosts, between)


def train(rank: Rank, hosts: list[int]) -> list[bytes]:
    start(rank, hosts)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 300), torch.nn.ReLU(), torch.nn.Linear(300, 7))
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.01)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(4):
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        ddp(x[2 * rank.rank : 2 * rank.rank + 2]).square().mean().backward()
        whole = torch.nn.functional.mse_loss(model(x), torch.zeros(8, 7))
        want = torch.autograd.grad(whole, list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), want, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
        optimizer.step()
    weights = [parameter.detach().numpy().tobytes() for parameter in model.parameters()]
    dist.destroy_process_group()
    return weights


def test_ddp_over_two_hosts(emulated: None) -> None:
    first, *others = run_ranks(4, say_goodbye, train, [0, 0, 1, 1])
    assert all(weights == first for weights in others)


def one_leaves(rank: Rank, hosts: list[int]) -> None:
    start(rank, hosts, timeout_s=10.0)
    x = torch.ones(1000)
    if rank.rank == 3:
        dist.all_reduce(x)
        group().abort()
        return
    # Already the one that rank 3 takes part in may raise: the others can still be in it when rank 3 gives up.
    with pytest.raises(RuntimeError, match=r"rank 3|abort"):
        for _ in range(4):
            dist.all_reduce(x)
    group().abort()


def test_all_hosts_hear_of_a_rank_that_gives_up(emulated: None) -> None:
    run_ranks(4, one_leaves, [0, 0, 1, 1], timeout_s=25.0)


# --- streams, by stand-ins ---
class Part:
    """An operation of the core that streams wait for."""

    joins = True

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.error: Exception | None = None

    def wait(self, timeout_s: float | None = None) -> None:
        who = self.cuda.current_stream(0).name if timeout_s is None else f"the host ({timeout_s:g} s)"
        self.cuda.log.append(f"{who} waits for the operation")

    def exception(self) -> Exception | None:
        return self.error


def test_the_side_stream_does_what_follows() -> None:
    cuda = Cuda()
    part, value = Part(cuda), [torch.ones(2)]

    def unpacked() -> list[torch.Tensor]:
        cuda.log.append(f"{cuda.current_stream(0).name} unpacks")
        return value

    work = DeviceWork([part], unpacked, SideStream(0, cuda))
    assert cuda.log == [
        "current records current:0", "side waits for current:0", "side waits for the operation", "side unpacks",
        "side records side:4",
    ]  # fmt: skip
    cuda.log.clear()
    assert work.wait() and work.wait(timedelta(seconds=2))
    assert cuda.log == [
        "current waits for side:4",
        "the host (2 s) waits for the operation",
        "current waits for side:4",
    ]
    cuda.log.clear()
    assert work.get_future() is work.get_future() and work.get_future().value() is value
    assert cuda.log[0] == "side waits for side:4"  # completed on the side stream, after all that the work is
    assert not work.is_completed() and not work.is_success() and work.result() is value
    cuda.done = True
    assert work.is_completed() and work.is_success() and work.source_rank() == -1
    part.error = PeerLost("rank 1 is gone")
    for ask in (work.wait, work.get_future, work.synchronize, work.result):
        with pytest.raises(PeerLost, match="rank 1 is gone"):
            ask()
    assert work.is_completed() and not work.is_success() and work.exception() is part.error


def test_memory_is_held_until_the_side_stream_is_through() -> None:
    for capturing in (False, True):
        cuda = Cuda(capturing)
        side = SideStream(0, cuda)
        for number in range(3):
            with side.after(side.now(), f"tensor {number}"):
                pass
        assert [held for _, held in side._held] == [("tensor 0",), ("tensor 1",), ("tensor 2",)]
        cuda.capturing, cuda.done = False, True
        with side.after(side.now()):
            pass
        assert not side._held


def test_a_gpu_has_one_side_stream() -> None:
    streams = SideStreams(Cuda())
    assert streams.of(0) is streams.of(0) is not streams.of(1)


def test_devices_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(rank: Rank) -> None:
        dist.init_process_group("paracomm")
        assert group()._device_types == [torch.device("cpu")] and group()._get_backend("cpu") is group()
        with pytest.raises(RuntimeError, match="No backend type associated with device type cuda"):
            group()._get_backend("cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert group()._device_types == [torch.device("cpu"), torch.device("cuda")]
        assert group()._get_backend(torch.device("cuda", 1)) is group()
        monkeypatch.undo()
        dist.destroy_process_group()

    run_ranks(1, check)
    assert dist.Backend.backend_capability["paracomm"] == ["cpu", "cuda"]


def test_futures_know_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(torch.futures, "Future", lambda devices: seen.append(devices))

    class OnGpu:
        is_cuda, device = True, torch.device("cuda", 1)

    future_of([OnGpu(), OnGpu(), torch.ones(1)])  # type: ignore[list-item]
    future_of([torch.ones(1)])
    assert seen == [[torch.device("cuda", 1)], []]
