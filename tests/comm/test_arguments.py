"""Arguments: each is checked before anything is sent, and nothing kills the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import paracomm
from paracomm import _C, InvalidArgument
from paracomm.comm.arguments import LONGEST_S, block_rows, seconds
from paracomm.comm.arrays import view
from tests.comm.cases import run_over

ROOT = Path(__file__).parents[2]

NO_SECONDS = [0, -1, -0.0, float("nan"), float("inf"), "5", b"5", True, np.True_, [1], np.array(3.0), 1j, object()]


@pytest.mark.parametrize("value", [1, 2.5, np.float32(3), np.int64(4), Fraction(1, 2), 5e-324])
def test_seconds_are_any_finite_number_above_0(value: Any) -> None:
    assert seconds("timeout_s", value) == float(value)


def test_seconds_end_where_the_core_sees_no_end() -> None:
    assert seconds("timeout_s", None) == -1.0
    assert seconds("timeout_s", 10**400) == seconds("timeout_s", 1e300) == LONGEST_S


@pytest.mark.parametrize("value", NO_SECONDS)
def test_anything_else_is_no_number_of_seconds(value: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^timeout_s must be a finite number of seconds above 0, got "):
        seconds("timeout_s", value)


# --- options of connect() ---
NO_NUMBER = [True, "4", 4096.0, float("nan"), -1, 2**45, 2**62, 2**64, 10**400, [4096], np.True_]
WRONG = (
    [(name, value) for name in _C.OPTIONS for value in NO_NUMBER]
    + [(name, value) for name in ("timeout_s", "connect_timeout_s") for value in NO_SECONDS]
    + [(name, value) for name in ("interface", "master_address", "host_id") for value in (None, 5, b"eth0", ["eth0"])]
    + [("transport", value) for value in ("shm", 5, True)]
    + [("table", value) for value in (5, [], {"x": []}, {"all_reduce": [[2**62, "spiral", {}]]}, {"all_reduce": 3})]
    + [("lag", 65), ("window_bytes", 1023), ("staging_bytes", 4095), ("sockets_per_peer", 64), ("spin", 1), ("Lag", 1)]
)  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
@pytest.mark.parametrize("through", ["connect", "init"])
def test_options_are_refused_before_anybody_is_asked(
    name: str, value: Any, through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exchange(blob: bytes) -> list[bytes]:
        raise AssertionError("something was sent")

    for variable, setting in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "no.invalid", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(variable, setting)
    with pytest.raises(InvalidArgument) as caught:
        if through == "init":
            paracomm.init(**{name: value})
        else:
            paracomm.connect(0, 2, exchange, **{name: value})
    assert name in str(caught.value) or name == "table"
    if name in _C.OPTIONS:
        least, most = _C.OPTIONS[name]
        assert f"must be in {least}..{most}, a whole number, got {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("rank", "world_size"), [(0, 0), (-1, 2), (2, 2), (True, 2), (0, 2.0), ("0", 2), (0, None), (None, 2), (0, 2**40)]
)
@pytest.mark.parametrize("transport", [None, "tcp", "local"])
def test_ranks_are_whole_numbers(rank: Any, world_size: Any, transport: str | None) -> None:
    with pytest.raises(InvalidArgument, match=r"rank|world_size"):
        paracomm.connect(rank, world_size, lambda blob: [blob], transport=transport)


def widest(comm: Any) -> float:
    return float(comm.all_reduce(np.ones(300_000, np.float32)).min())


@pytest.mark.parametrize(
    "options",
    [
        {"window_bytes": 1024}, {"staging_bytes": 4096}, {"lag": 64}, {"cores": 1 << 16},
        {"lag": 64, "window_bytes": 1024}, {"window_bytes": None, "staging_bytes": 0, "lag": np.int64(2)},
        {"window_bytes": 256 << 20, "staging_bytes": 8192},
    ],
)  # fmt: skip
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_the_ends_of_their_ranges_work(transport: str, options: dict[str, Any]) -> None:
    assert run_over(transport, 2, widest, **options) == [2.0, 2.0]


def too_narrow(comm: Any) -> str:
    """Two chunks of a rank leave 64 bytes for each: such messages would wait for each other."""
    with pytest.raises(InvalidArgument) as caught:
        comm.all_reduce(np.ones(300_000, np.float32), algorithm="double_tree")
    assert comm.all_reduce(np.ones(3))[0] == comm.world_size
    return str(caught.value)


def test_a_window_that_is_too_small_for_an_algorithm() -> None:
    for text in run_over("shm", 3, too_narrow, window_bytes=1024):
        assert "window_bytes is 1024, expected at least " in text


def test_staging_fits_the_memory() -> None:
    """Of so many ranks on this host that their share is less: nothing is connected, or allocated."""
    ranks = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (1 << 31) + 1
    listeners = [_C.Listener(host_id="a") for _ in range(ranks)]
    blobs = [listener.publish() for listener in listeners]
    options = {"timeout_s": 1.0, "connect_timeout_s": 5.0, "staging_bytes": 1 << 30}
    with pytest.raises(InvalidArgument, match="half of its memory"):
        _C.connect(0, listeners[0], blobs, **options)


# --- the extension ---
def test_odd_calls_kill_nobody(tmp_path: Path) -> None:
    """Everything that _C has, with some 60 000 odd lists of arguments."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tests.comm.extension_calls", str(log), "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PARACOMM_EMULATED_DEVICES": "2"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=150)
    last = log.read_text(errors="replace")[-500:]
    assert done.returncode == 0, f"{done.returncode}\n{done.stderr[-2000:]}\n{last}"
    assert int(done.stdout) > 20_000


