"""ZeRO: the same bits in every stage, with every size of buckets, and what it refuses."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from ranks import Rank, run_ranks
from torch import nn

from paracomm.errors import InvalidArgument
from paracomm.models.gpt import GPT, GPTConfig, next_byte_loss
from paracomm.parallel import DataParallel
from paracomm.parallel.recompute import recompute
from tests.parallel.gloo_comm import GlooComm

CONFIG = GPTConfig(width=24, depth=3, heads=3, context=9)
LAYOUTS = [
    {"zero": 0},
    {"zero": 0, "bucket_bytes": 5000, "overlap": False},
    {"zero": 1, "bucket_bytes": 5000},
    {"zero": 2, "bucket_bytes": 1, "overlap": False},
    {"zero": 2, "bucket_bytes": 20000},
    {"zero": 3},
    {"zero": 3, "bucket_bytes": 9000, "overlap": False},
    {"zero": 3, "bucket_bytes": 9000, "units": ["blocks.0", "blocks.2"]},
]


def decay(name, parameter):
    return {"weight_decay": 0.1 if parameter.dim() > 1 else 0.0}


def tokens(step, rows=12):
    return torch.randint(0, 256, (rows, CONFIG.context + 1), generator=torch.Generator().manual_seed(step))


def mine(comm, x):
    share = len(x) // comm.world_size
    return x[comm.rank * share : (comm.rank + 1) * share]


def loss_of(model, x):
    logits = model(x[:, :-1])
    return next_byte_loss(logits.float() if logits.dtype == torch.bfloat16 else logits, x[:, 1:])


def steps(comm, parallel, optimizer, first=0, count=4, accumulate=1):
    """Norms before clipping."""
    norms = []
    for step in range(first, first + count):
        optimizer.zero_grad()
        for index in range(accumulate):
            x = mine(comm, tokens(step * accumulate + index))
            if index + 1 < accumulate:
                with parallel.no_sync():
                    (loss_of(parallel, x) / accumulate).backward()
            else:
                (loss_of(parallel, x) / accumulate).backward()
        parallel.finish()
        norms.append(parallel.clip_(0.5))
        optimizer.step()
    return norms


def bits(*states):
    """A digest of nested dicts, lists, tensors and numbers."""
    sha = hashlib.sha256()

    def add(value):
        if isinstance(value, dict):
            for key in sorted(value):
                sha.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for each in value:
                add(each)
        elif isinstance(value, torch.Tensor):
            assert not value.isnan().any()
            sha.update(value.detach().contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else repr(
                float(value)).encode())  # fmt: skip
        else:
            sha.update(repr(value).encode())

    add(states)
    return sha.hexdigest()


def make(comm, precision=None, mode="none", **layout):
    model = GPT(CONFIG, seed=comm.rank)
    if mode != "none":
        recompute(model, mode)
    layout = {"bucket_bytes": 25 << 20} | layout
    parallel = DataParallel(model, comm, first_bucket_bytes=max(1, layout["bucket_bytes"] // 4), precision=precision,
                            **layout)  # fmt: skip
    return parallel, parallel.optimizer(torch.optim.AdamW, decay, lr=1e-2)


def digests(rank: Rank, layouts, precision=None, accumulate=1, mode="none"):
    comm = rank.connect()
    found = []
    for layout in layouts:
        parallel, optimizer = make(comm, precision, mode, **layout)
        norms = steps(comm, parallel, optimizer, accumulate=accumulate)
        found.append(bits(norms, parallel.module.state_dict(), optimizer.state_dict()))
    return found


@pytest.mark.parametrize("world_size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_stages_buckets_and_overlap_give_the_same_bits(world_size):
    everyones = run_ranks(world_size, digests, LAYOUTS)
    assert len({digest for found in everyones for digest in found}) == 1, everyones


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bfloat16_gives_the_same_bits_too(world_size):
    everyones = run_ranks(world_size, digests, [LAYOUTS[i] for i in (0, 2, 4, 6)], "bfloat16")
    assert len({digest for found in everyones for digest in found}) == 1, everyones


def test_recomputation_gives_the_same_bits():
    plain = run_ranks(2, digests, LAYOUTS[:1])
    assert run_ranks(2, digests, [LAYOUTS[0], LAYOUTS[6]], mode="full") == [[d, d] for (d,) in plain]


@pytest.mark.slow
def test_runs_repeat_themselves():
    assert run_ranks(3, digests, LAYOUTS[6:7]) == run_ranks(3, digests, LAYOUTS[6:7])


def accumulated(rank: Rank):
    comm = rank.connect()
    found, weights = [], []
    for layout in LAYOUTS:
        parallel, optimizer = make(comm, **layout)
        norms = steps(comm, parallel, optimizer, accumulate=3, count=3)
        state = parallel.module.state_dict()
        found.append((min(1, layout["zero"] // 2), bits(norms, state, optimizer.state_dict())))
        weights.append(copy.deepcopy(state))
    return found, max(float((a - b).abs().max()) for state in weights for a, b in zip(
        state.values(), weights[0].values(), strict=True))  # fmt: skip


def test_accumulation_before_and_after_the_reduction():
    """Stages 0 and 1 add before they reduce, 2 and 3 after: each pair has its own bits."""
    everyones = run_ranks(2, accumulated)
    assert len({digest for found, _ in everyones for digest in found}) == 2
    assert all(apart < 1e-3 for _, apart in everyones), everyones


def against_one_process(rank: Rank, layout, accumulate):
    comm = rank.connect()
    single = GPT(CONFIG).double()
    parallel = DataParallel(copy.deepcopy(single), comm, bucket_bytes=9000, **layout)
    optimizer = parallel.optimizer(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    expected = torch.optim.AdamW(single.parameters(), lr=1e-3, weight_decay=0.1)
    norms = steps(comm, parallel, optimizer, accumulate=accumulate)
    for step, norm in enumerate(norms):
        expected.zero_grad()
        for index in range(accumulate):
            (loss_of(single, tokens(step * accumulate + index)) / accumulate).backward()
        assert abs(float(nn.utils.clip_grad_norm_(single.parameters(), 0.5)) / norm - 1) < 1e-12
        expected.step()
    for (name, a), b in zip(parallel.module.state_dict().items(), single.state_dict().values(), strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-10, name


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_stage_equals_one_process(zero):
    run_ranks(3, against_one_process, {"zero": zero}, 2)


class Tangled(nn.Module):
    """Weights tied between blocks, a block that is read and never called, one that is called now and then."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.blocks[1].weight = self.blocks[0].weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x, branch):
        x = self.blocks[1](self.blocks[0](x).tanh()).tanh()
        x = x + nn.functional.linear(x, self.blocks[2].weight.t())  # nobody calls block 2
        x = self.frozen(x) * self.blocks[2].weight.mean()
        return self.blocks[3](x) if branch else x.sin()


