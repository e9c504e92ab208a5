"""The static tuner: what it drops, what it prefers, what it writes. Nothing is run."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from paracomm.cli.main import build_app
from paracomm.errors import Error
from paracomm.kernels import config
from paracomm.kernels.config import ARCHES, table
from paracomm.kernels.select import interpreted

pytest.importorskip("triton", reason="Triton is not installed")
if interpreted():
    pytest.skip("kernels are compiled in a process without TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from paracomm.kernels.static import tune
from paracomm.kernels.static.case import Case
from paracomm.kernels.static.tune import Candidate, Row, attention_rows, best, judge, product_rows


@triton.jit
def squared(X, times, BM: tl.constexpr):
    at = tl.arange(0, BM)[:, None] * BM + tl.arange(0, BM)[None, :]
    x = tl.load(X + at)
    for _ in range(times):
        x = tl.dot(x, x).to(tl.bfloat16)
    tl.store(X + at, x)


def square(row: Row) -> list[Case]:
    return [
        Case(
            "squared",
            squared,
            {"X": "*bf16", "times": "i32"},
            {"BM": row["BM"]},
            row["warps"],
            row["stages"],
            matmul=True,
        )
    ]


def row_of(BM: int, warps: int = 4, stages: int = 2) -> Row:
    return {"BM": BM, "BN": BM, "warps": warps, "stages": stages}


@pytest.mark.parametrize("arch", ARCHES)
def test_what_spills_or_does_not_compile_is_dropped(arch: int) -> None:
    kept = judge(square(row_of(64)), arch, row_of(64))
    assert kept is not None and kept.serial > 0 and kept.blocks >= 1
    assert judge(square(row_of(128, warps=2)), arch, row_of(128, warps=2)) is None, "128 x 128 in two warps spills"
    assert judge(square(row_of(24)), arch, row_of(24)) is None, "24 is no power of two"
    assert judge([*square(row_of(64)), *square(row_of(24))], arch, row_of(64)) is None, "every variant must fit"


def test_the_best_is_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {16: 0.4, 32: None, 64: 0.6, 128: 0.604, 256: 0.9}
    judged: list[int] = []

    def known(cases: list[Case], arch: int, row: Row) -> Candidate | None:
        judged.append(row["BM"])
        share = shares[row["BM"]]
        return None if share is None else Candidate(row, share, 2)

    monkeypatch.setattr(tune, "judge", known)
    rows = [row_of(BM) for BM in shares]
    assert best(rows, square, 90, enough=3).row["BM"] == 128, "of equal shares the larger tile"
    assert judged == [16, 32, 64, 128], "no more than enough"
    assert best(rows, square, 90, enough=9).row["BM"] == 256
    assert best([row_of(256, stages=1), row_of(16)], square, 90, enough=9).row["BM"] == 16, "loads ahead come first"
    with pytest.raises(Error, match=r"none of 1 configurations may be shipped on sm_90"):
        best([row_of(32)], square, 90, enough=9)


KERNELS = ("attention_forward", "attention_dkdv", "attention_dq", "attention_dkdv_heavy")


@pytest.mark.parametrize(("arch", "kernel", "size"), [*itertools.product(ARCHES, KERNELS, (64, 128, 256))])
def test_candidates_of_attention(arch: int, kernel: str, size: int) -> None:
    check_rows(attention_rows(kernel, size, 2, arch), {"BM", "BN", "warps", "stages"})


@pytest.mark.parametrize("arch", ARCHES)
def test_rows_of_attention_that_are_shipped_are_candidates(arch: int) -> None:
    for kernel, dtype, size, rows, _ in tune.jobs(arch):
        if kernel.startswith("attention"):
            assert config.table(arch)[kernel][dtype][str(size)] in list(rows), f"{kernel} {dtype} {size}"


@pytest.mark.parametrize(("arch", "dtype"), [*itertools.product(ARCHES, ("bfloat16", "float32"))])
def test_candidates_of_products(arch: int, dtype: str) -> None:
    found = check_rows(product_rows(arch, dtype), {"BM", "BN", "BK", "warps", "stages"})
    assert all(bool(row.get("TMA")) == (arch == 90 and dtype == "bfloat16") for row in found)


def check_rows(rows: Iterator[Row], keys: set[str]) -> list[Row]:
    found = list(rows)
    assert len(found) >= 4 and all(keys <= set(row) for row in found)
    assert len({json.dumps(row, sort_keys=True) for row in found}) == len(found), "a candidate is tried twice"
    assert all(row["warps"] in (4, 8) and row["BM"] & (row["BM"] - 1) == 0 for row in found)
    return found


def test_float16_takes_what_bfloat16_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "TABLES", tmp_path)
    rows: dict[str, Any] = {"other": {"float32": {"0": row_of(16)}}}
    tune.merge(rows, "linear", "bfloat16", 0, row_of(64))
    tune.merge(rows, "linear", "float32", 0, row_of(32))
    tune.dump(rows, 80)
    written = json.loads((tmp_path / "sm_80.json").read_text())
    linear = {"bfloat16": {"0": row_of(64)}, "float16": {"0": row_of(64)}, "float32": {"0": row_of(32)}}
    assert written == {"other": {"float32": {"0": row_of(16)}}, "linear": linear}


@pytest.mark.parametrize("arch", ARCHES)
def test_tables_are_as_the_tuner_writes_them(arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first run of `paracomm tune kernels --write` would touch every line."""
    shipped = (tune.TABLES / f"sm_{arch}.json").read_text()
    monkeypatch.setattr(tune, "TABLES", tmp_path)
    tune.dump(table(arch), arch)
    assert (tmp_path / f"sm_{arch}.json").read_text() == shipped