CALLS: dict[str, tuple[type[Exception], Callable[[Any], Any]]] = {
    "no program 99": (InvalidArgument, lambda comm: comm.dump_plan(99, 0, 0, 0, 0, 0)),
    "dtype 200, expected 0 to": (InvalidArgument, lambda comm: comm.run(0, 0, 0, 0, 200, 0)),
    "dtype 256, expected 0 to": (InvalidArgument, lambda comm: comm.send(0, 0, 256, 0)),
    "reduction 99, expected 0 to": (InvalidArgument, lambda comm: comm.submit(0, 0, 0, 0, 0, 99)),
    "collective 77, expected 0 to": (InvalidArgument, lambda comm: comm.choose(77, 0, 0)),
    "dtype -1, expected": (InvalidArgument, lambda comm: _C.item_size(-1)),
    "arguments": (TypeError, lambda comm: _C.make_device(0, 0, 0)),
    "incompatible": (TypeError, lambda comm: type(comm).check(None)),
    "made by paracomm alone": (TypeError, lambda comm: type(comm).__new__(type(comm))),
    "contiguous float64": (InvalidArgument, lambda comm: _C.fill_normal(0, 0, 0, 0, np.ones(3, np.float32))),
    "writable": (InvalidArgument, lambda comm: _C.fill_normal(0, 0, 0, 0, np.broadcast_to(np.float64(0), (1,)))),
    "not whole blocks": (InvalidArgument, lambda comm: _C.encode_blocks(
        8, 32, np.ones(32, np.float32), None, 1, None, np.zeros(37, np.uint8))),
    "too short": (InvalidArgument, lambda comm: _C.decode_blocks(
        8, 32, np.zeros(36, np.uint8), False, np.ones(33, np.float32))),
}  # fmt: skip


@pytest.mark.parametrize("message", CALLS)
def test_what_the_binding_says(message: str) -> None:
    kind, call = CALLS[message]
    with pytest.raises(kind, match=message):
        call(_C.local_communicators(1, timeout_s=5.0)[0])


# --- arrays ---
def test_a_storage_that_shrank_under_a_tensor_that_was_seen() -> None:
    """The new block has the old one's address, as a rule."""
    for _ in range(50):
        x = torch.ones(100_000)
        view(x)
        x.untyped_storage().resize_(0)
        x.untyped_storage().resize_(200_000)
        with pytest.raises(InvalidArgument, match="bytes 0 to 400000 of its storage, which has 200000"):
            view(x)


def test_a_negated_tensor_in_the_place_of_one_that_was_seen() -> None:
    z = torch.full((1,), 1j)
    for _ in range(50):
        plain = z.imag
        assert not view(plain).lazy
        del plain  # the next one comes to lie there, as a rule
        assert view(z.conj().imag).lazy


def test_scalars_of_numpy_are_read_but_not_written() -> None:
    comm = paracomm.connect(0, 1, lambda blob: [blob])
    assert comm.all_gather(np.float32(3)).tolist() == [3.0]
    for call in (lambda: comm.all_reduce(np.float32(3)), lambda: comm.all_reduce(np.ones(1, "f"), out=np.float32(3))):
        with pytest.raises(InvalidArgument, match="read-only"):
            call()
    comm.close()


@pytest.mark.parametrize(
    ("exchange", "why"),
    [
        (lambda blob: None, "must return a list of every rank's bytes, got None"),
        (lambda blob: ["x", "y"], "must return a list of every rank's bytes"),
        (lambda blob: [blob], "gave 1 entries, expected one of each of 2 ranks"),
        (lambda blob: [b"x", blob], "gave other bytes as those of rank 0"),
        (lambda blob: [blob, blob], "gave the same address for two ranks"),
    ],
)
def test_an_exchange_that_gives_something_else(exchange: Any, why: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^exchange {why}"):
        paracomm.connect(0, 2, exchange)


def test_rows_may_come_as_arrays() -> None:
    for rows in (
        [1, 2],
        (1, 2),
        np.array([1, 2]),
        torch.tensor([1, 2], dtype=torch.int32),
        [np.uint8(1), torch.tensor(2)],
    ):
        assert block_rows("rows", rows, 2) == [1, 2]
    for rows in (
        [1.0, 2],
        [True, 2],
        np.array([1.0, 2.0]),
        torch.tensor([True, False]),
        torch.ones(2),
        torch.tensor(1),
    ):
        with pytest.raises(InvalidArgument, match=r"^rows must be 2 whole numbers"):
            block_rows("rows", rows, 2)
