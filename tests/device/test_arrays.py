"""Arrays on GPUs as calls take them: what is read off them, staging, streams. The GPU is pretended (gpu_arrays)."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from paracomm import _C, Error, InvalidArgument
from paracomm.comm import arrays, device
from paracomm.comm.codec import BlockCodec
from tests.comm.test_failures import caught
from tests.device import gpu_arrays
from tests.device.gpu_arrays import ndarray
from tests.ranks import Rank, run_ranks


def test_what_is_read_off_an_array() -> None:
    x = np.zeros((3, 4), np.float16)
    found = arrays.view(ndarray(x))
    assert (found.address, found.count, found.dtype) == (x.ctypes.data, 12, _C.DTYPES["float16"])
    assert (found.contiguous, found.writable, found.device, found.stream) == (True, True, 0, 1)
    assert arrays.view(ndarray(x, None)).stream is None
    assert not arrays.view(ndarray(x[:, ::2])).contiguous and not arrays.view(ndarray(x.T)).contiguous
    assert arrays.view(ndarray(x[:1].T)).contiguous and arrays.view(ndarray(x[:0])).count == 0
    x.flags.writeable = False
    assert not arrays.view(ndarray(x)).writable
    assert arrays.view(np.ones(3)).device == arrays.HOST == arrays.view(torch.ones(3)).device


@pytest.mark.parametrize("name", [name for name in _C.DTYPES if name != "bfloat16"])
def test_dtypes(name: str) -> None:
    assert arrays.view(ndarray(np.zeros(5, name))).dtype == _C.DTYPES[name]


class Masked(ndarray):
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**super().__cuda_array_interface__, "mask": self}


def test_what_is_refused() -> None:
    for x in (np.zeros(3, np.complex64), np.zeros(3, ">f4"), np.zeros(3, "M8[s]")):
        with pytest.raises(InvalidArgument, match="is not one that collectives take"):
            arrays.view(ndarray(x))
    with pytest.raises(InvalidArgument, match="a masked array"):
        arrays.view(Masked(np.zeros(3)))
    with pytest.raises(InvalidArgument, match="tensor on device meta: collectives take tensors on the CPU and on CUDA"):
        arrays.view(torch.zeros(3, device="meta"))
    with pytest.raises(InvalidArgument, match="an object with __dlpack__ or __cuda_array_interface__, got int"):
        arrays.view(3)
    with pytest.raises(InvalidArgument, match="the array is on cuda:0, expected the CPU"):
        BlockCodec(8, 32).encode(ndarray(np.zeros(32, np.float32)), np.zeros(36, np.uint8))
    if not torch.cuda.is_available():
        with pytest.raises(InvalidArgument, match="import torch or cupy first"):
            _without_torch(lambda: arrays.native(ndarray(np.zeros(3))))


def _without_torch(call: Callable[[], Any]) -> Any:
    """torch would take such an array to a GPU that is not there."""
    import sys

    torchs = sys.modules.pop("torch")
    try:
        return call()
    finally:
        sys.modules["torch"] = torchs


class OnlyDlpack:
    """An array of a library that we know nothing of, on some device."""

    def __init__(self, kind: int) -> None:
        self.kind, self.asked = kind, {}

    def __dlpack__(self, **options: Any) -> Any:
        self.asked = options
        return torch.arange(6).__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 3


def test_dlpack() -> None:
    """The producer is told the stream for which its data must be ready."""
    x = OnlyDlpack(gpu_arrays.DLPACK_CUDA)
    found = arrays.view(x)
    assert (
        x.asked == {"stream": gpu_arrays.LEGACY_STREAM, "max_version": (1, 0)}
        and found.stream == gpu_arrays.LEGACY_STREAM
    )
    assert found.count == 6 and found.dtype == _C.DTYPES["int64"]
    with pytest.raises(InvalidArgument, match="DLPack array on device type 8"):
        arrays.view(OnlyDlpack(8))


# --- staged through host memory ---
def staged(rank: Rank) -> None:
    gpu_arrays.install()
    os.environ["PARACOMM_DEVICE"] = "host"
    with rank.connect(timeout_s=30) as comm:
        collectives(comm)
        assert comm.device is None and comm.use_device() is None
        assert comm.fast_all_reduce(ndarray(np.ones(3)), "sum", None) is None
        messages(comm)


def collectives(comm: Any) -> None:
    """Every collective on arrays of a GPU."""
    n, r = comm.world_size, comm.rank
    total = n * (n + 1) // 2

    def ours() -> ndarray:
        return ndarray(np.full((2 * n, 3), r + 1, np.int32), 0)

    def holds(x: Any, want: Any, shape: tuple[int, ...] = (2 * n, 3)) -> None:
        gpu_arrays.settle()
        assert isinstance(x, ndarray) and x.shape == shape and (x.x == want).all(), (x.x, want)

    x = ours()
    assert comm.all_reduce(x) is x
    holds(x, total)
    x, out = ours(), ours()
    assert comm.all_reduce(x, "max", out=out) is out
    holds(out, n)
    holds(x, r + 1)
    x = ours()
    comm.all_reduce(x[:, ::2])
    holds(x[:, ::2], total, (2 * n, 2))
    holds(x[:, 1:2], r + 1, (2 * n, 1))
    x = ours()
    comm.broadcast(x, n - 1)
    holds(x, n)
    x = ours()
    comm.reduce(x, 0)
    holds(x, total if r == 0 else r + 1)
    blocks = np.repeat(np.arange(1, n + 1), 2)[:, None]
    holds(comm.all_gather(ours()[:2]), blocks.reshape(n, 2, 1), (n, 2, 3))
    holds(comm.all_gather_v(ours()[:2]), blocks)
    holds(comm.reduce_scatter(ours()), total, (2, 3))
    holds(comm.reduce_scatter_v(ours(), [2] * n), total, (2, 3))
    holds(comm.all_to_all(ours()), blocks)
    holds(comm.all_to_all_v(ours(), [2] * n), blocks)
    gathered = comm.gather(ours()[:2], 1)
    if r == 1:
        holds(gathered, blocks.reshape(n, 2, 1), (n, 2, 3))
    out = ours()
    comm.scatter(ours() if r == 1 else None, 1, out=out[:2])
    holds(out[:2], 2, (2, 3))
    work = comm.all_reduce(x := ours(), async_op=True)
    assert work.wait() is x
    holds(x, total)
    with pytest.raises(InvalidArgument, match=r"on cuda:0, output is on the CPU|output has 3 elements"):
        comm.all_reduce(ours(), out=np.zeros(3, np.int32))


def messages(comm: Any) -> None:
    n, r = comm.world_size, comm.rank
    sent = comm.send(ndarray(np.full(5, r)), (r + 1) % n, async_op=True)
    x = ndarray(np.zeros(5, np.int64))
    assert comm.recv(x, (r - 1) % n) is x
    assert (x.x == (r - 1) % n).all()
    sent.wait()


def test_staged() -> None:
    run_ranks(2, staged)


# --- on streams: emulated kernels, as if they ran on a GPU whose streams wait ---
def streamed_device(comm: Any) -> device.Device:
    """The communicator's device: of the emulated kind, taken for a GPU."""
    make = device.make
    device.make = lambda core, exchange, kind, index: make(core, exchange, "emulated", index)
    found = comm.use_device(gpu_arrays.GPU)
    device.make = make
    found.joins = True
    return found


