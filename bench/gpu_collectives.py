"""Collectives on GPUs: their bits beside the host's, then nccl-tests' columns, ours beside NCCL and torch's copies.

    python bench/gpu_collectives.py --threads 4                       one GPU: ranks are threads and share it
    torchrun --standalone --nproc-per-node 8 bench/gpu_collectives.py   a GPU for every rank

A line: size, count, type, redop, root, time of a call (us, the slowest rank's median over rounds in which engines take
turns), algbw and busbw (GB/s), and elements that were wrong on any rank, as nccl-tests define them
(https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md). `copy` is one torch copy of the same bytes on the
rank's own GPU. NCCL runs where each rank has a GPU of its own. On one GPU that ranks share, times say what the GPU can
do for all of them, and nothing about links.

With PARACOMM_DEVICE=emulated the same runs on emulated GPUs, which shows that this script works, and no time of a GPU.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

import paracomm
from paracomm.cli.contest.case import REDUCING, ROOTED, Case, parse_sizes
from paracomm.comm import Communicator, device
from paracomm.schedule import Schedule, build
from paracomm.schedule.registry import cases

NOTHING_TO_RUN_ON = 3
TIMED = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all")
DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool")
COUNTS = (1, 1027, 300_007)
TIMEOUT_S = 60.0
CALLS = 20
"""Of a round, between two looks at the clock."""
Call = Callable[[], Any]
Report = Callable[[str], None]


def why_not() -> str | None:
    if device.mode() == "emulated" or torch.cuda.is_available():
        return None
    return f"no GPU that torch {torch.__version__} can use (torch.cuda.is_available() is False)"


# --- where ranks and their memory are ---
@dataclass
class Rank:
    """A rank of this run: its communicator, one that takes CPU tensors over the host's transports (the same but for
    emulated GPUs), its GPU ("cpu" where it is emulated), and whether NCCL can run too."""

    comm: Communicator
    host: Communicator
    where: torch.device
    nccl: bool = False

    @property
    def emulated(self) -> bool:
        return self.where.type == "cpu"

    def everybodys(self, value: Any) -> list[Any]:
        """Every rank's value, which JSON can hold."""
        return [json.loads(blob) for blob in self.comm.exchange(json.dumps(value).encode())]

    def synchronize(self) -> None:
        if not self.emulated:
            torch.cuda.synchronize(self.where)

    def microseconds(self, call: Call, times: int) -> float:
        """Of one call, on the GPU's clock."""
        if self.emulated:
            start = time.perf_counter()
            for _ in range(times):
                call()
            return (time.perf_counter() - start) / times * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / times * 1e3


def run_threads(world_size: int, work: Callable[[Rank], int]) -> int:
    """`work` on ranks that are threads and share a GPU; the largest of what they return."""
    meeting = threading.Barrier(world_size, timeout=TIMEOUT_S)
    blobs, outcomes = [b""] * world_size, [1] * world_size

    def exchange_of(rank: int) -> Callable[[bytes], list[bytes]]:
        def exchange(blob: bytes) -> list[bytes]:
            blobs[rank] = blob
            meeting.wait()
            found = list(blobs)
            meeting.wait()
            return found

        return exchange

    def main(rank: int) -> None:
        where = torch.device("cpu" if device.mode() == "emulated" else "cuda:0")
        # Without a stream of its own a rank would hold up the others, which it waits for: all share the default one.
        own_stream = nullcontext() if where.type == "cpu" else torch.cuda.stream(torch.cuda.Stream(where))

        def connect(transport: str) -> Communicator:
            return paracomm.connect(rank, world_size, exchange_of(rank), transport=transport, timeout_s=TIMEOUT_S)

        with own_stream, connect("local") as comm, twin_of(comm, connect) as host:
            outcomes[rank] = work(Rank(comm, host, where))

    threads = [threading.Thread(target=main, args=(rank,), name=f"rank {rank}") for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(outcomes)


@contextmanager
def twin_of(comm: Communicator, connect: Callable[[str], Communicator]) -> Iterator[Communicator]:
    """A communicator for CPU tensors. To one over TCP ranks are on hosts of their own, where nothing is emulated."""
    if device.mode() != "emulated":
        yield comm
        return
    with connect("tcp") as twin:
        yield twin


@contextmanager
def rank_of_torchrun() -> Iterator[Rank]:
    """This process's rank, on the GPU of its local rank; ranks beyond the number of GPUs share them."""
    emulated = device.mode() == "emulated"
    gpus = 0 if emulated else torch.cuda.device_count()
    local, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    where = torch.device("cpu") if emulated else torch.device("cuda", local % gpus)
    nccl = not emulated and local_size <= gpus and dist.is_nccl_available() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if not emulated:
        torch.cuda.set_device(where)
    if nccl:
        dist.init_process_group("nccl", device_id=where)
    try:
        connect = lambda transport: paracomm.init(transport=transport, timeout_s=TIMEOUT_S)  # noqa: E731
        with connect(None) as comm, twin_of(comm, connect) as host:
            yield Rank(comm, host, where, nccl)
    finally:
        if nccl:
            dist.destroy_process_group()


# --- bits ---
def inputs_of(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * count + rank)
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, (count,), generator=generator).to(dtype)


