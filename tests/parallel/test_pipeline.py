"""Stages out of a user's own modules, a backward in two parts, the runner's memory, and what is refused."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import Rank, say_goodbye
from ranks import run_ranks as start_ranks
from torch import Tensor, nn

from paracomm.errors import Error, InvalidArgument
from paracomm.models import Decoder, DecoderConfig
from paracomm.models.layers import Block
from paracomm.parallel import Mesh, Pipeline
from paracomm.parallel.pipeline import Layer, layers_of
from paracomm.parallel.pipeline import pipeline as pipelines
from paracomm.parallel.pipeline.backward import SplitBackward
from paracomm.parallel.pipeline.stage import make_stages
from paracomm.pipeline import SCHEDULES, build, cut_evenly
from paracomm.pipeline.memory import peaks


def run_ranks(world: int, function: Any, *args: Any) -> list[Any]:
    return start_ranks(world, say_goodbye, function, *args)


# --- a backward in two parts ---
class Doubled(torch.autograd.Function):
    """2 x @ w, in Python, which computes both gradients whenever it is called."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return 2 * x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        Doubled.calls += 1
        x, w = ctx.saved_tensors
        return 2 * g @ w.T, 2 * x.flatten(0, -2).T @ g.flatten(0, -2)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(24, 24) / 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Doubled.apply(x, self.w)
        return y


class Twice(nn.Module):
    """One matrix on two places of the trunk, and one that is applied to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(24, 24), nn.Parameter(torch.randn(24, 24) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.one(x).tanh()) @ (self.two @ self.two)


class Meeting(nn.Module):
    """A part of its own, computed from no input, that joins the trunk in two places; and it is an output, too."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.mix, self.out = nn.Parameter(torch.randn(5, 24)), nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        own = self.mix(self.start)
        return self.out(x * own) + own


def block(**options: Any) -> nn.Module:
    model = nn.Sequential(*(Block(DecoderConfig(24, 1, 4, 8, **options)) for _ in range(2)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


LLAMA: dict[str, Any] = {"positions": "rotary", "norm": "rms", "mlp": "swiglu", "kv_heads": 2}
SPLIT = {
    "gpt": lambda: block(bias=True),
    "llama": lambda: block(**LLAMA),
    "python": Custom,
    "twice": Twice,
    "meeting": Meeting,
    "norms": lambda: nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24, bias=False)),
}


@pytest.mark.parametrize("name", SPLIT)
def test_two_parts_give_the_bits_of_one(name: str) -> None:
    torch.manual_seed(1)
    model = SPLIT[name]()
    x, g = torch.randn(3, 5, 24, requires_grad=True), torch.randn(3, 5, 24)
    model(x).backward(g)
    expected = {key: p.grad for key, p in model.named_parameters()}
    of_x, x.grad = x.grad, None
    arrived: list[str] = []
    for key, parameter in model.named_parameters():
        parameter.grad = None
        parameter.register_post_accumulate_grad_hook(lambda p, key=key: arrived.append(key))
    Doubled.calls = 0
    half = SplitBackward([model(x)], [x])
    (found,) = half.inputs([g])
    assert torch.equal(found, of_x) and not arrived and x.grad is None
    half.weights()
    assert sorted(arrived) == sorted(expected)
    assert all(torch.equal(p.grad, expected[key]) for key, p in model.named_parameters())
    assert Doubled.calls == (name == "python")


def test_the_first_part_leaves_the_weights_out() -> None:
    """Of a matrix much larger than its input, the second part has almost all of the work."""
    layer, x = nn.Linear(2000, 2000), torch.randn(1, 2000, requires_grad=True)
    half = SplitBackward([layer(x)], [x])
    half.inputs([torch.ones(1, 2000)])
    assert all(found is None for each in half._junctions for found in each.found)
    half.weights()
    assert layer.weight.grad is not None


def test_outputs_without_inputs_and_inputs_that_are_outputs() -> None:
    w, x = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    half = SplitBackward([w * 2, x, x * w], [x])
    (found,) = half.inputs([torch.ones(4), torch.ones(4), torch.ones(4)])
    assert torch.equal(found, 1 + w)
    half.weights()
    assert torch.equal(w.grad, 2 + x)
    first = SplitBackward([w.sum()], [])
    assert first.inputs([None]) == []
    first.weights()
    assert torch.equal(w.grad, 3 + x)


