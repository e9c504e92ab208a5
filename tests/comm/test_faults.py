"""A rank is killed or stopped: the others raise in time, and say who, where and in what. More: bench/faults.py."""

from __future__ import annotations

import random

import pytest

from bench.faults import TRANSPORTS, Trial, make_trials, run_trial


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_survivors_raise(fault: str, transport: str) -> None:
    trial = Trial(7, fault, transport, world_size=4, victim=2, delay_s=0.05, loaders=fault == "kill")
    assert run_trial(trial).troubles == []


@pytest.mark.parametrize("number", range(6))
def test_random_kills(number: int) -> None:
    trial = random.Random(number).choice(make_trials(24, 0, 0, seed=number))
    assert run_trial(trial).troubles == []