def result_of(comm: Communicator, x: torch.Tensor, schedule: Schedule, op: str) -> torch.Tensor:
    """What a rank has after the collective, of which x is its input; x itself may be overwritten."""
    kwargs: dict[str, Any] = {"algorithm": schedule}
    if schedule.collective in ROOTED:
        kwargs["root"] = schedule.root
    if schedule.collective in REDUCING:
        kwargs["op"] = op
    if schedule.collective == "scatter":
        kwargs["out"] = torch.empty_like(x[: len(x) // comm.world_size])
    found = getattr(comm, schedule.collective)(x, **kwargs)
    return x if found is None else found


def bits(x: torch.Tensor) -> bytes:
    return x.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def ops_of(collective: str, name: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Every operator once for every type; for all other schedules the sum."""
    if (collective, name) != ("all_reduce", "ordered"):
        return ("sum",)
    exact = () if dtype.is_floating_point else ("band", "bor", "bxor")
    return ("sum", "prod", "min", "max", *exact, *(() if dtype == torch.bool else ("avg",)))


def compare_bits(rank: Rank, dtypes: Sequence[str], counts: Sequence[int], report: Report) -> int:
    """Every schedule on the devices and over the host's transports, with the same inputs; returns how many differ."""
    differing, compared = 0, 0
    n = rank.comm.world_size
    for collective, name, root, params in cases(n):
        if collective == "barrier":
            continue
        schedule = build(collective, name, n, root, **params)
        for dtype in (getattr(torch, known) for known in dtypes):
            for op in ops_of(collective, name, dtype):
                for count in (-(-count // n) * n for count in counts):
                    x = inputs_of(rank.comm.rank, count, dtype)
                    on_device = result_of(rank.comm, x.to(rank.where, copy=True), schedule, op)
                    same = bits(on_device) == bits(result_of(rank.host, x, schedule, op))
                    if not all(rank.everybodys(same)):
                        report(f"bits differ: {collective}[{name}] {params} {op} {dtype} x {count}")
                        differing += 1
                    compared += 1
    report(f"# bits: {compared - differing} of {compared} results are the host's, bit by bit ({n} ranks)")
    return differing


# --- times ---
def element(i: torch.Tensor, rank: int) -> torch.Tensor:
    """Small whole numbers: sums over 32 ranks are exact in every type but int8."""
    return i % 5 + rank % 3


def first_input(case: Case, rank: int, where: torch.device) -> torch.Tensor:
    """An all_gather's is a block, everything else's is `case.count` elements."""
    count = case.count // case.world_size if case.collective == "all_gather" else case.count
    return element(torch.arange(count, device=where), rank).to(getattr(torch, case.dtype))


def expected(case: Case, rank: int, where: torch.device) -> torch.Tensor | None:
    """The result for `first_input`; None: this rank has none."""
    n, block = case.world_size, case.count // case.world_size
    i = torch.arange(case.count, device=where)
    total = n * (i % 5) + sum(r % 3 for r in range(n))
    owner = torch.div(i, max(1, block), rounding_mode="floor")
    if case.collective == "all_reduce" or (case.collective == "reduce" and rank == case.root):
        return total
    if case.collective == "reduce":
        return None
    if case.collective == "broadcast":
        return element(i, case.root)
    if case.collective == "reduce_scatter":
        return total[rank * block : (rank + 1) * block]
    return element(i % max(1, block) + (rank * block if case.collective == "all_to_all" else 0), 0) + owner % 3


@dataclass
class Bound:
    """A collective of one engine, ready to be called again and again."""

    call: Call
    result: torch.Tensor


def outputs_of(case: Case, x: torch.Tensor) -> torch.Tensor:
    if case.in_place:
        return x
    return x.new_empty(case.count // case.world_size if case.collective == "reduce_scatter" else case.count)


def bind_ours(rank: Rank, case: Case) -> Bound:
    x = first_input(case, rank.comm.rank, rank.where)
    out = outputs_of(case, x)
    method: Any = getattr(rank.comm, case.collective)
    kwargs: dict[str, Any] = {} if case.in_place else {"out": out}
    if case.collective in ROOTED:
        kwargs["root"] = case.root
    return Bound(lambda: method(x, **kwargs), out)


def bind_nccl(rank: Rank, case: Case) -> Bound:
    x = first_input(case, rank.comm.rank, rank.where)
    out = outputs_of(case, x)
    calls: dict[str, Call] = {
        "all_reduce": lambda: dist.all_reduce(x),
        "reduce": lambda: dist.reduce(x, case.root),
        "broadcast": lambda: dist.broadcast(x, case.root),
        "all_gather": lambda: dist.all_gather_into_tensor(out, x),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(out, x),
        "all_to_all": lambda: dist.all_to_all_single(out, x),
    }
    return Bound(calls[case.collective], out)


def bind_copy(rank: Rank, case: Case) -> Bound:
    """The least that any of them does on its own memory: every byte is read once and written once."""
    x = torch.zeros(case.count, dtype=getattr(torch, case.dtype), device=rank.where)
    out = torch.empty_like(x)
    return Bound(lambda: out.copy_(x), out)


def engines_of(rank: Rank) -> dict[str, Callable[[Rank, Case], Bound]]:
    nccl = {"nccl": bind_nccl} if rank.nccl else {}
    return {"paracomm": bind_ours, **nccl, "copy": bind_copy}


def wrong_elements(rank: Rank, case: Case, bound: Bound) -> int:
    """Of the first call, on all ranks."""
    bound.call()
    rank.synchronize()
    want = expected(case, rank.comm.rank, rank.where)
    own = 0 if want is None else int((bound.result != want.to(bound.result.dtype)).sum())
    return sum(rank.everybodys(own))


def measure(rank: Rank, case: Case, rounds: int) -> list[Line]:
    """A line an engine."""
    bounds = {name: bind(rank, case) for name, bind in engines_of(rank).items()}
    wrong = {name: None if name == "copy" else wrong_elements(rank, case, bound) for name, bound in bounds.items()}
    times: dict[str, list[float]] = {name: [] for name in bounds}
    for turn in range(rounds + 1):
        for name, bound in bounds.items():
            rank.synchronize()
            rank.comm.barrier()
            slowest = max(rank.everybodys(rank.microseconds(bound.call, CALLS)))
            if turn:  # the first warms up
                times[name].append(slowest)
    return [Line(case, name, statistics.median(times[name]), wrong[name]) for name in bounds]


# --- the table ---
@dataclass
class Line:
    """One engine's figures of one case. `wrong`: elements over all ranks, None where nothing was computed."""

    case: Case
    engine: str
    time_us: float
    wrong: int | None

    @property
    def algbw(self) -> float:
        """GB/s."""
        return self.case.size / self.time_us / 1e3

    @property
    def busbw(self) -> float:
        """GB/s; a copy has no bus."""
        return self.algbw * (1.0 if self.engine == "copy" else self.case.bus_factor)

    def text(self) -> str:
        case = self.case
        redop = case.op if case.collective in REDUCING else "none"
        root = case.root if case.collective in ROOTED else -1
        wrong = "N/A" if self.wrong is None else str(self.wrong)
        return (
            f"{case.size:>12} {case.count:>12} {case.dtype:>8} {redop:>7} {root:>6} {self.time_us:>9.2f} "
            f"{self.algbw:>7.2f} {self.busbw:>7.2f} {wrong:>6}  {self.engine}"
        )

    def record(self) -> dict[str, Any]:
        case = self.case
        return {
            "collective": case.collective, "ranks": case.world_size, "engine": self.engine, "size": case.size,
            "count": case.count, "type": case.dtype, "redop": case.op if case.collective in REDUCING else "none",
            "time_us": self.time_us, "algbw": self.algbw, "busbw": self.busbw, "wrong": self.wrong,
        }  # fmt: skip


HEADER = (
    f"# {'size':>10} {'count':>12} {'type':>8} {'redop':>7} {'root':>6} {'time':>9} {'algbw':>7} {'busbw':>7} "
    f"{'#wrong':>6}  engine\n# {'(B)':>10} {'(elements)':>12} {'':>8} {'':>7} {'':>6} {'(us)':>9} {'(GB/s)':>7} "
    f"{'(GB/s)':>7}"
)


# --- a run ---
@dataclass(frozen=True)
class Run:
    """What was asked for."""

    sizes: list[int]
    collectives: tuple[str, ...]
    dtypes: tuple[str, ...]
    counts: tuple[int, ...]
    rounds: int
    out: Path

    def of(self, rank: Rank) -> int:
        """0 if all is well on this rank."""
        first = rank.comm.rank == 0

        def report(text: str) -> None:
            if first:
                typer.echo(text)

        report(describe(rank))
        bad = compare_bits(rank, self.dtypes, self.counts, report)
        lines = self.table(rank, report)
        bad += sum(bool(line.wrong) for line in lines)
        if first:
            about = {"device": name_of(rank.where), "torch": torch.__version__, "bits_differ": bad}
            self.out.write_text("".join(json.dumps(about | line.record()) + "\n" for line in lines))
        return int(bad > 0)

    def table(self, rank: Rank, report: Report) -> list[Line]:
        lines = []
        for collective in self.collectives:
            report(f"# {collective}\n{HEADER}")
            in_place = collective in ("all_reduce", "reduce", "broadcast")
            for nbytes in self.sizes:
                for line in measure(rank, Case(collective, nbytes, "float32", "sum", 0, in_place, rank.comm.world_size),
                                    self.rounds):  # fmt: skip
                    report(line.text())
                    lines.append(line)
        return lines


def name_of(where: torch.device) -> str:
    return "emulated GPU" if where.type == "cpu" else torch.cuda.get_device_name(where)


def describe(rank: Rank) -> str:
    """Who runs where, and who can read whose memory."""
    names = rank.everybodys([rank.comm.rank, str(rank.where), name_of(rank.where)])
    lines = [f"#   rank {number} on {where}, {name}" for number, where, name in names]
    if not rank.emulated:
        gpus = range(torch.cuda.device_count())
        pairs = [(a, b) for a in gpus for b in gpus if a != b]
        reached = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
        lines.append(f"#   peer access: {reached} of {len(pairs)} pairs of GPUs")
    lines.append(f"#   NCCL beside it: {'yes' if rank.nccl else 'no, ranks have no GPU each of their own'}")
    return "\n".join(lines)


def main(
    threads: Annotated[int, typer.Option(help="Ranks as threads on the first GPU; 0: this is a rank of torchrun.")] = 0,
    sizes: Annotated[str, typer.Option(help="Bytes: FIRST:LAST:FACTOR, or a list.")] = "8:256M:8",
    collectives: Annotated[str, typer.Option(help="To time, by commas.")] = ",".join(TIMED),
    rounds: Annotated[int, typer.Option(help=f"Of {CALLS} calls an engine.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Bits of a few types and sizes only.")] = False,
    out: Annotated[Path, typer.Option(help="Where JSON lines go.")] = Path("gpu-collectives.jsonl"),
    can_run: Annotated[bool, typer.Option("--can-run", help="Only say whether there is anything to run on.")] = False,
) -> None:
    """Exits with 3 where there is no GPU, and with 1 where a result is wrong."""
    obstacle = why_not()
    if obstacle is not None:
        typer.echo(f"gpu_collectives: {obstacle}. Nothing was run.", err=True)
        raise typer.Exit(NOTHING_TO_RUN_ON)
    if can_run:
        return
    run = Run(parse_sizes(sizes), tuple(collectives.split(",")), DTYPES[:4:3] if quick else DTYPES,
              COUNTS[:2] if quick else COUNTS, rounds, out)  # fmt: skip
    if threads:
        raise typer.Exit(run_threads(threads, run.of))
    with rank_of_torchrun() as rank:
        raise typer.Exit(run.of(rank))


if __name__ == "__main__":
    typer.run(main)