# --- a list of modules ---
def mean_square(y: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(y, target, reduction="sum")


def sequence(shared: str) -> nn.Sequential:
    """shared: "", "module" (one that is there twice) or "weight"."""
    torch.manual_seed(3)
    items = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)]
    if shared == "module":
        items[4] = items[2]
    if shared == "weight":
        items[4].weight = items[2].weight  # type: ignore[assignment]
    return nn.Sequential(*items)


def data(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"input": torch.randn(8, 6, generator=generator), "target": torch.randn(8, 4, generator=generator)}


def plainly(shared: str) -> tuple[list[float], dict[str, Tensor]]:
    model = sequence(shared)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(5):
        batch = data(step)
        optimizer.zero_grad()
        loss = mean_square(model(batch["input"]), batch["target"]) / 8
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def in_a_pipeline(rank: Rank, name: str, shared: str) -> tuple[list[float], dict[str, Tensor], list[float]]:
    comm = rank.connect()
    mesh = Mesh(comm, pp=2)
    schedule = build(name, ranks=2, microbatches=4)
    first = [0, 3] if schedule.stages == 2 else [0, 2, 3, 6]
    pipeline = Pipeline(sequence(shared), mesh, schedule, first=first, loss=mean_square)
    optimizer = pipeline.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9)
    losses = []
    for step in range(5):
        optimizer.zero_grad()
        loss = pipeline.forward_backward(data(step), divisor=8)
        pipeline.finish()
        pipeline.clip_(1.0)
        optimizer.step()
        losses.append(float(comm.all_reduce(loss)))
    held = {key: p for key, p in pipeline.named_stage_parameters() if not hasattr(p, "copy_of")}
    weights = {key: x.clone() for key, x in pipeline.everywhere(held).items()}
    copies = [float((p - weights[p.copy_of]).abs().max()) for _, p in pipeline.named_stage_parameters()
              if hasattr(p, "copy_of")]  # fmt: skip
    mesh.close()
    return losses, weights, copies


@pytest.mark.parametrize("shared", ["", "module", "weight"])
@pytest.mark.parametrize("name", ["1f1b", "zbv"])
def test_a_users_list_of_modules_trains_as_it_is(name: str, shared: str) -> None:
    losses, weights = plainly(shared)
    found = run_ranks(2, in_a_pipeline, name, shared)
    assert sum(len(copies) for _, _, copies in found) == {"": 0, "module": 2, "weight": 1}[shared]
    for theirs, everything, copies in found:
        assert theirs == pytest.approx(losses, rel=1e-5)
        assert everything.keys() == weights.keys()
        assert all(torch.allclose(x, weights[key], rtol=1e-5, atol=1e-6) for key, x in everything.items())
        assert all(apart == 0.0 for apart in copies), "a tied weight has the same bits in both places"