def tangled(rank: Rank, stages, branches_differ):
    comm = rank.connect()
    found = []
    for zero in stages:
        torch.manual_seed(1)
        parallel = DataParallel(Tangled(), comm, zero=zero, bucket_bytes=1)
        optimizer = parallel.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
        for step in range(4):
            optimizer.zero_grad()
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + comm.rank))
            parallel(x, (step + comm.rank * branches_differ) % 2).square().sum().backward()
            with torch.no_grad():
                assert not parallel(x, True).isnan().any()
            parallel.finish()
            optimizer.step()
        found.append(bits(parallel.module.state_dict(), optimizer.state_dict()))
    return found


def test_tied_weights_and_weights_read_elsewhere():
    everyones = run_ranks(2, tangled, range(4), False)
    assert len({digest for found in everyones for digest in found}) == 1


def test_ranks_that_use_other_parameters():
    """Gathers of ZeRO 3 need the same units in the same order; reductions do not."""
    everyones = run_ranks(2, tangled, range(3), True)
    assert len({digest for found in everyones for digest in found}) == 1


def released(rank: Rank):
    comm = rank.connect()
    parallel, _ = make(comm, zero=3)
    loss_of(parallel, mine(comm, tokens(0))).backward()
    weight = parallel.module.blocks[0].mlp.up.weight
    shape, gone = weight.shape, weight.isnan().all()
    assert gone and shape == (96, 24) and weight.untyped_storage().nbytes() == 4
    parallel.finish()
    with parallel.gathered():
        whole = parallel.module.blocks[0].mlp.up.weight.clone()
    expected = GPT(CONFIG, seed=0).blocks[0].mlp.up.weight
    assert torch.equal(whole, expected)
    assert all(parameter.isnan().all() for parameter in parallel.module.parameters())


def test_released_parameters_hold_nothing():
    run_ranks(2, released)


