"""One training run gives the same numbers in every layout: losses and weights, bits where they can be, every pair."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks

from tests.parallel.layouts import ADAMW, BOUNDS, LAYOUTS, Layout, Trainer, one_process, spread

LIMIT_S = 600


def split(layouts: list[Layout]) -> list[Any]:
    """As parameters, the quick ones for every day."""
    return [pytest.param(each, id=each.name, marks=[] if each.quick else pytest.mark.slow) for each in layouts]


# --- 50 steps against one process ---
def train(rank: Rank, layouts: list[Layout]) -> list[dict[torch.dtype, dict[str, Any]]]:
    comm = rank.connect()
    found: list[dict[torch.dtype, dict[str, Any]]] = []
    for layout in layouts:
        found.append({})
        for dtype in BOUNDS:
            trainer = Trainer(comm, layout, dtype, torch.optim.AdamW, **ADAMW)
            found[-1][dtype] = spread(trainer, comm, dtype)
            trainer.close()
    return found


@cache
def trained(world_size: int, quick: bool) -> dict[Layout, list[dict[torch.dtype, dict[str, Any]]]]:
    """What every rank found of all layouts of a size, which share its processes."""
    layouts = [each for each in LAYOUTS if each.world == world_size and each.quick == quick]
    for layout in layouts:
        for dtype in BOUNDS:
            one_process(layout.variant, dtype)  # before the ranks are forked
    everyone = run_ranks(world_size, train, layouts, timeout_s=LIMIT_S)
    return {layout: list(found) for layout, found in zip(layouts, zip(*everyone, strict=True), strict=True)}


@pytest.mark.parametrize("layout", split(LAYOUTS))
def test_a_layout_equals_one_process(layout: Layout) -> None:
    for found in trained(layout.world, layout.quick)[layout]:
        for dtype, bound in BOUNDS.items():
            errors = {name: found[dtype][name] for name in ("losses", "norms", "weights")}
            assert max(errors.values()) <= bound, f"{dtype}: {errors}, at {found[dtype]['where']}"


def test_the_run_is_worth_comparing() -> None:
    """It learns, it clips, and there are enough layouts of every size."""
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS) >= 40
    assert {layout.world for layout in LAYOUTS} == set(range(1, 9))
    for name in {layout.variant for layout in LAYOUTS if layout.quick}:
        run = one_process(name, torch.float64)
        assert run.losses[-1] < run.losses[0] - 0.3 and min(run.norms) > 0.5
        assert all(not torch.equal(run.weights[name], initial) for name, initial in run.initial.items())
