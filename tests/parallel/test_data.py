"""Data parallelism by 2 and 3 processes: gradients equal one process's, and the cases where that is hard."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import Rank, run_ranks
from torch import nn

from paracomm.errors import Error, Mismatch
from paracomm.hooks.lane import keeps_order
from paracomm.models import GPT, GPTConfig, next_byte_loss
from paracomm.parallel import Bucket, DataParallel
from paracomm.parallel.bucket import all_reduce_hook
from tests.parallel.gloo_comm import GlooComm

BUCKET_BYTES = (1, 1000, 25 << 20)


def odd_model(dtype=torch.float64, seed=0):
    """Sizes that no vector or rank count divides."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 11), nn.Tanh(), nn.Linear(11, 1)).to(dtype)


def rows(comm, x):
    share = len(x) // comm.world_size
    return x[comm.rank * share : (comm.rank + 1) * share]


def expect_close(ours, expected, tolerance):
    for (name, a), b in zip(ours.named_parameters(), expected.parameters(), strict=True):
        error = (a.grad - b.grad).abs().max() / b.grad.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"


def expect_same_bits(comm, model):
    for name, parameter in model.named_parameters():
        everyone = comm.all_gather(parameter.grad.contiguous()).view(comm.world_size, -1)
        assert (everyone == everyone[0]).all(), name


def case_gradients_equal_one_process(comm):
    for bucket_bytes in BUCKET_BYTES:
        single = odd_model()
        parallel = DataParallel(copy.deepcopy(single), comm, bucket_bytes=bucket_bytes, first_bucket_bytes=1)
        for step in range(3):
            x = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            single.zero_grad()
            single(x).square().mean().backward()
            parallel.zero_grad()
            parallel(rows(comm, x)).square().mean().backward()
            parallel.finish()
            expect_close(parallel.module, single, 1e-14)
            expect_same_bits(comm, parallel.module)


def case_gpt_gradients_equal_one_process(comm):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        single = GPT(GPTConfig(width=24, depth=2, heads=3, context=17)).to(dtype)
        parallel = DataParallel(copy.deepcopy(single), comm, bucket_bytes=5000, first_bucket_bytes=1000)
        tokens = torch.randint(0, 256, (6, 18), generator=torch.Generator().manual_seed(1))
        next_byte_loss(single(tokens[:, :-1]), tokens[:, 1:]).backward()
        mine = rows(comm, tokens)
        next_byte_loss(parallel(mine[:, :-1]), mine[:, 1:]).backward()
        parallel.finish()
        expect_close(parallel.module, single, tolerance)
        expect_same_bits(comm, parallel.module)


def case_gradients_are_kept_where_they_are_zeroed_in_place(comm):
    parallel = DataParallel(odd_model(), comm, bucket_bytes=1000, first_bucket_bytes=500)
    seen = []
    for _ in range(2):
        parallel.zero_grad(set_to_none=False)
        parallel(torch.full((2, 7), comm.rank + 1.0).double()).sum().backward()
        parallel.finish()
        seen.append([(p.grad.data_ptr(), p.grad.clone()) for p in parallel.parameters()])
    for (first_address, first), (second_address, second) in zip(*seen, strict=True):
        assert first_address == second_address
        assert torch.equal(first, second)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(3, 3)
        self.branches = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.nobody = nn.Linear(3, 3)

    def forward(self, x, branch):
        return self.branches[branch](self.shared(x))


def case_parameters_without_gradient_take_part_as_zeros(comm):
    for bucket_bytes in BUCKET_BYTES:
        model = Branches().double()
        parallel = DataParallel(model, comm, bucket_bytes=bucket_bytes, first_bucket_bytes=1)
        expected = copy.deepcopy(model)
        for _ in range(2):
            parallel.zero_grad()
            parallel(torch.ones(1, 3).double(), comm.rank % 2).sum().backward()
            parallel.finish()
        expected.zero_grad()
        for rank in range(comm.world_size):
            (expected(torch.ones(1, 3).double(), rank % 2).sum() / comm.world_size).backward()
        for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
            wanted = torch.zeros_like(b) if b.grad is None else b.grad
            assert torch.allclose(a.grad, wanted, rtol=1e-14, atol=0), name
        expect_same_bits(comm, model)