def on_streams(rank: Rank, check: Callable[..., None]) -> None:
    gpu_arrays.install()
    with rank.connect(timeout_s=30) as comm:
        found = streamed_device(comm)
        gpu_arrays.settled.append(lambda: found._executor.synchronize(0))
        check(comm)
        messages(comm)


def the_host_goes_on(comm: Any) -> None:
    comm.barrier()
    if comm.rank == 1:
        time.sleep(0.5)
    start = time.monotonic()
    x, y = (ndarray(np.full(20_000, comm.rank + 1.0), 0) for _ in range(2))
    comm.all_reduce(x)
    work = comm.all_reduce(y, async_op=True)
    assert work.joins and work.wait() is y
    if comm.rank == 0:
        assert time.monotonic() - start < 0.4 and not work.done()
    assert work.wait(20.0) is y and work.done()
    total = comm.world_size * (comm.world_size + 1) / 2
    assert (x.x == total).all() and (y.x == total).all()
    gpu_arrays.settle()


def memory_is_kept(comm: Any) -> None:
    """What nobody waits for keeps its memory until it is complete, and not beyond the next call."""
    comm.barrier()
    watched = []
    if comm.rank == 1:
        time.sleep(0.2)
    for _ in range(3):
        x = ndarray(np.ones(1000), 0)
        watched.append(weakref.ref(x))
        comm.all_reduce(x, async_op=True)
        del x
    if comm.rank == 0:
        assert all(ref() is not None for ref in watched)
    gpu_arrays.settle()
    last = comm.all_reduce(ndarray(np.ones(1), 0), async_op=True)
    last.wait(20.0)
    comm.all_reduce(ndarray(np.ones(1), 0))
    assert all(ref() is None for ref in watched)
    gpu_arrays.settle()


def failures_come_with_the_next_call(comm: Any) -> None:
    x = ndarray(np.ones(10), 0)
    if comm.rank == 0:
        comm.all_reduce(x, timeout_s=0.2)
        work = comm.all_reduce(x, timeout_s=0.2, async_op=True)
        work.wait()
        for call in (lambda: work.wait(20.0), lambda: comm.all_reduce(x), comm.check):
            assert caught(call)[0] == "Timeout"
        assert work.done() and isinstance(work.exception(), Error)
        assert caught(work.wait)[0] == "Timeout"
    else:
        assert caught(lambda: comm.recv(np.ones(3), 0))[0] == "Timeout"


def other_devices(comm: Any) -> None:
    comm.device.index = 5
    with pytest.raises(InvalidArgument, match=r"on cuda:0, this communicator's device is Device\(emulated:5\)"):
        comm.all_reduce(ndarray(np.ones(3)))
    comm.device.index = 0


@pytest.mark.parametrize("check", [collectives, the_host_goes_on, memory_is_kept, other_devices])
def test_streams(check: Callable[..., None]) -> None:
    run_ranks(2, on_streams, check)


def without_messages(rank: Rank) -> None:
    gpu_arrays.install()
    comm = rank.connect(timeout_s=30)
    streamed_device(comm)
    failures_come_with_the_next_call(comm)
    comm.close()


def test_failures_on_streams() -> None:
    run_ranks(2, without_messages)


def emulated_takes_none(rank: Rank) -> None:
    gpu_arrays.install()
    os.environ["PARACOMM_DEVICE"] = "emulated"
    with rank.connect(timeout_s=30) as comm, pytest.raises(InvalidArgument, match="PARACOMM_DEVICE is 'emulated'"):
        comm.all_reduce(ndarray(np.ones(3)))


def test_emulated_devices_take_no_array_of_a_gpu() -> None:
    run_ranks(1, emulated_takes_none)
