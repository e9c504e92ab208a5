"""One rank of a contender: `python worker.py SOCKET CONTENDER [OPTION=VALUE ...]`.

It runs under any Python that has NumPy and the contender's own packages (an MPI's virtual environment has no paracomm),
so it imports nothing of ours at the top. Commands come as JSON lines over a Unix socket, which crosses network
namespaces; between commands a rank sleeps in `recv`, so that idle contenders disturb nobody.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import resource
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

PERIOD = 30  # of the test patterns: a multiple of every modulus below
Call = Callable[[], object]
BITS = {"float16": np.float16, "bfloat16": np.uint16, "bool": np.uint8}


def storage_of(dtype: str) -> np.dtype[Any]:
    """The NumPy type that holds `dtype`; bfloat16 is held as its bits."""
    return np.dtype(BITS.get(dtype, dtype))


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Small whole numbers as elements of `dtype`."""
    if dtype == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(storage_of(dtype))


# --- inputs whose results are exactly predictable ---


def pattern(rank: int, dtype: str, op: str) -> np.ndarray:
    """PERIOD values of a rank's input: small enough that sums and products are exact in every dtype."""
    i = np.arange(PERIOD)
    if dtype == "bool":
        return (i + rank) % 2
    if op == "avg":
        return i % 5 + 1
    if op == "prod":
        return 1 + (i + rank) % 2
    if op in ("band", "bor", "bxor"):
        return (7 * i + 13 * rank) % 61
    return i % 5 + rank % 3


def reduced(world_size: int, dtype: str, op: str) -> np.ndarray:
    """What all ranks' patterns reduce to."""
    inputs = np.stack([pattern(rank, dtype, op) for rank in range(world_size)]).astype(np.int64)
    if dtype == "bool":
        op = {"sum": "bor", "max": "bor", "prod": "band", "min": "band"}.get(op, op)
    operator: dict[str, Any] = {
        "sum": np.add,
        "avg": np.add,
        "prod": np.multiply,
        "min": np.minimum,
        "max": np.maximum,
        "band": np.bitwise_and,
        "bor": np.bitwise_or,
        "bxor": np.bitwise_xor,
    }
    result: np.ndarray = operator[op].reduce(inputs)
    return result // world_size if op == "avg" else result


def tile(out: np.ndarray, block: np.ndarray, first: int = 0) -> None:
    """out[i] = block[(first + i) % PERIOD]."""
    block = np.roll(block, -(first % PERIOD))
    whole = len(out) // PERIOD * PERIOD
    out[:whole].reshape(-1, PERIOD)[:] = block
    out[whole:] = block[: len(out) - whole]


def wrong(out: np.ndarray, block: np.ndarray, first: int = 0) -> int:
    """Elements of `out` that differ from the tiled block."""
    block = np.roll(block, -(first % PERIOD))
    whole = len(out) // PERIOD * PERIOD
    differing = int(np.count_nonzero(out[:whole].reshape(-1, PERIOD) != block))
    return differing + int(np.count_nonzero(out[whole:] != block[: len(out) - whole]))


# --- contenders ---


class Contender:
    """A rank of a library under test. Arrays are the library's own; `view` shows the same memory as NumPy."""

    rank: int
    world_size: int

    def empty(self, count: int, dtype: str, memory: str) -> Any:
        raise NotImplementedError

    def view(self, array: Any) -> np.ndarray:
        view: np.ndarray = array
        return view

    def barrier(self) -> None:
        raise NotImplementedError

    def bind(self, collective: str, send: Any, recv: Any, op: str, root: int) -> Call:
        """The timed call. `recv is send`: in place. Raises NotImplementedError where the library has no such thing."""
        raise NotImplementedError

    def native(self, nbytes: int, iterations: int, memory: str) -> list[float]:
        """Seconds of each in-place float32 all-reduce, looped outside Python."""
        raise NotImplementedError("no loop outside Python")

    def counters(self) -> dict[str, Any]:
        """What the library says of itself after a call: algorithm, transport, bytes sent per peer."""
        return {}

    def close(self) -> None:
        pass


def torch_empty(count: int, dtype: str) -> Any:
    import torch

    return torch.empty(count, dtype=getattr(torch, dtype))


def torch_view(tensor: Any) -> np.ndarray:
    import torch

    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy().view(np.uint16))
    return np.asarray((tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor).numpy())


