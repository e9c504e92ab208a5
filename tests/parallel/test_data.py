"""Data parallelism by 2 and 3 processes: gradients equal one process's, and the cases where that is hard."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from ranks import Rank, run_ranks
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from paracomm.errors import Error, InvalidArgument, Mismatch
from paracomm.hooks.lane import keeps_order
from paracomm.models import GPT, GPTConfig, next_byte_loss
from paracomm.parallel import Bucket, DataParallel, Mesh, Pipeline, parallelize
from paracomm.parallel.bucket import all_reduce_hook
from paracomm.parallel.shard import gather_parameter, partial_of, shard_of
from paracomm.pipeline import build
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


# --- what is done to a wrapped module behind its back, over ZeRO 0 to 3 ---
class Blocks(nn.Module):
    """With a buffer, and units for ZeRO 3."""

    def __init__(self, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x).tanh()
        return self.out(self.norm(x))


LAYOUTS = [*((zero, None) for zero in range(4)), *((zero, "bfloat16") for zero in (0, 1, 3))]


def wrapped(comm, zero, precision=None, model=None, kind=torch.optim.SGD, **options):
    model = Blocks() if model is None else model
    parallel = DataParallel(model, comm, zero=zero, precision=precision, bucket_bytes=250, first_bucket_bytes=100)
    return parallel, parallel.optimizer(kind, lr=0.1, **options)


def inputs(step):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))


def one_step(parallel, optimizer, comm, step=0, between=lambda: None):
    optimizer.zero_grad()
    parallel(rows(comm, inputs(step))).float().square().mean().backward()
    parallel.finish()
    between()
    optimizer.step()


def whole(parallel):
    with parallel.gathered():
        return [parameter.detach().float().clone() for parameter in parallel.module.parameters()]


def single_steps(steps, before=lambda model: None, between=lambda model: None, kind=torch.optim.SGD, **options):
    """Weights on one process; `before` is done to the model after its first step, `between` to the gradients."""
    model = Blocks()
    optimizer = kind(model.parameters(), lr=0.1, **options)
    for step in range(steps):
        if step == 1:
            with torch.no_grad():
                before(model)
        optimizer.zero_grad()
        model(inputs(step)).square().mean().backward()
        between(model)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def expect_weights(parallel, expected, bound):
    for mine, theirs in zip(whole(parallel), expected, strict=True):
        assert float((mine - theirs).abs().max()) <= bound


def rebind(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def swap_in_place(model):
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter.data, parameter.data.clone())
        parameter.set_(parameter.clone())


def write(model):
    model.out.weight.mul_(2)
    model.out.bias.data.fill_(0.25)
    nn.init.constant_(model.blocks[1].weight, 0.125)


def assigned(model):
    state = {name: value.clone() * 2 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def doubled(model):
    for parameter in model.parameters():
        parameter.mul_(2)


def transposed(model):
    weight = model.blocks[0].weight
    weight.data = weight.data.t()  # square: the same address, other strides


def changes_are_taken_up(rank: Rank):
    comm = rank.connect()
    for zero, precision in LAYOUTS:
        for change, reference in (
            (rebind, rebind), (swap_in_place, rebind), (write, write), (transposed, transposed), (assigned, doubled)
        ):  # fmt: skip
            parallel, optimizer = wrapped(comm, zero, precision)
            one_step(parallel, optimizer, comm)
            with torch.no_grad(), contextlib.nullcontext() if change is assigned else parallel.gathered():
                change(parallel.module)
            for step in (1, 2):
                one_step(parallel, optimizer, comm, step)
            expect_weights(parallel, single_steps(3, reference), 1e-6 if precision is None else 0.03)
        if zero < 3:  # no need of gathered()
            parallel, optimizer = wrapped(comm, zero, precision)
            one_step(parallel, optimizer, comm)
            with torch.no_grad():
                write(parallel.module)
            for step in (1, 2):
                one_step(parallel, optimizer, comm, step)
            expect_weights(parallel, single_steps(3, write), 1e-6 if precision is None else 0.03)

    masters_stay(comm)


def masters_stay(comm):
    """What lies beside a written weight keeps its float32 value."""
    for zero in range(4):
        parallel, optimizer = wrapped(comm, zero, "bfloat16")
        one_step(parallel, optimizer, comm)
        before = {name: s["master"] for name, s in copy.deepcopy(optimizer.state_dict()["state"]).items()}
        with parallel.gathered(), torch.no_grad():
            parallel.module.out.weight[0, 0] = 2.0
        after = {name: s["master"] for name, s in optimizer.state_dict()["state"].items()}
        before["out.weight"][0, 0] = 2.0
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_written_to_parameters_is_taken_up():
    run_ranks(2, changes_are_taken_up)


def replaced(model):
    model.out.weight = nn.Parameter(torch.zeros(2, 6))


def tied_afterwards(model):
    model.blocks[1].weight = model.blocks[0].weight


def frozen(model):
    model.out.weight.requires_grad_(False)


def unfrozen(model):
    model.blocks[2].bias.requires_grad_(True)


def grown(model):
    model.out.register_parameter("scale", nn.Parameter(torch.ones(2)))


def dropped(model):
    model.norm, model.out = model.out, nn.Identity()
    model.norm = nn.Linear(6, 2).requires_grad_(False)


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.out)


def converted(model):
    model.double()


def released_values(model):
    model.out.weight.data = torch.ones(2, 6)


def released_write(model):
    model.out.weight.data.fill_(1.0)


def changes_are_named(rank: Rank):
    comm = rank.connect()
    for zero in range(4):
        for change, name in (
            (replaced, "out.weight"), (tied_afterwards, "blocks.1.weight"), (frozen, "out.weight"),
            (unfrozen, "blocks.2.bias"), (grown, "out.scale"), (dropped, r"out.(weight|bias)"),
            (converted, r"out.bias"), (parametrized, r"out.parametrizations.weight.original0"),
        ):  # fmt: skip
            model = Blocks()
            model.blocks[2].bias.requires_grad_(False)
            parallel, optimizer = wrapped(comm, zero, model=model)
            one_step(parallel, optimizer, comm)
            if change is parametrized and zero == 3:
                with parallel.gathered():
                    change(parallel.module)
            else:
                change(parallel.module)
            with pytest.raises(InvalidArgument, match=f"parameter '{name}'"):
                one_step(parallel, optimizer, comm)
        for change in (released_values, released_write) if zero == 3 else ():
            parallel, optimizer = wrapped(comm, zero)
            change(parallel.module)
            with pytest.raises(Error, match=r"'out.weight' was written to while ZeRO 3 had released it.*gathered\(\)"):
                one_step(parallel, optimizer, comm)


def test_what_cannot_be_taken_up_is_named():
    run_ranks(2, changes_are_named)


def clip_norm(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def clip_largest(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.001, norm_type=math.inf)


def clip_value(model):
    nn.utils.clip_grad_value_(model.parameters(), 0.003)


def scale_gradients(model):
    for parameter in model.parameters():
        parameter.grad = parameter.grad * 0.5
        parameter.grad *= 0.5
    model.out.bias.grad = model.out.bias.grad * 0
    model.out.weight.grad = torch.full_like(model.out.weight, 0.01)


def drop_gradients(model):
    for parameter in model.parameters():
        parameter.grad = None


def gradients_are_torchs(rank: Rank):
    comm = rank.connect()
    for zero, precision in LAYOUTS:
        changes = (clip_norm, clip_largest, clip_value, scale_gradients, drop_gradients)
        for change in changes if precision is None else changes[:4:3]:
            parallel, optimizer = wrapped(comm, zero, precision, kind=torch.optim.AdamW, eps=1e-3)
            for step in range(2):
                one_step(parallel, optimizer, comm, step, lambda p=parallel, change=change: change(p.module))
            expected = single_steps(2, between=change, kind=torch.optim.AdamW, eps=1e-3)
            expect_weights(parallel, expected, 1e-6 if precision is None else 0.02)


def test_gradients_are_what_torchs_functions_take_them_for():
    run_ranks(2, gradients_are_torchs)


def gradients_are_refused(rank: Rank):
    comm = rank.connect()
    for zero in range(4):
        parallel, optimizer = wrapped(comm, zero)

        def drop_one(parallel=parallel):
            parallel.module.out.bias.grad = None

        with pytest.raises(InvalidArgument, match=r"gradient of 'out.bias' was set to None"):
            one_step(parallel, optimizer, comm, between=drop_one)
        parallel(inputs(0)).sum().backward()
        with pytest.raises(Error, match=r"call finish\(\) after backward"):
            optimizer.step()
        parallel.finish()
        if zero:
            for kind in (torch.optim.SGD, torch.optim.AdamW, Lamb):
                by_hand = kind(parallel.module.parameters(), lr=0.1)
                with pytest.raises(InvalidArgument, match=r"'blocks.0.weight'.*parallel.optimizer"):
                    one_step(parallel, by_hand, comm)
            with pytest.raises(InvalidArgument, match=r"sum of the gradient of 'out.bias'"):
                parallel.module.out.bias.grad.sum()
        else:
            by_hand = torch.optim.SGD(parallel.module.parameters(), lr=0.1)
            one_step(parallel, by_hand, comm)


def test_what_a_part_of_a_gradient_cannot_give_is_refused():
    run_ranks(2, gradients_are_refused)


# --- optimizers ---
class Lamb(torch.optim.Optimizer):
    """Its core: a step of the weight's own size."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    ratio = parameter.norm() / parameter.grad.norm().clamp(min=1e-6)
                    parameter.add_(parameter.grad * ratio, alpha=-group["lr"])


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


