"""The reducer in one process: how parameters are grouped, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from paracomm.errors import Error, InvalidArgument
from paracomm.hooks import local_sgd_hook
from paracomm.parallel import Reducer
from paracomm.parallel.bucket import ALIGN, plan_buckets
from paracomm.parallel.shard import Shard


class Done:
    def wait(self):
        pass


class OneRank:
    """A communicator of one rank that remembers what it was asked."""

    rank, world_size = 0, 1

    def __init__(self):
        self.reduced = []
        self.allocated = []

    def all_reduce(self, x, op="sum", *, async_op=False):
        self.reduced.append((x.numel(), op))
        return Done()

    def empty(self, shape, dtype):
        x = torch.full(shape, torch.nan, dtype=dtype)
        self.allocated.append(x.data_ptr())
        return x


@given(
    counts=st.lists(st.tuples(st.integers(0, 300), st.sampled_from([torch.float32, torch.float64])), min_size=1),
    bucket_bytes=st.integers(1, 2000),
    first_bucket_bytes=st.integers(1, 500),
)
def test_every_parameter_is_in_one_bucket(counts, bucket_bytes, first_bucket_bytes):
    named = [(str(i), nn.Parameter(torch.empty(count, dtype=dtype))) for i, (count, dtype) in enumerate(counts)]
    groups = plan_buckets(named, bucket_bytes, first_bucket_bytes)
    assert sorted(int(name) for group in groups for name, _ in group) == list(range(len(named)))
    for index, group in enumerate(groups):
        assert len({p.dtype for _, p in group}) == 1
        order = [int(name) for name, _ in group]
        assert order == sorted(order, reverse=True)
        limit = max(bucket_bytes, first_bucket_bytes) if index else max(first_bucket_bytes, bucket_bytes)
        assert len(group) == 1 or sum(p.nbytes for _, p in group) <= limit
    for dtype in {dtype for _, dtype in counts}:
        order = [int(name) for group in groups for name, p in group if p.dtype == dtype]
        assert order == sorted(order, reverse=True)


def test_the_first_bucket_is_small():
    named = [(str(i), nn.Parameter(torch.empty(100))) for i in range(10)]
    groups = plan_buckets(named, bucket_bytes=1600, first_bucket_bytes=400)
    assert [len(group) for group in groups] == [1, 4, 4, 1]


@pytest.mark.parametrize("rows", [26, 27])
def test_other_groups_are_cut_alike_whatever_a_shard_is(rows):
    """Two ranks of tp, whose rows of a vocabulary differ, reduce the norms together."""
    sizes = {"norm.a": 100, "norm.b": 100, "shard.a": 100, "shard.b": rows}
    named = [(name, nn.Parameter(torch.empty(size))) for name, size in sizes.items()]
    groups = plan_buckets(named, 800, 4 * 126, lambda name, parameter: name.split(".")[0])
    assert [[name for name, _ in group] for group in groups if group[0][0].startswith("norm")] == [["norm.b", "norm.a"]]


def test_a_hook_is_told_of_the_last_bucket_that_it_sees():
    first, second, whole = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), OneRank()
    seen = []

    def hook(state, bucket):
        seen.append((bucket.parameters(), bucket.is_last()))
        return Done()

    named = [("first", first.weight), ("second", second.weight)]
    other = OneRank()
    reducer = Reducer(named, whole, hook=hook, comm_of=lambda p: other if p is first.weight else whole)
    second(first(torch.ones(1, 3))).sum().backward()
    reducer.finish()
    assert [last for _, last in seen] == [True] and seen[0][0][0] is second.weight
    assert [bucket.members[0] is first.weight for bucket in reducer.buckets] == [False, True]


def test_a_hook_sees_shards_apart_from_what_all_ranks_of_tp_hold():
    model = nn.Linear(3, 3)
    model.weight.shard = Shard(0, 0, 3, 6)
    hook = lambda state, bucket: Done()  # noqa: E731
    assert len(Reducer(model.named_parameters(), OneRank(), hook=hook).buckets) == 2
    reducer = Reducer(model.named_parameters(), OneRank())
    assert len(reducer.buckets) == 1
    with pytest.raises(InvalidArgument, match="this hook comes too late"):
        reducer.set_hook(hook)


@pytest.mark.parametrize(("options", "reason"), [({"zero": 1}, "no ZeRO 1"), (
    {"precision": torch.bfloat16}, "no mixed precision")])  # fmt: skip
def test_local_sgd_refuses_what_needs_one_model(options, reason):
    with pytest.raises(InvalidArgument, match=f"local SGD takes {reason}"):
        Reducer(nn.Linear(3, 3).named_parameters(), OneRank(), hook=local_sgd_hook, state=None, **options)


def test_gradients_are_views_into_buckets_of_the_communicator():
    model, comm = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), OneRank()
    reducer = Reducer(model.named_parameters(), comm)
    assert comm.allocated == [bucket.data.data_ptr() for bucket in reducer.buckets]
    model(torch.ones(1, 3)).sum().backward()
    reducer.finish()
    (bucket,) = reducer.buckets
    for parameter in model.parameters():
        assert parameter.grad.untyped_storage().data_ptr() == bucket.data.untyped_storage().data_ptr()
    assert comm.reduced == [(bucket.count, "avg")]
    assert [offset % ALIGN for offset in bucket.offsets] == [0] * 4
    for parameter, view in zip(bucket.members, bucket.gradients(), strict=True):
        assert torch.equal(parameter.grad, view)
        view.zero_()
    assert not bucket.data.any(), "a gap is not zero"


def test_finish_without_backward_gives_zeros():
    model = nn.Linear(3, 5)
    Reducer(model.named_parameters(), OneRank()).finish()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_a_failed_bucket_is_raised_and_the_next_step_works():
    class Fails:
        def wait(self):
            raise Error("lost")

    model, fails = nn.Linear(3, 5), [True]
    reducer = Reducer(model.named_parameters(), OneRank(), hook=lambda _, __: Fails() if fails[0] else Done())
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(Error, match="lost"):
        reducer.finish()
    fails[0] = False
    model(torch.ones(1, 3)).sum().backward()
    reducer.finish()


def test_hooks_are_taken_off():
    model, comm = nn.Linear(3, 5), OneRank()
    Reducer(model.named_parameters(), comm).remove()
    model(torch.ones(1, 3)).sum().backward()
    assert comm.reduced == []


def test_sparse_gradients_are_refused_by_name():
    model = nn.Embedding(4, 2, sparse=True)
    Reducer([("table", model.weight)], OneRank())
    with pytest.raises(InvalidArgument, match="'table'"):
        model(torch.tensor([1])).sum().backward()


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-1, 5)])
def test_bucket_sizes_below_one_are_refused(sizes):
    with pytest.raises(InvalidArgument, match="bucket sizes"):
        Reducer(nn.Linear(1, 1).named_parameters(), OneRank(), bucket_bytes=sizes[0], first_bucket_bytes=sizes[1])


def test_a_model_without_gradients_is_refused():
    with pytest.raises(InvalidArgument, match="no parameter"):
        Reducer(nn.Linear(1, 1).requires_grad_(False).named_parameters(), OneRank())