class Gloo(Contender):
    """torch.distributed with the backend `backend` (gloo unless told otherwise), after importing `module`."""

    def __init__(self, backend: str = "gloo", module: str = "") -> None:
        import torch
        import torch.distributed as dist

        if module:
            __import__(module)
        torch.set_num_threads(1)
        dist.init_process_group(backend)
        self.dist = dist
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.barrier = dist.barrier  # type: ignore[method-assign]

    def empty(self, count: int, dtype: str, memory: str) -> Any:
        return torch_empty(count, dtype)

    def view(self, array: Any) -> np.ndarray:
        return torch_view(array)

    def bind(self, collective: str, send: Any, recv: Any, op: str, root: int) -> Call:
        dist, n = self.dist, self.world_size
        if op == "avg":
            raise NotImplementedError("Gloo has no avg")
        reduction = getattr(dist.ReduceOp, {"prod": "PRODUCT"}.get(op, op.upper()))
        pieces = list(recv.chunk(n)) if recv is not None and collective == "gather" and self.rank == root else None
        shares = list(send.chunk(n)) if send is not None and collective == "scatter" and self.rank == root else None
        calls: dict[str, Call] = {
            "all_reduce": functools.partial(dist.all_reduce, send, op=reduction),
            "reduce": functools.partial(dist.reduce, send, root, op=reduction),
            "broadcast": functools.partial(dist.broadcast, send, root),
            "all_gather": functools.partial(dist.all_gather_into_tensor, recv, send),
            "reduce_scatter": functools.partial(dist.reduce_scatter_tensor, recv, send, op=reduction),
            "all_to_all": functools.partial(dist.all_to_all_single, recv, send),
            "gather": functools.partial(dist.gather, send, pieces, root),
            "scatter": functools.partial(dist.scatter, recv, shares, root),
            "barrier": self.barrier,
        }
        if recv is not send and collective in ("all_reduce", "reduce"):
            raise NotImplementedError("torch.distributed reduces in place only")
        return calls[collective]

    def close(self) -> None:
        self.dist.destroy_process_group()


