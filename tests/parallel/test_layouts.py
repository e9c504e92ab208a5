"""One training run gives the same numbers in every layout: losses and weights, bits where they can be, every pair."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks

from paracomm import hooks
from paracomm.errors import InvalidArgument
from paracomm.parallel import Layout, Mesh
from paracomm.pipeline import SCHEDULES
from tests.parallel.layouts import (
    CASES,
    FEATURES,
    PROBES,
    REFUSALS,
    VARIANTS,
    Case,
    Refusal,
    cases_of,
    pairs,
    with_table,
)
from tests.parallel.training import ADAMW, BOUNDS, Probe, Trainer, bits, digest, one_process, probe, spread

LIMIT_S = 600


def split(cases: list[Case]) -> list[Any]:
    """As parameters, marked with their tier."""
    marks = {"quick": (), "slow": pytest.mark.slow, "exhaustive": pytest.mark.exhaustive}
    return [pytest.param(each, id=each.name, marks=marks[each.tier]) for each in cases]


# --- 50 steps against one process ---
def train(rank: Rank, cases: list[Case]) -> list[dict[torch.dtype, dict[str, Any]]]:
    comm = rank.connect()
    found: list[dict[torch.dtype, dict[str, Any]]] = []
    for case in cases:
        found.append({})
        for dtype in BOUNDS:
            trainer = Trainer(comm, case, dtype, torch.optim.AdamW, **ADAMW)
            found[-1][dtype] = spread(trainer, comm, dtype)
            trainer.close()
    return found


@cache
def trained(world_size: int, tier: str, pp: int) -> dict[Case, list[dict[torch.dtype, dict[str, Any]]]]:
    """What every rank found of all layouts of a size, which share its processes."""
    cases = [each for each in CASES if (each.world, each.tier, each.pp) == (world_size, tier, pp)]
    for case in cases:
        for dtype in BOUNDS:
            one_process(case.variant, dtype)  # before the ranks are forked
    everyone = run_ranks(world_size, train, cases, timeout_s=LIMIT_S)
    return {case: list(found) for case, found in zip(cases, zip(*everyone, strict=True), strict=True)}


@pytest.mark.parametrize("case", split(CASES))
def test_a_layout_equals_one_process(case: Case) -> None:
    for found in trained(case.world, case.tier, case.pp)[case]:
        for dtype, bound in BOUNDS.items():
            errors = {name: found[dtype][name] for name in ("losses", "norms", "weights")}
            assert max(errors.values()) <= bound, f"{dtype}: {errors}, at {found[dtype]['where']}"


def test_the_run_is_worth_comparing() -> None:
    """It learns, it clips, and there are enough layouts of every size."""
    assert len({case.name for case in CASES}) == len(CASES) >= 40
    assert {case.world for case in CASES} == set(range(1, 9))
    for name in {case.variant for case in CASES if case.quick}:
        run = one_process(name, torch.float64)
        assert run.losses[-1] < run.losses[0] - 0.3 and min(run.norms) > 0.5
        assert all(not torch.equal(run.weights[name], initial) for name, initial in run.initial.items())


# --- the same bits ---
STAGES = [
    {"zero": 0},
    {"zero": 0, "bucket_bytes": 1 << 20},
    {"zero": 0, "overlap": False},
    {"zero": 1, "bucket_bytes": 5000},
    {"zero": 2},
    {"zero": 2, "overlap": False, "bucket_bytes": 1},
    {"zero": 3},
    {"zero": 3, "overlap": False},
    {"zero": 3, "bucket_bytes": 1 << 20},
]
MESHES = [
    Case("gpt", dp=2, tp=2, sequence=True, quick=True),
    Case("llama", dp=2, tp=2),
    Case("llama", dp=2, cp=2),
    Case("seq2seq", cp=2, tp=2, context="ulysses", sequence=True),
    Case("gpt", dp=2, cp=2, tp=2, sequence=True),
]


def digests(rank: Rank, case: Case, dtype: torch.dtype, precision: str | None = None) -> list[str]:
    """Of the first stage twice: it repeats itself."""
    comm = rank.connect()
    found = []
    for options in [*STAGES, STAGES[0]]:
        trainer = Trainer(
            comm, replace(case, precision=precision, **options), dtype, torch.optim.AdamW, **ADAMW
        )  # fmt: skip
        found.append(digest(trainer, 5))
        trainer.close()
    return found


@pytest.mark.parametrize("case", split(MESHES))
def test_stages_buckets_and_overlap_give_the_same_bits(case: Case) -> None:
    everyones = run_ranks(case.world, digests, case, torch.float32, timeout_s=LIMIT_S)
    assert len({digest for found in everyones for digest in found}) == 1, everyones


SCHEDULED = [
    Case("gpt", pp=2, quick=True),
    Case("seq2seq", pp=2, precision="bfloat16"),
    Case("llama", pp=2, dp=2, zero=3, microbatches=4),
    Case("deep", pp=4, tp=2, sequence=True, recompute="full", microbatches=8),
]


def digests_by_schedule(rank: Rank, case: Case) -> dict[str, str]:
    comm = rank.connect()
    found = {}
    for name in SCHEDULES:
        trainer = Trainer(comm, replace(case, schedule=name), torch.float32, torch.optim.AdamW, **ADAMW)
        found[name] = digest(trainer, 5)
        trainer.close()
    return found


@pytest.mark.parametrize("case", split(SCHEDULED))
def test_schedules_give_the_same_bits(case: Case) -> None:
    """Those of one stage a rank, and those of two, whose cuts differ."""
    for found in run_ranks(case.world, digests_by_schedule, case, timeout_s=LIMIT_S):
        assert found.keys() == SCHEDULES.keys()
        for each in (1, 2):
            assert len({found[name] for name, kind in SCHEDULES.items() if kind.stages_per_rank[2] == each}) == 1, found


@pytest.mark.slow
def test_stages_give_the_same_bits_in_bfloat16() -> None:
    everyones = run_ranks(4, digests, MESHES[0], torch.float32, "bfloat16", timeout_s=LIMIT_S)
    assert len({digest for found in everyones for digest in found}) == 1, everyones


@pytest.mark.slow
def test_another_run_gives_the_same_bits() -> None:
    first, second = (run_ranks(4, digests, MESHES[2], torch.float32, timeout_s=LIMIT_S) for _ in range(2))
    assert first == second


# --- hooks and bfloat16, step by step ---
def probe_all(rank: Rank, cases: list[Case]) -> list[Probe]:
    comm = rank.connect()
    return [probe(comm, case, 6) for case in cases]


@cache
def probed(world_size: int, tier: str, pp: int) -> dict[Case, Probe]:
    cases = [case for case in PROBES if (case.world, case.tier, case.pp) == (world_size, tier, pp)]
    return dict(zip(cases, run_ranks(world_size, probe_all, cases, timeout_s=LIMIT_S)[0], strict=True))


@pytest.mark.parametrize("case", split(PROBES))
def test_rounded_gradients_err_by_no_more_than_they_may(case: Case) -> None:
    found = probed(case.world, case.tier, case.pp)[case]
    assert found.elements <= 1 and found.whole <= 1, found
    assert found.alike, "ranks that hold the same weights do not agree on them"


def every_hook(rank: Rank) -> dict[str, set[str]]:
    """Digests of whole weights after some steps, over the ranks."""
    comm = rank.connect()
    found = {}
    for name in hooks.HOOKS:
        if name == "local_sgd":
            continue
        trainer = Trainer(comm, Case("gpt", dp=2, tp=2, hook=name), torch.float32, torch.optim.AdamW, **ADAMW)
        for step in range(3):
            trainer.step(step)
        assert [state.steps for state in trainer.states] == [3]
        found[name] = {blob.decode() for blob in comm.exchange(bits(trainer.weights()).encode())}
        trainer.close()
    return found


def test_under_every_hook_ranks_of_tp_agree() -> None:
    assert [name for name, found in run_ranks(4, every_hook)[0].items() if len(found) > 1] == []


# --- every pair is tested or refused ---
@pytest.mark.parametrize("pair", pairs(), ids="-".join)
def test_no_pair_is_forgotten(pair: tuple[str, str]) -> None:
    assert cases_of(pair) or any(refusal.pair == pair for refusal in REFUSALS)


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_a_refusal_names_its_reason(refusal: Refusal) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(refusal.reason)):
        Layout(**refusal.layout).check(**refusal.facts)


def test_all_that_is_tested_is_accepted_and_walked() -> None:
    assert all(len(pair) == 2 and set(pair) <= set(FEATURES) for pair in pairs()) and len(pairs()) == 45
    for case in (*CASES, *PROBES):
        case.layout.check(world_size=case.world, length=VARIANTS[case.variant].config.context)


def test_the_page_has_the_table_of_what_is_tested() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "layouts.md"
    text = page.read_text()
    assert text == with_table(text), "run `python -m tests.parallel.layouts docs/layouts.md`"


def wrong(rank: Rank) -> float:
    """Each rank draws the dropout of its own rows 0, 1, ..., as other systems do."""
    trainer = Trainer(rank.connect(), Case("gpt", dp=2), torch.float64, torch.optim.AdamW, **ADAMW)
    trainer.mesh.shard_rows = lambda x: x[: len(x) // 2] if x.dim() == 1 else Mesh.shard_rows(trainer.mesh, x)
    loss, _ = trainer.step(0)
    return abs(loss / one_process("gpt", torch.float64).losses[0] - 1)


def test_a_wrong_layout_is_seen() -> None:
    assert min(run_ranks(2, wrong)) > 1e-5