# --- batches ---
class Scaled(nn.Module):
    """Two layers; the loss is scaled by what the batch says, if it does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)

    def loss(self, x: Tensor, target: Tensor, scale: Any, power: Any, kind: Any) -> Tensor:
        y: Tensor = (self.two(x) - target) ** (2 if power is None else power)
        return (y.abs() if kind == "abs" else y).sum() * (1 if scale is None else scale)

    def layers(self) -> list[Layer]:
        end = Layer(self.loss, (self.two,), ("target",), ("scale", "power", "kind"))
        return [Layer(self.one, takes=("input",)), end]


EXTRAS: list[dict[str, Any]] = [
    {}, {"scale": 3.0}, {"scale": torch.tensor(3.0)}, {"scale": torch.arange(8.0).view(8, 1).sum(1).mean()},
    {"scale": 2, "power": torch.tensor(3), "kind": "abs"}, {"scale": None, "power": 4, "kind": None},
]  # fmt: skip


def with_extras(rank: Rank) -> list[tuple[float, list[Tensor]]]:
    comm, found = rank.connect(), []
    for extra in EXTRAS:
        pipeline = Pipeline(Scaled(), Mesh(comm, pp=2), build("1f1b", ranks=2, microbatches=4))
        loss = comm.all_reduce(pipeline.forward_backward(data(0) | extra, divisor=8))
        pipeline.finish()
        found.append((float(loss), [p.grad.clone() for p in pipeline.parameters() if p.grad is not None]))
    return found


def test_entries_for_all_samples_reach_every_microbatch() -> None:
    first, last = run_ranks(2, with_extras)
    for extra, (loss, head), (same, tail) in zip(EXTRAS, first, last, strict=True):
        model, batch = Scaled(), data(0)
        extra = {name: extra.get(name) for name in ("scale", "power", "kind")}
        expected = model.loss(model.one(batch["input"]), batch["target"], **extra) / 8
        expected.backward()
        assert loss == same == pytest.approx(float(expected.detach()), rel=1e-5)
        for found, parameter in zip([*head, *tail], model.parameters(), strict=True):
            assert torch.allclose(found, parameter.grad, rtol=1e-5, atol=1e-6)


# --- groups of the model's own parameters ---
def grouped(rank: Rank, shared: str) -> dict[str, Tensor]:
    comm = rank.connect()
    mesh, model = Mesh(comm, pp=2), sequence(shared)
    groups = groups_of(model)
    pipeline = Pipeline(model, mesh, build("1f1b", ranks=2, microbatches=4), first=[0, 3], loss=mean_square)
    optimizer = pipeline.optimizer(torch.optim.AdamW, groups, lr=0.05)
    pipeline.optimizer(torch.optim.AdamW, [{"params": pipeline.parameters()}])
    for step in range(3):
        optimizer.zero_grad()
        pipeline.forward_backward(data(step), divisor=8)
        pipeline.finish()
        optimizer.step()
    with pytest.raises(InvalidArgument, match=r"group 0 of the optimizer has a parameter \[2\] that the model did not"):
        pipeline.optimizer(torch.optim.AdamW, [{"params": [nn.Parameter(torch.zeros(2))]}])
    held = {key: p for key, p in pipeline.named_stage_parameters() if not hasattr(p, "copy_of")}
    return {key: x.clone() for key, x in pipeline.everywhere(held).items()}


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay on matrices, as a loop for one process makes its groups before it wraps the model."""
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.5},
        {"params": (p for p in model.parameters() if p.dim() < 2), "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("shared", ["", "weight"])
def test_groups_made_before_wrapping_are_taken(shared: str) -> None:
    model = sequence(shared)
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.05)
    for step in range(3):
        batch = data(step)
        optimizer.zero_grad()
        (mean_square(model(batch["input"]), batch["target"]) / 8).backward()
        optimizer.step()
    for found in run_ranks(2, grouped, shared):
        assert found.keys() == dict(model.named_parameters()).keys()
        assert all(torch.allclose(found[name], p, rtol=1e-4, atol=1e-5) for name, p in model.named_parameters())


# --- memory ---
def most_kept(rank: Rank, name: str, microbatches: int) -> tuple[int, int]:
    comm = rank.connect()
    schedule = build(name, ranks=3, microbatches=microbatches)
    config = DecoderConfig(8, 4, 2, 4, vocabulary=5)
    most = 0

    class Watched(pipelines.Step):
        def _forward(self, action: Any) -> None:
            nonlocal most
            super()._forward(action)
            most = max(most, len(self._kept) + len(self._halves))

    original, pipelines.Step = pipelines.Step, Watched
    try:
        pipeline = Pipeline(Decoder(config), Mesh(comm, pp=3), schedule)
        tokens = torch.zeros(microbatches, 4, dtype=torch.int64)
        pipeline.forward_backward({"tokens": tokens, "targets": tokens})
        pipeline.finish()
        comm.barrier()
    finally:
        pipelines.Step = original
    return most, peaks(schedule)[comm.rank]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_rank_keeps_as_many_activations_as_the_schedule_says(name: str) -> None:
    for microbatches in (2, 6):
        for found, expected in run_ranks(3, most_kept, name, microbatches):
            assert found == expected


def test_what_other_ranks_have_gives_back_its_memory() -> None:
    model = Decoder(DecoderConfig(8, 4, 2, 4, vocabulary=5))
    whole = copy.deepcopy(model)
    layers = layers_of(model)
    (stage,) = make_stages(model, layers, cut_evenly(len(layers), 3), [1])
    kept = dict(stage.named_parameters())
    assert {name.split(".")[1] for name in kept} == {"1", "2"}
    assert all(torch.equal(p, whole.get_parameter(name)) for name, p in kept.items())
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().nbytes() == (parameter.numel() if name in kept else 1) * 4
        assert name in kept or parameter.isnan().all()