def optimizers(rank: Rank):
    comm = rank.connect()
    for zero in range(4):
        with pytest.raises(InvalidArgument, match=r"Lamb may look at.*elementwise=True.*zero=0"):
            wrapped(comm, zero, kind=Lamb)
        parallel, optimizer = wrapped(comm, zero, kind=Lion, elementwise=True)
        one_step(parallel, optimizer, comm)
        expect_weights(parallel, single_steps(1, kind=Lion), 1e-6)
        with pytest.raises(InvalidArgument, match=r"add_param_group: .*optimizer\(kind, groups\)"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
        for groups in (
            parallel.module.parameters(), parallel.module.named_parameters(), [{"params": parallel.module.parameters()}]
        ):  # fmt: skip
            parallel, optimizer = wrapped(comm, zero, groups=None)
            optimizer = parallel.optimizer(torch.optim.SGD, list(_of(groups, parallel)), lr=0.1)
            one_step(parallel, optimizer, comm)
            expect_weights(parallel, single_steps(1), 1e-6)
        with pytest.raises(InvalidArgument, match="expected 'params'"):
            parallel.optimizer(torch.optim.SGD, [{"lr": 0.1}])

        def closure(parallel=parallel, optimizer=optimizer):
            optimizer.zero_grad()
            loss = parallel(rows(comm, inputs(1))).square().mean()
            loss.backward()
            parallel.finish()
            return loss

        assert float(optimizer.step(closure).detach()) > 0
        expect_weights(parallel, single_steps(2), 1e-6)
        scaled(comm, zero)


def _of(groups, parallel):
    """The same kind of groups, of this module."""
    if isinstance(groups, list):
        return [{"params": parallel.module.parameters()}]
    first = next(groups)
    return parallel.module.named_parameters() if isinstance(first, tuple) else parallel.module.parameters()


def scaled(comm, zero):
    """GradScaler: a step as without, and none anywhere where one rank has overflown."""
    parallel, optimizer = wrapped(comm, zero)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        x = rows(comm, inputs(step)) * (math.inf if step == 2 and comm.rank == 1 else 1)
        optimizer.zero_grad()
        scaler.scale(parallel(x).square().mean()).backward()
        parallel.finish()
        if step:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0
    expect_weights(parallel, single_steps(2), 1e-6)


def test_optimizers_as_torch_takes_them():
    run_ranks(2, optimizers)


# --- averages, copies, buffers ---
def averages(rank: Rank):
    comm = rank.connect()
    for zero, precision in LAYOUTS:
        for decay in (0.9, None) if precision is None else (0.9,):
            parallel, optimizer = wrapped(comm, zero, precision)
            average = parallel.average(decay)
            single, expected = Blocks(), None
            sgd = torch.optim.SGD(single.parameters(), lr=0.1)
            theirs = AveragedModel(single, avg_fn=None if decay is None else get_ema_avg_fn(decay))
            for step in range(3):
                one_step(parallel, optimizer, comm, step)
                average.update()
                sgd.zero_grad()
                single(inputs(step)).square().mean().backward()
                sgd.step()
                theirs.update_parameters(single)
            expected = [parameter.detach() for parameter in theirs.module.parameters()]
            before = whole(parallel)
            with average.applied():
                expect_weights(parallel, expected, 1e-6 if precision is None else 0.01)
            assert all(torch.equal(a, b) for a, b in zip(whole(parallel), before, strict=True))
            saved = average.state_dict()
            other = wrapped(comm, (zero + 1) % 4, precision)[0].average(decay)
            other.load_state_dict(saved)
            assert other.updates == 3
            assert all(torch.equal(a, b) for a, b in zip(
                saved["average"].values(), other.state_dict()["average"].values(), strict=True))  # fmt: skip
        with pytest.raises(InvalidArgument, match=r"parallel.average\(decay\)"):
            copy.deepcopy(parallel)
        if zero == 3:
            with pytest.raises(InvalidArgument, match=r"parallel.average\(decay\)"):
                AveragedModel(parallel.module)
        elif precision is None:
            copied = AveragedModel(parallel.module)
            copied.update_parameters(parallel.module)
            for a, b in zip(copied.module.parameters(), before, strict=True):
                assert torch.equal(a, b)
            copied.module.load_state_dict(Blocks().state_dict())
            assert all(torch.equal(a, b) for a, b in zip(whole(parallel), before, strict=True))
    with pytest.raises(InvalidArgument, match="decay is 2"):
        parallel.average(2)


def test_averages_of_the_weights_are_right_in_every_layout():
    run_ranks(2, averages)


def buffers(rank: Rank):
    comm = rank.connect()
    for zero in range(4):
        for switched in (True, False) if zero == 0 else (True,):
            model = Blocks(norm=True)
            model.register_buffer("table", torch.arange(3.0).add(comm.rank).expand(4, 3))
            model.register_buffer("phases", torch.polar(torch.ones(3), torch.arange(3.0) + comm.rank).conj())
            model.register_buffer("flag", torch.tensor([comm.rank > 0]))
            parallel = DataParallel(model, comm, zero=zero, broadcast_buffers=switched)
            optimizer = parallel.optimizer(torch.optim.SGD, lr=0.1)
            assert torch.equal(model.table, torch.arange(3.0).expand(4, 3)) and not model.flag
            assert torch.equal(model.phases, torch.polar(torch.ones(3), torch.arange(3.0)).conj())
            theirs = Blocks(norm=True)
            ddp = torch.nn.parallel.DistributedDataParallel(theirs)
            sgd = torch.optim.SGD(theirs.parameters(), lr=0.1)
            for step in range(2):
                one_step(parallel, optimizer, comm, step)
                sgd.zero_grad()
                ddp(rows(comm, inputs(step))).square().mean().backward()
                sgd.step()
            means = comm.all_gather(model.norm.running_mean)
            assert torch.equal(means[0], means[1]) == switched
            if switched:
                rank_0s = theirs.norm.running_mean.clone()
                torch.distributed.broadcast(rank_0s, src=0)
                assert float((model.norm.running_mean - rank_0s).abs().max()) < 1e-6
                assert model.norm.num_batches_tracked == 2
    model.register_buffer("windows", torch.zeros(6).unfold(0, 3, 1))
    with pytest.raises(InvalidArgument, match="'windows' has elements that share memory"):
        DataParallel(model, comm)


def with_gloo(rank: Rank):
    gloo = GlooComm()
    try:
        buffers(rank)
    finally:
        gloo.close()


def test_buffers_are_rank_0s_as_in_torchs_ddp():
    run_ranks(2, with_gloo)


# --- tensor parallelism ---
def on_tp(rank: Rank):
    comm = rank.connect()
    for dp in (1, 2) if comm.world_size == 4 else (1,):
        for zero in range(4):
            tensor_parallel(comm, dp, zero)
    if comm.world_size == 2:
        in_a_pipeline(comm)


def in_a_pipeline(comm):
    """A rank does not see the gradients of other stages: torch's norm is refused, what goes by element is not."""
    for zero in (0, 3):
        mesh = Mesh(comm, pp=2)
        model = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))
        schedule = build("1f1b", ranks=2, microbatches=4)
        pipeline = Pipeline(model, mesh, schedule, first=[0, 2], loss=nn.functional.mse_loss, zero=zero)
        optimizer, average = pipeline.optimizer(torch.optim.SGD, lr=0.1), pipeline.average(0.5)
        pipeline.forward_backward({"input": torch.ones(8, 16), "target": torch.ones(8, 4)}, divisor=4)
        pipeline.finish()
        with pytest.raises(InvalidArgument, match=r"norm of the gradient of .*parallel.clip_\(max_norm\)"):
            nn.utils.clip_grad_norm_(pipeline.parameters(), 1.0)
        nn.utils.clip_grad_value_(pipeline.parameters(), 1e-3)
        assert pipeline.clip_(1.0) <= 1.0001e-3 * sum(parameter.numel() for parameter in model.parameters()) ** 0.5
        optimizer.step()
        average.update()
        with average.applied():
            assert all(part.module.state_dict() for part in pipeline.parts)
        mesh.close()