def test_the_nearest_row_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"64": row_of(64), "256": row_of(128)}
    monkeypatch.setattr(config, "table", lambda arch: {"some": {"float32": rows}})
    found = [config.config("some", 80, "float32", size)["BM"] for size in (16, 64, 65, 256, 512)]
    assert found == [64, 64, 128, 128, 128]
    config.config("some", 80, "float32", 64)["BM"] = 1
    assert rows["64"]["BM"] == 64, "a copy"
    with pytest.raises(Error, match=r"tables/sm_80\.json has no row for some in float16"):
        config.config("some", 80, "float16", 64)
    with pytest.raises(Error, match=r"no row for other in float32"):
        config.config("other", 80, "float32")
    with config.override(some=row_of(16)):
        assert config.config("some", 80, "float32", 64) == row_of(16)
    assert config.config("some", 80, "float32", 64) == row_of(64)


def command(*arguments: str) -> Any:
    return CliRunner().invoke(build_app(["tune", "kernels"]), ["tune", "kernels", *arguments])


def test_command_prints_static_figures() -> None:
    result = command("gated silu bfloat16", "--estimate", "--arch", "90")
    assert result.exit_code == 0, result.output
    assert "static figures: nothing was run" in result.stdout and re.search(
        r"gated silu bfloat16 .* yes", result.stdout
    )


def test_command_chooses_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "TABLES", tmp_path)
    monkeypatch.setattr(tune, "jobs", lambda arch: [("linear", "bfloat16", 0, [row_of(64), row_of(32)], square)])
    result = command("lin", "--arch", "80", "--enough", "2")
    assert result.exit_code == 0 and "sm_80 linear bfloat16 0: {'BM': 64" in result.stdout, result.output
    assert list(tmp_path.iterdir()) == [], "nothing is written unless it was asked for"
    assert command("lin", "--arch", "80", "--write").exit_code == 0
    written = json.loads((tmp_path / "sm_80.json").read_text())
    assert written.pop("linear")["float16"]["0"] == row_of(64) != table(80)["linear"]["float16"]["0"]
    assert written == {kernel: rows for kernel, rows in table(80).items() if kernel != "linear"}, "the others stay"


def test_command_says_what_it_cannot() -> None:
    result = command("--arch", "70")
    assert result.exit_code == 2 and "no table for sm_70" in result.output