class Mpi(Contender):
    """An MPI through mpi4py on NumPy arrays; which one is the environment's choice."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self.mpi, self.comm = MPI, MPI.COMM_WORLD
        self.rank, self.world_size = self.comm.rank, self.comm.size
        self.barrier = self.comm.Barrier  # type: ignore[method-assign]

    def empty(self, count: int, dtype: str, memory: str) -> Any:
        if dtype in ("float16", "bfloat16"):
            raise NotImplementedError("MPI has no 16-bit floats")
        return np.empty(count, storage_of(dtype))

    def bind(self, collective: str, send: Any, recv: Any, op: str, root: int) -> Call:
        mpi, comm, at_root = self.mpi, self.comm, self.rank == root
        if op == "avg":
            raise NotImplementedError("MPI has no avg")
        reduction = getattr(mpi, op.upper())
        default = () if op == "sum" else (reduction,)  # as people write it
        in_place = recv is send
        calls: dict[str, Call] = {
            "all_reduce": functools.partial(comm.Allreduce, mpi.IN_PLACE if in_place else send, recv, *default),
            "reduce": functools.partial(
                comm.Reduce, mpi.IN_PLACE if in_place and at_root else send, recv if at_root else None, reduction, root
            ),
            "broadcast": functools.partial(comm.Bcast, send, root),
            "all_gather": functools.partial(comm.Allgather, send, recv),
            "reduce_scatter": functools.partial(comm.Reduce_scatter_block, send, recv, reduction),
            "all_to_all": functools.partial(comm.Alltoall, send, recv),
            "gather": functools.partial(comm.Gather, send, recv if at_root else None, root),
            "scatter": functools.partial(comm.Scatter, send if at_root else None, recv, root),
            "barrier": comm.Barrier,
        }
        return calls[collective]


class Paracomm(Contender):
    """Ours, on torch tensors or NumPy arrays (`arrays`), with `algorithm` and `transport` where they are asked for."""

    def __init__(self, arrays: str = "torch", algorithm: str = "", transport: str = "") -> None:
        import paracomm

        self.arrays, self.algorithm = arrays, algorithm
        if arrays == "torch":
            import torch

            torch.set_num_threads(1)
        # Emulated hosts are one machine, which the library would find out.
        self.comm: Any = paracomm.init(transport=transport or None, host_id=os.environ.get("PARACOMM_BENCH_HOST", ""))
        self.rank, self.world_size = self.comm.rank, self.comm.world_size
        self.barrier = self.comm.barrier  # type: ignore[method-assign]

    def empty(self, count: int, dtype: str, memory: str) -> Any:
        if self.arrays == "numpy" and dtype == "bfloat16":
            raise NotImplementedError("NumPy has no bfloat16")
        if memory == "arena":
            import torch

            kind = getattr(torch, dtype) if self.arrays == "torch" else np.dtype(dtype)
            return self.comm.empty(count, kind, like=self.arrays)
        return torch_empty(count, dtype) if self.arrays == "torch" else np.empty(count, dtype)

    def view(self, array: Any) -> np.ndarray:
        if isinstance(array, np.ndarray):
            return array.view(np.uint8) if array.dtype == np.bool_ else array
        return torch_view(array)

    def bind(self, collective: str, send: Any, recv: Any, op: str, root: int) -> Call:
        comm = self.comm
        chosen = {"algorithm": self.algorithm} if self.algorithm else {}
        out = {} if recv is send else {"out": recv}
        at_root = self.rank == root
        reduction = () if op == "sum" else (op,)  # as people write it
        calls: dict[str, Callable[[], Call]] = {
            "all_reduce": lambda: functools.partial(comm.all_reduce, send, *reduction, **out, **chosen),
            "reduce": lambda: functools.partial(comm.reduce, send, root=root, op=op, **chosen),
            "broadcast": lambda: functools.partial(comm.broadcast, send, root=root, **chosen),
            "all_gather": lambda: functools.partial(comm.all_gather, send, out=recv, **chosen),
            "reduce_scatter": lambda: functools.partial(comm.reduce_scatter, send, out=recv, op=op, **chosen),
            "all_to_all": lambda: functools.partial(comm.all_to_all, send, out=recv, **chosen),
            "gather": lambda: functools.partial(comm.gather, send, root=root, out=recv if at_root else None, **chosen),
            "scatter": lambda: functools.partial(
                comm.scatter, send if at_root else None, root=root, out=recv, **chosen
            ),
            "barrier": lambda: comm.barrier,
        }
        return calls[collective]()

    def native(self, nbytes: int, iterations: int, memory: str) -> list[float]:
        return list(self.comm.native_time_all_reduce(nbytes, iterations, memory == "arena"))

    def counters(self) -> dict[str, Any]:
        peers = [peer for peer in range(self.world_size) if peer != self.rank]
        return {
            "algorithm": self.algorithm or "default",
            "transport": "+".join(sorted({self.comm.transport(peer) for peer in peers})),
            "bytes_sent": {peer: self.comm.bytes_sent(peer) for peer in peers},
        }

    def close(self) -> None:
        self.comm.close()


CONTENDERS: dict[str, Callable[..., Contender]] = {"gloo": Gloo, "mpi": Mpi, "paracomm": Paracomm}


# --- one case ---


class Case:
    """Two sets of buffers for one collective, size and dtype, filled, checked and timed."""

    def __init__(self, contender: Contender, command: dict[str, Any]) -> None:
        self.contender, self.command = contender, command
        self.collective, self.dtype, self.op, self.root = (command[k] for k in ("collective", "dtype", "op", "root"))
        n, rank, count = contender.world_size, contender.rank, command["count"]
        share = count // n
        in_place, root = command["in_place"], self.root
        sends, recvs = {  # elements of the two buffers on this rank; 0: it needs none
            "all_gather": (share, count),
            "reduce_scatter": (count, share),
            "all_to_all": (count, count),
            "gather": (share, count if rank == root else 0),
            "scatter": (count if rank == root else 0, share),
            "barrier": (0, 0),
        }.get(self.collective, (count, 0 if in_place else count))
        make = functools.partial(contender.empty, dtype=self.dtype, memory=command["memory"])
        self.sets = []
        for _ in range(2):
            send = make(sends) if sends else None
            recv = make(recvs) if recvs else None
            self.sets.append((send, send if in_place else recv))
        self.views = [tuple(None if a is None else contender.view(a) for a in pair) for pair in self.sets]
        self.calls = [contender.bind(self.collective, *pair, self.op, self.root) for pair in self.sets]
        self.share = share

    def check(self) -> int:
        """Runs both sets once; the number of wrong elements on this rank."""
        if self.collective == "barrier":
            self.calls[0]()
            return 0
        errors = 0
        for (send, recv), call in zip(self.views, self.calls, strict=True):
            if recv is not None:
                recv.fill(0)
            if send is not None:
                tile(send, encode(pattern(self.contender.rank, self.dtype, self.op), self.dtype))
            self.contender.barrier()
            call()
            for out, block, first in self.expected(send, recv):
                errors += wrong(out, encode(block, self.dtype), first)
        return errors

    def expected(self, send: Any, recv: Any) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """(part of a buffer, pattern that it must hold, where the pattern starts)."""
        n, rank, share = self.contender.world_size, self.contender.rank, self.share
        of = functools.partial(pattern, dtype=self.dtype, op=self.op)
        result = reduced(n, self.dtype, self.op)
        if self.collective == "all_reduce" or (self.collective == "reduce" and rank == self.root):
            yield recv, result, 0
        elif self.collective == "broadcast":
            yield send, of(self.root), 0
        elif self.collective == "reduce_scatter":
            yield recv, result, rank * share
        elif self.collective == "scatter":
            yield recv, of(self.root), rank * share
        elif self.collective == "all_gather" or (self.collective == "gather" and rank == self.root):
            for peer in range(n):
                yield recv[peer * share : (peer + 1) * share], of(peer), 0
        elif self.collective == "all_to_all":
            for peer in range(n):
                yield recv[peer * share : (peer + 1) * share], of(peer), rank * share

    def time(self, iterations: int) -> list[float]:
        """Seconds of each call. The buffers rotate and are written anew before it; all ranks meet before and after, so
        that none writes its next buffer on a core that another's call still needs."""
        seconds = []
        one = encode(np.ones(1, np.int64), self.dtype)[0]
        barrier, clock = self.contender.barrier, time.perf_counter
        for i in range(iterations):
            send, recv = self.views[i % 2]
            call = self.calls[i % 2]
            if recv is not None and recv is not send:
                recv.fill(0)
            if send is not None:
                send.fill(one)
            barrier()
            start = clock()
            call()
            seconds.append(clock() - start)
            barrier()
        return seconds