def tensor_parallel(comm, dp, zero):
    mesh = Mesh(comm, dp=dp, tp=comm.world_size // dp)
    config = GPTConfig(width=24, depth=2, heads=4, context=8)
    single = GPT(config, seed=0)
    model = parallelize(GPT(config, seed=0), mesh)
    twin = copy.deepcopy(model)
    assert [(shard_of(p), partial_of(p)) for p in twin.parameters()] == [
        (shard_of(p), partial_of(p)) for p in model.parameters()
    ]
    tokens = torch.randint(0, 256, (4, 9), generator=torch.Generator().manual_seed(1))
    parallel = DataParallel(model, mesh, zero=zero)
    optimizer = parallel.optimizer(torch.optim.SGD, lr=0.1)
    reference = torch.optim.SGD(single.parameters(), lr=0.1)
    average, averaged = parallel.average(0.5), None
    theirs = AveragedModel(single, avg_fn=get_ema_avg_fn(0.5))
    if zero < 3:
        averaged = AveragedModel(parallel.module, avg_fn=get_ema_avg_fn(0.5))
    for _ in range(3):
        optimizer.zero_grad()
        mine = mesh.shard_rows(tokens)
        next_byte_loss(parallel(mine[:, :-1]), mine[:, 1:]).backward()
        parallel.finish()
        reference.zero_grad()
        next_byte_loss(single(tokens[:, :-1]), tokens[:, 1:]).backward()
        expected = nn.utils.clip_grad_norm_(single.parameters(), 0.5)
        found = nn.utils.clip_grad_norm_(parallel.module.parameters(), 0.5)
        assert abs(float(found / expected) - 1) < 1e-5
        nn.utils.clip_grad_value_(single.parameters(), 0.01)
        nn.utils.clip_grad_value_(parallel.module.parameters(), 0.01)
        optimizer.step()
        reference.step()
        average.update()
        theirs.update_parameters(single)
        if averaged is not None:
            averaged.update_parameters(parallel.module)
    with average.applied(), parallel.gathered():
        for (name, p), q in zip(parallel.module.named_parameters(), theirs.module.parameters(), strict=True):
            assert float((gather_parameter(p, mesh) - q).abs().max()) < 1e-5, name
            if averaged is not None:
                own = averaged.module.get_parameter(name)
                assert shard_of(own) == shard_of(p)
                assert float((gather_parameter(own, mesh) - q).abs().max()) < 1e-5, name
    if averaged is not None:
        assert averaged(tokens[:, :-1]).shape == (4, 8, 256)
    by_hand = Lamb(parallel.module.parameters(), lr=0.1)
    with pytest.raises(InvalidArgument, match="Lamb"):
        by_hand.step()
    if zero == 0:
        torch.optim.AdamW(parallel.module.parameters(), lr=0.1).step()
    mesh.close()


def test_torchs_tools_on_a_tensor_parallel_model():
    run_ranks(2, on_tp)


@pytest.mark.slow
def test_torchs_tools_on_tensor_and_data_parallelism():
    run_ranks(4, on_tp)