def case_no_sync_accumulates(comm):
    single = odd_model()
    parallel = DataParallel(copy.deepcopy(single), comm, bucket_bytes=1000, first_bucket_bytes=500)
    for step in range(2):
        x = torch.randn(3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        single.zero_grad()
        parallel.zero_grad()
        for index, part in enumerate(x):
            single(part).square().mean().backward()
            if index < 2:
                with parallel.no_sync():
                    parallel(rows(comm, part)).square().mean().backward()
            else:
                parallel(rows(comm, part)).square().mean().backward()
        parallel.finish()
        expect_close(parallel.module, single, 1e-13)


def case_second_backward_before_finish_is_named(comm):
    parallel = DataParallel(odd_model(), comm)
    x = torch.ones(2, 7).double()
    parallel(x).sum().backward()
    try:
        parallel(x).sum().backward()
    except Error as error:
        assert "'4.bias'" in str(error) and "no_sync" in str(error), error
    else:
        raise AssertionError("no error")
    parallel.finish()


def case_different_parameters_are_named(comm):
    model = odd_model()
    if comm.rank == comm.world_size - 1:
        model[2] = nn.Linear(13, 12).double()
    try:
        DataParallel(model, comm)
    except Mismatch as error:
        assert "parameter 2" in str(error) and "2.weight" in str(error), error
    else:
        raise AssertionError("no error")


def case_different_number_of_parameters_is_named(comm):
    model = odd_model()
    if comm.rank == 0:
        model.append(nn.Linear(1, 1).double())
    try:
        DataParallel(model, comm)
    except Mismatch as error:
        assert "[8, 6" in str(error), error
    else:
        raise AssertionError("no error")


def case_everybody_starts_from_rank_0(comm):
    model = nn.Sequential(odd_model(seed=comm.rank), nn.BatchNorm1d(1))
    model[1].running_mean.fill_(comm.rank)
    model[0][0].weight = nn.Parameter(torch.randn(7, 13).double().t())  # not contiguous
    DataParallel(model, comm)
    for name, tensor in model.state_dict().items():
        everyone = comm.all_gather(tensor.contiguous()).view(comm.world_size, -1)
        assert (everyone == everyone[0]).all(), name
    assert model[1].running_mean.item() == 0


def case_mixed_dtypes_and_frozen_parameters(comm):
    model = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3).double(), nn.Linear(5, 3)])
    model[2].bias.requires_grad_(False)
    parallel = DataParallel(model, comm, bucket_bytes=1 << 20)
    assert sorted(str(bucket.data.dtype) for bucket in parallel.reducer.buckets) == ["torch.float32", "torch.float64"]
    x = torch.full((1, 5), comm.rank + 1.0)
    (model[0](x).double() + model[1](x.double()) + model[2](x)).sum().backward()
    parallel.finish()
    mean = (comm.world_size + 1) / 2
    for layer in model:
        assert torch.equal(layer.weight.grad, torch.full_like(layer.weight, mean))
    assert model[2].bias.grad is None


def case_buckets_leave_in_order_while_backward_goes_on(comm):
    launched = []

    @keeps_order
    def hook(state, bucket: Bucket):
        launched.append((bucket.index(), [b.missing for b in parallel.reducer.buckets]))
        all_reduce_hook(state, bucket).wait()
        future = torch.futures.Future()
        future.set_result(bucket.data)
        return future

    parallel = DataParallel(odd_model(), comm, bucket_bytes=1, first_bucket_bytes=1, hook=hook)
    parallel(torch.ones(2, 7).double()).sum().backward()
    parallel.finish()
    assert [index for index, _ in launched] == list(range(len(parallel.reducer.buckets)))
    assert launched[0][1][-1] > 0, "the first bucket waited for the last"
    expect_same_bits(comm, parallel.module)


CASES = {name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")}


def on_rank(rank: Rank, case: str, kind: str) -> None:
    comm = GlooComm() if kind == "gloo" else rank.connect()
    try:
        CASES[case](comm)
    finally:
        comm.close()


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("kind", ["paracomm", "gloo"])
@pytest.mark.parametrize("case", CASES)
def test_ranks(case, kind, world_size):
    run_ranks(world_size, on_rank, case, kind)
