"""The simulator against formulas, and its array arithmetic against plain arithmetic."""

import numpy as np
import pytest

import paracomm.schedule.simulate as simulation
from paracomm.errors import InvalidArgument
from paracomm.schedule import build
from paracomm.schedule.registry import cases
from paracomm.schedule.simulate import Link, Topology, simulate, simulate_algorithm

ALPHA, BETA, GAMMA, S = 5e-6, 1e-10, 3e-11, 1 << 24


def time_of(collective: str, name: str, n: int, gamma: float = 0.0, **params: int) -> float:
    root = 0 if collective in ("broadcast", "reduce") else None
    return simulate_algorithm(collective, name, S, Topology.flat(n, ALPHA, BETA, gamma), root, **params).time_s


@pytest.mark.parametrize("n", [2, 3, 8, 17, 512])
def test_ring_formula(n: int) -> None:
    assert time_of("all_reduce", "ring", n) == pytest.approx(2 * (n - 1) * (ALPHA + BETA * S / n))
    assert time_of("all_gather", "ring", n) == pytest.approx((n - 1) * (ALPHA + BETA * S / n))
    with_gamma = 2 * (n - 1) * (ALPHA + BETA * S / n) + (n - 1) * GAMMA * S / n
    assert time_of("all_reduce", "ring", n, GAMMA) == pytest.approx(with_gamma)


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_doubling_formulas(n: int) -> None:
    k = n.bit_length() - 1
    assert time_of("all_reduce", "recursive_doubling", n) == pytest.approx(k * (ALPHA + BETA * S))
    assert time_of("all_reduce", "halving_doubling", n) == pytest.approx(2 * k * ALPHA + 2 * BETA * S * (n - 1) / n)
    assert time_of("broadcast", "binomial", n) == pytest.approx(k * (ALPHA + BETA * S))
    # A range of blocks that goes round n takes two messages.
    bandwidth = BETA * S * (n - 1) / n
    assert k * ALPHA + bandwidth <= time_of("all_gather", "bruck", n) * (1 + 1e-9) <= 2 * k * ALPHA + bandwidth


@pytest.mark.parametrize("n,pieces", [(2, 1), (5, 8), (9, 16)])
def test_chain_is_a_pipeline(n: int, pieces: int) -> None:
    expected = (n - 2 + pieces) * (ALPHA + BETA * S / pieces)
    assert time_of("broadcast", "chain", n, pieces=pieces) == pytest.approx(expected)
    assert time_of("reduce", "chain", n, pieces=pieces) == pytest.approx(expected)


@pytest.mark.parametrize("n", [2, 5, 9])
def test_direct_sends_one_message_at_a_time(n: int) -> None:
    assert time_of("all_to_all", "direct", n) == pytest.approx((n - 1) * (ALPHA + BETA * S / n))


@pytest.mark.parametrize("n", [2, 7, 16, 24])
def test_arrays_and_plain_arithmetic_agree(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = tuple(r // 4 for r in range(n))
    for topology in (
        Topology.flat(n, ALPHA, BETA, GAMMA),
        Topology(hosts, Link(1e-6, 1e-11), Link(ALPHA, BETA), GAMMA),
        Topology(hosts, Link(1e-6, 1e-11), Link(ALPHA, BETA), tuple(GAMMA * r for r in range(n)), shared_ports=False),
    ):
        for collective, name, root, params in cases(n):
            schedule = build(collective, name, n, root, **params)
            monkeypatch.setattr(simulation, "SMALL_BATCH", 6)
            fast = simulate(schedule, S, topology)
            streamed = simulate_algorithm(collective, name, S, topology, root, **params)
            monkeypatch.setattr(simulation, "SMALL_BATCH", 1 << 30)
            plain = simulate(schedule, S, topology)
            assert fast.time_s == streamed.time_s == pytest.approx(plain.time_s), (collective, name, params)
            assert np.allclose(fast.busy_s, plain.busy_s)
            assert fast.link_bytes == pytest.approx(plain.link_bytes)


def test_hosts_share_their_ports() -> None:
    """Ranks of a host that send to another host at the same time wait for each other."""
    hosts = (0, 0, 1, 1)
    own = simulate_algorithm("all_to_all", "direct", S, Topology(hosts, Link(0, 0), Link(0, BETA), shared_ports=False))
    shared = simulate_algorithm("all_to_all", "direct", S, Topology(hosts, Link(0, 0), Link(0, BETA)))
    assert shared.host_bytes == own.host_bytes == {(0, 1): S, (1, 0): S}
    assert own.time_s == pytest.approx(BETA * S * 3 / 4)
    assert shared.time_s == pytest.approx(BETA * S)


def test_one_slow_link_slows_a_ring_down() -> None:
    slow = Link(0.0, 10 * BETA)
    topology = Topology((0, 1, 2, 3), Link(0, 0), Link(0, BETA), links={(1, 2): slow})
    result = simulate_algorithm("all_reduce", "ring", S, topology)
    assert result.time_s == pytest.approx(6 * 10 * BETA * S / 4, rel=0.2)
    assert result.link_bytes[1, 2] == pytest.approx(2 * S * 3 / 4)
    assert result.busy_s[1] == pytest.approx(6 * 10 * BETA * S / 4)


def test_topology_must_fit() -> None:
    with pytest.raises(InvalidArgument, match="4 ranks"):
        simulate(build("all_reduce", "ring", 3), S, Topology.flat(4, ALPHA, BETA))
