"""Calls everything that _C has with arguments that nobody means. The last line of the log names the call that was under
way if the interpreter dies.

    python -m tests.comm.extension_calls LOG SEEDS

Left out: what reads or writes where an integer says. That memory is there, and as much as a count asks for, cannot be
known of a number, so `run`, `submit`, `submit_device`, `send`, `recv`, `bucket`, `pack`, `unpack` get addresses of
memory that is there, or 0, with counts that fit it; everything else about them is odd as elsewhere. The same goes for
`stream`, which is the address of a stream.
"""

from __future__ import annotations

import copy
import faulthandler
import inspect
import itertools
import os
import pickle
import random
import re
import resource
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from paracomm import _C
from paracomm.comm.programs import bind
from paracomm.schedule import build

MEMORY = np.zeros(1 << 16, np.uint8)
ADDRESSES = {"input", "output", "data", "flat", "address"}
COUNTS = {"count", "nbytes", "blocks", "output_blocks", "largest_block"}  # of what is at an address
RAW = {"run", "submit", "submit_device", "dump_plan", "send", "recv", "bucket", "pack", "unpack", "join",
       "synchronize"}  # fmt: skip
INTEGERS = [-(2**64), -(2**63), -(2**31) - 1, -77, -2, -1, 0, 1, 2, 3, 12, 64, 77, 99, 200, 256, 2**31 - 1, 2**31,
            2**32, 2**47, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400]  # fmt: skip
OTHERS: list[Any] = [
    None, True, 0.5, -0.0, float("nan"), float("inf"), -1e300, 1j, "", "x", "\udcff", "sum", "all_reduce", "emulated",
    "cuda", b"", b"\xff", [], [1], [-1], [b"x"], [(1, 2)], [(2**63, 99)], [None], (), (1, 2), (0, 0, 0, 0), {}, {1},
    object(), int, MEMORY, MEMORY[::2], MEMORY.view(np.float64), MEMORY.view(np.int64).reshape(2, -1),
    np.zeros((3, 12), np.int32), np.full((3, 12), 2**31 - 1), np.full((2, 12), -(2**31)), np.zeros((0, 12)),
    np.array(["x"]), memoryview(b"abc"),
    bytearray(8), np.zeros(4, ">i4"), np.zeros(3, "M8[s]"), range(3), iter([1]), Ellipsis,
]  # fmt: skip


def make_world() -> dict[str, Any]:
    """One of each class, by the class."""
    comm = _C.local_communicators(1, timeout_s=5.0)[0]
    program = bind(build("all_reduce", "direct", 1), 0)
    comm.set_choice(_C.COLLECTIVES["all_reduce"], -1, [(2**62, comm.add_program(program))])
    device = _C.make_device(comm, "emulated", 0)
    device.connect([device.publish()])
    work = comm.submit(0, MEMORY.ctypes.data, MEMORY.ctypes.data, 4, _C.DTYPES["float32"], 0)
    work.wait()
    return {
        "Communicator": comm, "Program": program, "Work": work, "Listener": _C.Listener(), "Arena": _C.Arena.process(),
        "DeviceExecutor": device, "Bucket": device.bucket([], _C.DTYPES["float32"]),
        "Unpack": _C.Unpack(MEMORY.ctypes.data, [(0, MEMORY[:8].view(np.float32), 0, 2)]),
    }  # fmt: skip


def usual(world: dict[str, Any]) -> dict[str, Any]:
    """What suits an argument of that name."""
    return {
        "array": MEMORY, "name": "x", "collective": 0, "rank": 0, "world_size": 1, "root": -1, "chunks": 1,
        "scratch_chunks": 1, "volume": 1, "levels": 1, "pair_depth": 1, "fingerprint": 1,
        "ops": np.zeros((0, 12), np.int32), "interface": "",
        "master_address": "", "host_id": "a", "timeout_s": 0.2, "connect_timeout_s": 0.2, "listener": world["Listener"],
        "blobs": [world["Listener"].publish()], "window_bytes": 4096, "staging_bytes": 65536, "sockets_per_peer": 1,
        "cores": 1, "lag": 1, "program": 0, "entries": [(8, 0)], "nbytes": 64, "data": MEMORY.ctypes.data, "dtype": 1,
        "peer": 0, "tag": 0, "why": "x", "input": MEMORY.ctypes.data, "output": MEMORY.ctypes.data, "count": 16,
        "op": 0, "blocks": [], "output_blocks": [], "largest_block": 0, "device": 0, "stream": 0, "barrier": -1,
        "iterations": 1,
        "arena": False, "address": MEMORY.ctypes.data, "cards": [], "work": world["Work"], "items": [],
        "bucket": world["Bucket"], "flat": MEMORY.ctypes.data, "scale": 1.0, "comm": world["Communicator"],
        "kind": "emulated", "bits": 8, "block": 32, "x": MEMORY[:128].view(np.float32), "residual": None,
        "divisor": 1.0, "residual_out": None, "out": MEMORY[:64], "add": False, "seed": 1, "step": 1, "first": 0,
        "bases": MEMORY[:64].view(np.int64), "offsets": MEMORY[:64].view(np.int64), "threshold": 1,
        "counter": (0, 0, 0, 0), "key": (0, 0), "isa": "",
        "packed": MEMORY.ctypes.data, "parts": [(0, MEMORY[:8].view(np.float32), 0, 2)], "finish": None, "eager": True,
    }  # fmt: skip