# --- accumulation and evaluation ---
def several_calls(rank: Rank) -> list[float]:
    comm = rank.connect()
    config = DecoderConfig(8, 4, 2, 4, vocabulary=5, dropout=0.0)
    found = []
    for calls in (1, 2):
        pipeline = Pipeline(Decoder(config), Mesh(comm, pp=2), build("zb-h1", ranks=2, microbatches=8 // calls))
        tokens = torch.arange(32).view(8, 4) % 5
        for call, part in enumerate(tokens.chunk(calls)):
            pipeline.forward_backward({"tokens": part, "targets": part}, divisor=32, more=call + 1 < calls)
        pipeline.finish()
        found.append(pipeline.clip_(1e9))
    results = pipeline({"tokens": tokens, "targets": tokens})
    assert bool(results) == (comm.rank == 1)
    assert all(p.requires_grad and not x.requires_grad for p in pipeline.parameters() for r in results for x in r)
    if results:
        nats = sum(float(nats) for nats, _ in results)
        count = sum(int(count) for _, count in results)
        one, _ = Decoder(config)(tokens, tokens)
        assert count == 32 and nats == pytest.approx(float(one), rel=1e-5)
    return found


def test_calls_add_up_and_forward_has_no_gradients() -> None:
    for once, twice in run_ranks(2, several_calls):
        assert once == twice > 0


# --- errors ---
def test_models_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="Bilinear does not say what its layers are"):
        layers_of(nn.Bilinear(2, 2, 2))
    with pytest.raises(InvalidArgument, match="needs some modules, and a loss"):
        layers_of(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(InvalidArgument, match="`modules` must say which"):
        Layer(lambda x: x)
    model = sequence("")
    layers = layers_of(model, mean_square)
    with pytest.raises(InvalidArgument, match="stage 1 has no parameters to train"):
        make_stages(model, layers, [0, 1, 2], [0])
    with pytest.raises(InvalidArgument, match=r"no layer uses '6.weight'"):
        make_stages(model, layers[:-1], [0, 3], [0])
    shared = sequence("module")
    hidden = [Layer(lambda x, item=item: item(x), (item,)) for item in shared]
    with pytest.raises(InvalidArgument, match="stage 1 uses a Linear that an earlier stage uses too"):
        make_stages(shared, hidden, [0, 3], [0])


class Uneven(nn.Module):
    """Gives fewer rows of its second microbatch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(6, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.layer(x[: len(x) - (self.calls == 2)])
        return y


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError("a bug of the user's")


def refused(rank: Rank, kind: str) -> tuple[str, float]:
    comm = rank.connect()
    mesh = Mesh(comm, pp=2)
    batch = data(0)
    items: list[nn.Module] = [nn.Linear(6, 8), nn.Linear(8, 4)]
    ranks, first, options = 2, [0, 1], {"loss": mean_square}
    if kind == "rows":
        batch = {name: x[:7] for name, x in batch.items()}
    elif kind == "entry":
        del batch["input"]
    elif kind == "list":
        batch["target"] = batch["target"].tolist()
    elif kind == "unknown":
        batch["scale"] = 3.0
    elif kind == "scalars":
        batch = {name: x.sum() for name, x in batch.items()}
    elif kind == "uneven":
        items[0] = Uneven()
    elif kind == "failing":
        items[1] = Failing()
    elif kind == "loss":
        loss = nn.functional.l1_loss
        options["loss"] = lambda y, target: loss(y, target, reduction="none")
    elif kind == "ranks":
        ranks = 3
    elif kind == "cut":
        first = [0, 2]
    start = time.monotonic()
    with pytest.raises(Error) as caught:
        try:
            schedule = build("1f1b", ranks=ranks, microbatches=4)
            pipeline = Pipeline(nn.ModuleList(items), mesh, schedule, first=first, **options)
            pipeline.forward_backward(batch)
        except ZeroDivisionError as error:
            raise Error(f"{type(error).__name__}: {error}") from error
    return str(caught.value), time.monotonic() - start


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("rows", "rows 'input' 7, 'target' 7; expected one number of rows, a multiple of 4"),
        ("entry", "the batch has no 'input'"),
        ("list", "the batch's 'target' is a list, expected a tensor [B, ...]"),
        ("unknown", "no layer takes the batch's 'scale', they take input, target"),
        ("scalars", "entries with rows none; expected one number of rows"),
        ("uneven", "outputs of stage 0 are float32 [1, 8] for this microbatch, and were float32 [2, 8]"),
        ("loss", "the last layer gives float32 [2, 4], expected its loss, a scalar, first"),
        ("failing", "ZeroDivisionError: a bug of the user's"),
        ("ranks", "the schedule 1f1b is for 3 ranks, the mesh has pp 2"),
        ("cut", "the stages begin with layers [0, 2] of 2"),
    ],
)
def test_what_goes_wrong_is_said_on_every_rank_and_nothing_hangs(kind: str, reason: str) -> None:
    for said, seconds in run_ranks(2, refused, kind):
        assert reason in said
        assert seconds < 20, "neighbours are told, and do not wait until their time is up"