def continued(rank: Rank, layouts):
    """Each layout saves after 3 steps; every other one loads it and goes on for 2."""
    comm = rank.connect()
    saved, whole = [], []
    for precision, layout in layouts:
        parallel, optimizer = make(comm, precision, **layout)
        steps(comm, parallel, optimizer, count=3)
        saved.append((copy.deepcopy(parallel.module.state_dict()), copy.deepcopy(optimizer.state_dict())))
        steps(comm, parallel, optimizer, first=3, count=2)
        whole.append(bits(parallel.module.state_dict(), optimizer.state_dict()))
    found = []
    for model_state, optimizer_state in saved:
        for precision, layout in layouts:
            parallel, optimizer = make(comm, precision, **layout)
            parallel.module.load_state_dict(model_state)
            optimizer.load_state_dict(optimizer_state)
            steps(comm, parallel, optimizer, first=3, count=2)
            found.append(bits(parallel.module.state_dict(), optimizer.state_dict()))
    return whole, found


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_any_layout_loads_what_another_saved(precision):
    everyones = run_ranks(2, continued, [(precision, LAYOUTS[i]) for i in (0, 2, 6)])
    assert len({digest for whole, found in everyones for digest in (*whole, *found)}) == 1


def refusals(rank: Rank):
    from paracomm import hooks

    comm = rank.connect()
    for zero in (2, 3):
        with pytest.raises(InvalidArgument, match="takes no gradient hook"):
            DataParallel(GPT(CONFIG), comm, zero=zero, hook=hooks.allreduce_hook)
        parallel = DataParallel(GPT(CONFIG), comm, zero=zero)
        with pytest.raises(InvalidArgument, match="takes no gradient hook"):
            hooks.register(parallel, hooks.allreduce_hook, None)
    with pytest.raises(InvalidArgument, match="zero is 4"):
        DataParallel(GPT(CONFIG), comm, zero=4)
    with pytest.raises(InvalidArgument, match="precision is 'float16'"):
        DataParallel(GPT(CONFIG), comm, precision="float16")
    with pytest.raises(InvalidArgument, match="units are gathered under ZeRO 3 only"):
        DataParallel(GPT(CONFIG), comm, zero=2, units=["blocks.*"])
    with pytest.raises(InvalidArgument, match="no module is called 'block'"):
        DataParallel(GPT(CONFIG), comm, zero=3, units=["block"])
    with pytest.raises(InvalidArgument, match=r"unit 'blocks.0.mlp.up' lies inside of unit 'blocks.0'"):
        DataParallel(GPT(CONFIG), comm, zero=3, units=["blocks.0", "blocks.0.mlp.up"])
    with pytest.raises(InvalidArgument, match="Adafactor may look at a parameter's shape"):
        DataParallel(GPT(CONFIG), comm, zero=1).optimizer(torch.optim.Adafactor)
    with pytest.raises(InvalidArgument, match=r"no group has 'token\.weight'"):
        parallel.optimizer(torch.optim.AdamW, [{"params": list(parallel.module.blocks.parameters())}])
    _, other = make(comm, zero=1)
    plain = DataParallel(GPT(CONFIG), comm).optimizer(torch.optim.AdamW)
    with pytest.raises(InvalidArgument, match="groups"):
        plain.load_state_dict(other.state_dict())


def test_what_cannot_be_combined_is_refused():
    run_ranks(2, refusals)


def gloo(rank: Rank):
    comm = GlooComm()
    try:
        with pytest.raises(InvalidArgument, match=r"needs a paracomm.Communicator.*GlooComm"):
            DataParallel(GPT(CONFIG), comm, zero=1)
    finally:
        comm.close()


def test_other_communicators_are_refused():
    run_ranks(1, gloo)


def hooked(rank: Rank):
    from paracomm import hooks

    comm = rank.connect()
    found = []
    for zero in (0, 1):
        for average in (True, False):
            state = hooks.QuantizedState(comm, bits=8)
            parallel = DataParallel(GPT(CONFIG), comm, zero=zero, hook=hooks.int8_hook, state=state, average=average)
            optimizer = parallel.optimizer(torch.optim.AdamW, decay, lr=1e-2)
            scale = 1 if average else comm.world_size
            for step in range(3):
                optimizer.zero_grad()
                (loss_of(parallel, mine(comm, tokens(step))) / scale).backward()
                parallel.finish()
                parallel.clip_(0.5)
                optimizer.step()
            found.append(bits(parallel.module.state_dict(), optimizer.state_dict()))
            state.close()
    return found


def test_a_hook_under_zero_1_gives_the_bits_of_zero_0():
    everyones = run_ranks(2, hooked)
    assert len({digest for found in everyones for digest in found}) == 1