def parameters(function: Any) -> list[str]:
    """As pybind11 writes them into the docstring; of other functions, some places."""
    head = (function.__doc__ or "").partition("\n")[0]
    if "(" not in head:
        return ["x", "op", "out"]
    return [name for name in re.findall(r"(\w+): ", head.partition("(")[2].rpartition(")")[0]) if name != "self"]


def callables(world: dict[str, Any]) -> list[tuple[str, Callable[..., Any], list[str]]]:
    found: list[tuple[str, Callable[..., Any], list[str]]] = []
    for name in dir(_C):
        thing = getattr(_C, name)
        if inspect.isclass(thing):
            found.append((name, thing, parameters(thing.__init__)))
            for method in dir(thing):
                raw = inspect.getattr_static(thing, method)
                if isinstance(raw, property):
                    found.append((f"{name}.{method}", raw.fget, []))
                elif not method.startswith("__") or method == "__init__":
                    bound = getattr(world[name], method)
                    found.append((f"{name}.{method}", bound, parameters(bound)))
                    found.append((f"{name}.{method} of a class", getattr(thing, method), parameters(bound)))
        elif callable(thing):
            found.append((name, thing, parameters(thing)))
    found.append(("fast_all_reduce", world["Communicator"].fast_all_reduce(), ["x", "op", "out"]))
    return found


def argument_lists(name: str, names: list[str], world: dict[str, Any], draw: random.Random) -> list[list[Any]]:
    fits = usual(world)
    odd = [*INTEGERS, *OTHERS, *world.values(), *(getattr(_C, each) for each in world)]
    method = name.removesuffix(" of a class").rpartition(".")[2]
    raw = {*ADDRESSES, *COUNTS, "stream", "items"} if method in RAW else set()
    free = [each for each in names if each not in raw]
    lists = [[fits.get(each, 0) for each in names]]
    for replaced in free:
        lists += [[value if each == replaced else fits.get(each, 0) for each in names] for value in odd]
    for _ in range(60):
        lists.append([draw.choice(odd) if each in free else fits.get(each, 0) for each in names])
    if raw:  # nothing is there, however much is asked for
        for value in [*INTEGERS, *OTHERS]:
            lists.append([value if each in COUNTS else 0 if each in raw else fits.get(each, 0) for each in names])
    lists += [[], [draw.choice(odd) for _ in range(len(names) + 1)]]
    if not raw:  # else it might be an address or a stream
        lists.append([draw.choice(odd)])
    return lists


def call_all(world: dict[str, Any], draw: random.Random, log: Callable[[str], None], closing: bool) -> int:
    calls = 0
    for name, function, names in callables(world):
        method = name.rpartition(".")[2].removesuffix(" of a class")
        if (method in ("close", "abort")) != closing:
            continue
        for arguments in argument_lists(name, names, world, draw):
            keywords = isinstance(function, type) or name in ("connect", "local_communicators")
            log(f"{name} {arguments!r:.400}")
            calls += 1
            try:
                if not name.endswith(" of a class") and keywords and len(arguments) == len(names):
                    function(**dict(zip(names, arguments, strict=True)))
                else:
                    function(*arguments)
            except Exception as error:
                log(f"    {type(error).__name__}")
    return calls


WAYS: list[Callable[[Any, Any], Any]] = [
    lambda cls, thing: cls.__new__(cls),
    lambda cls, thing: object.__new__(cls),
    lambda cls, thing: cls.__base__.__new__(cls),
    lambda cls, thing: copy.copy(thing),
    lambda cls, thing: copy.deepcopy(thing),
    lambda cls, thing: pickle.dumps(thing),
    lambda cls, thing: type("Sub", (cls,), {}),
    lambda cls, thing: cls.__reduce_ex__(thing, 2),
]


def not_made_by_us(world: dict[str, Any], log: Callable[[str], None]) -> None:
    """Instances with nothing in them cannot be had."""
    for name, thing in world.items():
        cls = type(thing)
        for number, way in enumerate(WAYS):
            log(f"{name} made in way {number}")
            try:
                made = way(cls, thing)
            except TypeError:
                continue
            assert name == "Listener" and number == 0, (name, number)
            made.publish()
        for other in world.values():
            log(f"{name} becomes a {type(other).__name__}")
            try:
                thing.__class__ = type(other)
            except TypeError:
                continue
            assert type(thing) is cls


def main() -> None:
    log_file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    faulthandler.enable()
    faulthandler.dump_traceback_later(100, exit=True)
    lines = itertools.count()

    def log(text: str) -> None:
        os.write(log_file, f"{next(lines)} {text}\n".encode("utf-8", "backslashreplace"))

    calls = 0
    for seed in range(int(sys.argv[2])):
        draw, world = random.Random(seed), make_world()
        not_made_by_us(world, log)
        calls += call_all(world, draw, log, False)
        for device_closed in (False, True):
            if device_closed:
                world["DeviceExecutor"].close()
            calls += call_all(world, draw, log, True)
        calls += call_all(world, draw, log, False)  # once more, of what is closed
        _C.limit_reduce_isa("")
    print(calls)


if __name__ == "__main__":
    main()
