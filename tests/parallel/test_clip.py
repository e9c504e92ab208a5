"""The global norm: exact, equal in every layout, each element once, and what is not finite is found."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Rank, run_ranks
from torch import nn

from paracomm.errors import Error, InvalidArgument
from paracomm.parallel import DataParallel
from paracomm.parallel.clip import _pieces, _sums
from paracomm.parallel.mesh import Mesh
from paracomm.parallel.shard import Shard, mark


def norm_of(x, cuts=()):
    exponent = math.frexp(float(x.abs().max()))[1]
    edges = [0, *cuts, len(x)]
    sums = [_sums([x[a:b]], exponent) for a, b in itertools.pairwise(edges)]
    return tuple(map(sum, zip(*sums, strict=True)))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), cut=st.integers(0, 50000), spread=st.integers(0, 30))
def test_sums_do_not_depend_on_how_elements_lie(seed, cut, spread):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50000, generator=generator) * 2.0 ** -torch.randint(0, spread + 1, (50000,), generator=generator)
    shuffled = x[torch.randperm(50000, generator=generator)]
    assert norm_of(x) == norm_of(shuffled, [cut])


@given(st.lists(st.integers(-(2**90), 2**90), min_size=1, max_size=5))
def test_pieces_add_up(sums):
    added = [sum(column) for column in zip(*(_pieces(s) for s in sums), strict=True)]
    assert sum(piece << (31 * k) for k, piece in enumerate(added)) == sum(sums)


class Values(nn.Module):
    def __init__(self, *values):
        super().__init__()
        self.values = nn.ParameterList(nn.Parameter(torch.zeros_like(value)) for value in values)

    def forward(self, *gradients):
        return sum((p * g).sum() for p, g in zip(self.values, gradients, strict=True))


def norms(rank: Rank, values):
    comm = rank.connect()
    found = []
    for zero in range(4):
        for bucket_bytes in (1, 1 << 20):
            parallel = DataParallel(Values(*values), comm, zero=zero, bucket_bytes=bucket_bytes, average=False)
            parallel(*(value * (comm.rank == 1) for value in values)).backward()
            parallel.finish()
            found.append(parallel.clip_(1e-3))
            again = parallel.clip_(1.0)
            assert abs(again - 1e-3) < 1e-8 or found[-1] == 0, again
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_equal_the_exact_one(dtype):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=generator, dtype=dtype) * s for n, s in ((7, 1.0), (2000, 1e-4), (333, 1e3))]
    exact = math.sqrt(math.fsum(float(v) ** 2 for value in values for v in value))
    (found,) = {tuple(each) for each in run_ranks(3, norms, values)}
    assert len(set(found)) == 1
    assert abs(found[0] / exact - 1) < 1e-15


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-300, 1e300])
def test_norms_of_the_smallest_and_the_largest(size):
    values = [torch.tensor([3 * size, 4 * size], dtype=torch.float64)]
    (found,) = {tuple(each) for each in run_ranks(2, norms_only, values)}
    assert set(found) == {size * 5} or abs(found[0] / (size * 5) - 1) < 1e-15


def norms_only(rank: Rank, values):
    comm = rank.connect()
    parallel = DataParallel(Values(*values), comm)
    parallel(*values).backward()
    parallel.finish()
    return [parallel.clip_(1e308)]


def not_finite(rank: Rank, value):
    comm = rank.connect()
    for zero in (0, 2):
        parallel = DataParallel(Values(torch.zeros(5), torch.zeros(100)), comm, zero=zero)
        gradient = torch.ones(100)
        if comm.rank == 1:
            gradient[77] = value
        parallel(torch.ones(5), gradient).backward()
        parallel.finish()
        with pytest.raises(Error, match=r"'values.1' is not finite, rank \d of 2"):
            parallel.clip_(1.0)
    with pytest.raises(InvalidArgument, match="max_norm is 0"):
        parallel = DataParallel(Values(torch.zeros(5)), comm)
        parallel(torch.ones(5)).backward()
        parallel.finish()
        parallel.clip_(0)
    with pytest.raises(Error, match="before the first finish"):
        DataParallel(Values(torch.zeros(5)), comm, zero=1).clip_(1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named_on_every_rank(value):
    run_ranks(2, not_finite, value)


def on_mesh(rank: Rank):
    """A shard, a whole parameter, and one whose gradient is a part on each rank of tp."""
    comm = rank.connect()
    found = []
    with Mesh(comm, dp=2, tp=2) as mesh:
        for zero in range(4):
            model = Values(torch.zeros(3), torch.zeros(70), torch.zeros(2))
            mark(model.values[0], Shard(0, 3 * mesh.index("tp"), 3, 6))
            mark(model.values[2], partial=("tp",))
            parallel = DataParallel(model, mesh, zero=zero)
            optimizer = parallel.optimizer(torch.optim.SGD, lr=1.0)
            tp, dp = mesh.index("tp"), mesh.index("dp")
            parallel(torch.full((3,), 1.0 + tp + 2 * dp), torch.full((70,), 2.0 * dp), torch.ones(2) + tp).backward()
            parallel.finish()
            found.append(parallel.clip_(1e9))
            optimizer.step()
            state = parallel.module.state_dict()
            assert torch.equal(state["values.0"], torch.full((3,), -2.0 - tp))
            assert torch.equal(state["values.1"], torch.full((70,), -1.0))
            assert torch.equal(state["values.2"], torch.full((2,), -3.0))
    return found


def test_each_element_of_a_mesh_counts_once():
    exact = math.sqrt(3 * (2**2 + 3**2) + 70 * 1**2 + 2 * 3**2)
    for found in run_ranks(4, on_mesh):
        assert set(found) == {exact}
