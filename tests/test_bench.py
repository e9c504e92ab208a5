"""The benchmark command: its definitions, its checks of results, and contenders that cannot or do not answer."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from paracomm.cli.bench import _split
from paracomm.cli.contest import contenders, peers, report, worker
from paracomm.cli.contest.case import COLLECTIVES, ITEM_SIZE, Case, Sample, cases_of, parse_sizes, quantile, show_size
from paracomm.cli.contest.contenders import Runner, Unsupported, parse_imb
from paracomm.cli.contest.contest import Cell, Contest, Effort
from paracomm.cli.contest.launch import CaseError, ContenderError, Group, Place
from paracomm.cli.main import build_app
from paracomm.errors import InvalidArgument


def case(collective: str = "all_reduce", nbytes: int = 4096, ranks: int = 4, dtype: str = "float32") -> Case:
    return Case(collective, nbytes, dtype, "sum", 0, False, ranks)


# --- definitions ---


def test_sizes() -> None:
    assert parse_sizes("8:64") == [8, 16, 32, 64]
    assert parse_sizes("1K:16M:16") == [1 << 10, 1 << 14, 1 << 18, 1 << 22]
    assert parse_sizes("8,1K,64MiB") == [8, 1 << 10, 64 << 20]
    assert [show_size(n) for n in (8, 1 << 10, 64 << 20, 3000)] == ["8", "1K", "64M", "3000"]
    for text in ("8x", "64:8", "0:8", "8:64:1", "8:16:2:2", "-8"):
        with pytest.raises(InvalidArgument):
            parse_sizes(text)


def test_bandwidth_is_that_of_nccl_tests() -> None:
    # doc/PERFORMANCE.md: factors 2(n-1)/n, (n-1)/n and 1.
    assert case("all_reduce").bus_factor == 1.5
    assert case("all_gather").bus_factor == case("reduce_scatter").bus_factor == case("all_to_all").bus_factor == 0.75
    assert case("broadcast").bus_factor == case("reduce").bus_factor == 1
    sample = Sample()
    sample.add([[1e-6, 3e-6, 2e-6], [4e-6, 4e-6, 4e-6]])
    figures = report.figures(case(nbytes=4096), sample)
    assert figures["time_us"] == pytest.approx(4)  # the slowest rank's median
    assert figures["algbw"] == pytest.approx(4096 / 4e-6 / 1e9)
    assert figures["busbw"] == pytest.approx(1.5 * figures["algbw"])


def test_counts_divide_among_the_ranks() -> None:
    assert case("all_gather", 100, ranks=3).count == 24
    assert case("all_gather", 1, ranks=3).count == 3
    assert case("all_reduce", 1, ranks=3).count == 1
    assert case("all_reduce", 10, dtype="float16").size == 10


def test_quantile() -> None:
    values = [float(i) for i in range(1, 101)]
    assert (quantile(values, 0.99), quantile(values, 0.5), quantile([3.0], 0.99)) == (99, 50, 3)


def test_imb_rows() -> None:
    text = "       #bytes #repetitions  t_min[usec]  t_max[usec]  t_avg[usec]\n    8   1000   0.31   0.33   0.32\n"
    assert parse_imb(text, 8) == pytest.approx(0.33e-6)
    assert parse_imb(
        " #repetitions  t_min[usec]  t_max[usec]  t_avg[usec]\n  1000  0.1  0.3  0.2\n", 0
    ) == pytest.approx(3e-7)
    with pytest.raises(ContenderError, match="no row for 16"):
        parse_imb(text, 16)


def test_peers_with_commas() -> None:
    assert _split("gloo,torch=mine,my_module,floor") == ["gloo", "torch=mine,my_module", "floor"]
    assert _split("") == []


# --- inputs and checks ---


@pytest.mark.parametrize("dtype", ITEM_SIZE)
@pytest.mark.parametrize("count", [1, 29, 30, 31, 1000])
def test_every_wrong_element_is_counted(dtype: str, count: int) -> None:
    block = worker.encode(worker.pattern(1, dtype, "sum"), dtype)
    out = np.empty(count, worker.storage_of(dtype))
    worker.tile(out, block, first=7)
    assert out[0] == block[7] and out[-1] == block[(7 + count - 1) % 30]
    assert worker.wrong(out, block, first=7) == 0
    for i in {0, count - 1}:
        out[i] = out[i] == 0
    assert worker.wrong(out, block, first=7) == min(2, count)


@pytest.mark.parametrize("dtype", ITEM_SIZE)
@pytest.mark.parametrize("op", ["sum", "prod", "min", "max", "avg"])
def test_predicted_results_are_exact(dtype: str, op: str) -> None:
    ranks = 7
    predicted = worker.encode(worker.reduced(ranks, dtype, op), dtype)
    if dtype in ("bfloat16", "bool"):
        return  # NumPy cannot reduce the one, and the other is logic
    inputs = np.stack([worker.encode(worker.pattern(rank, dtype, op), dtype) for rank in range(ranks)])
    operator = {"sum": np.add, "avg": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}[op]
    result = operator.reduce(inputs, dtype=inputs.dtype)
    if op == "avg":
        result = (result / ranks).astype(inputs.dtype)
    np.testing.assert_array_equal(result, predicted)


class LoneRank(worker.Contender):
    """A world of one whose all_reduce spoils what it is told to spoil."""

    rank, world_size = 0, 1

    def __init__(self, spoil: slice) -> None:
        self.spoil = spoil

    def empty(self, count: int, dtype: str, memory: str) -> np.ndarray:
        return np.empty(count, worker.storage_of(dtype))

    def barrier(self) -> None:
        pass

    def bind(self, collective: str, send: np.ndarray, recv: np.ndarray, op: str, root: int) -> worker.Call:
        def call() -> None:
            recv[:] = send
            recv[self.spoil] += 1

        return call


@pytest.mark.parametrize(("spoil", "errors"), [(slice(0), 0), (slice(3, 5), 4), (slice(None), 2000)])
def test_a_wrong_library_is_found_out(spoil: slice, errors: int) -> None:
    command = case(nbytes=4000, ranks=1).command("private")
    reply = worker.Worker(LoneRank(spoil)).answer(command)
    assert reply["wrong"] == errors  # in two sets of buffers


# --- the contest ---


class Stub(Runner):
    def __init__(self, label: str, call_s: float = 1e-6, dies_at: int = 99, lacks: str = "") -> None:
        self.label, self.call_s, self.dies_at, self.lacks = label, call_s, dies_at, lacks
        self.log: list[tuple[str, int]] = []

    def prepare(self, case: Case, sample: Sample) -> float:
        if case.collective == self.lacks:
            raise Unsupported("has no such thing")
        sample.wrong = 0
        return self.call_s

    def measure(self, case: Case, sample: Sample, iterations: int) -> None:
        self.log.append((case.collective, iterations))
        if len(self.log) == self.dies_at:
            raise ContenderError(f"{self.label} died")
        sample.add([[self.call_s] * iterations])


def contest(*runners: Runner, rounds: int = 3) -> Contest:
    return Contest(runners, Effort(rounds=rounds, seconds=1e-3, least=5, most=100))


def run(collective: str, who: Contest) -> list[Cell]:
    return who.run_size(cases_of(collective, [64], "float32", "sum", 0, 2)[0])


def test_contenders_take_turns() -> None:
    order: list[str] = []
    a, b = Stub("a"), Stub("b", call_s=1e-4)
    for stub in (a, b):
        stub.forget = lambda label=stub.label: order.append(label)  # type: ignore[method-assign]
    cells = run("broadcast", contest(a, b))
    assert a.log == [("broadcast", 100)] * 3 and b.log == [("broadcast", 10)] * 3
    assert [len(cell.samples[True][1].p50s) for cell in cells] == [3, 3] and order == ["a", "b"]


def test_a_dead_contender_is_out_and_says_so_from_then_on() -> None:
    good, bad = Stub("good"), Stub("bad", dies_at=2)
    both = contest(good, bad)
    cells = run("broadcast", both)
    assert cells[1].samples[True][1].trouble == "bad died"
    again = run("broadcast", both)
    assert again[1].samples[True][1].trouble == "bad died" and not again[1].samples[True][1].p50s
    assert len(bad.log) == 2 and len(good.log) == 6
    assert "bad died" in "\n".join(report.rows(again, [True]))


def test_what_a_contender_lacks_costs_it_one_case_only() -> None:
    partial = contest(Stub("partial", lacks="scatter"))
    assert run("scatter", partial)[0].samples[False][1].trouble == "has no such thing"
    assert run("gather", partial)[0].samples[False][1].p50s


def test_share_of_the_floor() -> None:
    cells = run("broadcast", contest(Stub("ours", 4e-6), Stub("floor", 1e-6)))
    assert report.floor_share(cells, cells[0]) == pytest.approx(0.25)
    found = report.records(cells, {})
    assert found[0]["floor_share"] == pytest.approx(0.25) and found[1]["floor_share"] is None


# --- real processes ---


@pytest.fixture(scope="module")
def gloo() -> object:
    group = Group("gloo", 2, Place(2).starts(), ["gloo"])
    yield contenders.GroupRunner("gloo", group)
    group.close()


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_gloo_is_right_in_every_collective(gloo: contenders.GroupRunner, collective: str) -> None:
    this = cases_of(collective, [1000], "float32", "sum", 1, 2)[0][-1]
    sample = Sample()
    assert gloo.prepare(this, sample) > 0
    gloo.measure(this, sample, 5)
    assert sample.wrong == 0 and len(sample.p50s) == 1 and sample.p50 > 0


def test_a_failed_call_leaves_the_contender_fit(gloo: contenders.GroupRunner) -> None:
    with pytest.raises(CaseError, match="unknown command 'dance'"):
        gloo.group.ask({"do": "dance"})
    assert len(gloo.group.ask({"do": "cpu"})) == 2


def test_a_contender_that_cannot_start_says_why() -> None:
    with pytest.raises(ContenderError, match=r"did not start.*no_such_module"):
        Group("ghost", 1, Place(1).starts(), ["gloo", "module=no_such_module"])


def test_a_killed_contender_is_reported() -> None:
    import os
    import signal

    group = Group("victim", 2, Place(2).starts(), ["gloo"])
    os.kill(group.pids[1], signal.SIGKILL)
    for _ in range(2):  # at the first the socket may still take the command, at the second it does not
        with pytest.raises(ContenderError, match=r"victim (died|did not answer)"):
            group.ask({"do": "cpu"}, timeout_s=10)
    group.close()
    assert not any(Path(f"/proc/{pid}/cmdline").exists() and b"worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
                   for pid in group.pids)  # fmt: skip


# --- the command ---


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(build_app(["bench"]), ["bench", *arguments])
    return result.exit_code, result.output


def test_missing_peers_are_named_with_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PARACOMM_PEERS", str(tmp_path))
    code, output = invoke("all_reduce", "--memory", "", "--vs", "mpich,openmpi")
    assert code == 2 and "MPICH is not installed; get it with: paracomm bench --install-peers" in output
    assert peers.installed("mpich") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["all_reduse"], "unknown collective 'all_reduse'"),
        (["all_reduce", "--sizes", "tiny"], "size 'tiny'"),
        (["reduce", "--root", "2"], "root 2"),
        (["all_reduce", "--memory", "shared"], "unknown memory 'shared'"),
        (["all_reduce", "--dtype", "float8"], "unknown dtype 'float8'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    code, output = invoke(*arguments)
    assert code == 2 and message in output


def test_table_and_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "figures.jsonl"
    code, output = invoke("all_reduce", "--vs", "floor", "--sizes", "64,4K", "--rounds", "1", "--seconds", "0.01",
                          "--memory", "private,arena", "--json", str(path))  # fmt: skip
    assert code == 0, output
    for word in ("algbw", "busbw", "#wrong", "in place", "out of place", "paracomm arena", "floor"):
        assert word in output
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(r["contender"], r["in_place"], r["size"]) for r in found if r["contender"] != "floor"} == {
        (who, way, size)
        for who in ("paracomm private", "paracomm arena")
        for way in (False, True)
        for size in (64, 4096)
    }
    assert all(r["wrong"] == 0 and r["time_us"] > 0 and r["p99_us"] >= 0 for r in found if r["contender"] != "floor")


def test_the_worker_needs_nothing_of_ours() -> None:
    # An MPI's environment has NumPy and mpi4py only.
    import ast

    tree = ast.parse(Path(worker.__file__).read_text())
    top = {name.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for name in node.names}
    top |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
    assert top - set(sys.stdlib_module_names) == {"numpy"}