class Worker:
    """Answers commands. The buffers of the last case are kept: its rounds come back to them."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.case: Case | None = None

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "prepare":
            self.case = None
            gc.collect()
            self.case = Case(self.contender, command)
            wrong_elements = self.case.check()
            return {"wrong": wrong_elements, "seconds": self.case.time(4)[1:], **self.contender.counters()}
        if command["do"] == "time":
            assert self.case is not None
            before = self.contender.counters().get("bytes_sent")
            gc.disable()
            try:
                seconds = self.case.time(command["warm_up"] + command["iterations"])[command["warm_up"] :]
            finally:
                gc.enable()
            return {"seconds": seconds, "bytes_before": before, **self.contender.counters()}
        if command["do"] == "native":
            self.contender.barrier()
            return {"seconds": self.contender.native(command["nbytes"], command["iterations"], command["memory"])}
        if command["do"] == "forget":
            self.case = None
            gc.collect()
            return {}
        if command["do"] == "cpu":
            usage = resource.getrusage(resource.RUSAGE_SELF)
            return {"cpu_s": usage.ru_utime + usage.ru_stime, "clock_s": time.monotonic()}
        raise ValueError(f"unknown command {command['do']!r}")


def main(path: str, name: str, *options: str) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as control:
        control.connect(path)
        stream = control.makefile("rw", encoding="utf-8")

        def say(reply: dict[str, Any]) -> None:
            stream.write(json.dumps(reply) + "\n")
            stream.flush()

        # MPI and torch say their rank only after initialisation, which needs all of them; the launchers say it before.
        try:
            contender = CONTENDERS[name](**dict(option.split("=", 1) for option in options))
        except BaseException:
            say({"error": traceback.format_exc(limit=-3), "pid": os.getpid()})
            raise
        say({"rank": contender.rank, "pid": os.getpid()})
        worker = Worker(contender)
        for line in stream:
            command = json.loads(line)
            if command["do"] == "quit":
                break
            try:
                say(worker.answer(command))
            except NotImplementedError as error:
                say({"unsupported": str(error)})
            except Exception as error:
                say({"error": f"{type(error).__name__}: {error}"})
        contender.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
