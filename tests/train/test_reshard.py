"""What one layout saves, any other loads: the same bits of weights and states, and training goes on as if never
stopped. Also what hooks owe, and the stages of a pipeline."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Rank, say_goodbye
from ranks import run_ranks as start_ranks
from torch import Tensor, nn

from paracomm.errors import InvalidArgument
from paracomm.models import DecoderConfig
from paracomm.models.gpt import GPT
from paracomm.parallel import DataParallel, Layout, Pipeline
from paracomm.parallel.plan import Column, Row
from paracomm.parallel.shard import gather_parameter
from paracomm.pipeline import SCHEDULES
from paracomm.train import loop
from paracomm.train.checkpoint import Checkpointer, list_checkpoints, load_checkpoint
from paracomm.train.config import TrainConfig
from paracomm.train.data import load_corpus
from paracomm.train.replicas import MeshReplicas, TorchReplicas
from paracomm.train.whole import whole_weights

SHAPE = {"width": 16, "depth": 2, "heads": 4, "context": 16, "dropout": 0.1}
MODELS = {
    "gpt": DecoderConfig(**SHAPE),
    "llama": DecoderConfig(**SHAPE, kv_heads=4, positions="rotary", norm="rms", mlp="swiglu"),
    "odd": DecoderConfig(**SHAPE, vocabulary=259, hidden=50, bias=True, tied=False),
}
SAVED, STEPS = 3, 5
"""Steps before the checkpoint, and in all."""
Whole = dict[str, dict[str, Tensor]]


def run_ranks(world: int, function: Any, *args: Any) -> list[Any]:
    return start_ranks(world, say_goodbye, function, *args)


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    path = tmp_path / "text"
    path.write_bytes(b"".join(b"%d bottles of beer on the wall; " % i for i in range(300)))
    return TrainConfig(model=MODELS["gpt"], batch=8, steps=STEPS, warmup=2, dtype="float64", data=path)


def trainer_of(config: TrainConfig, layout: Layout, comm: Any) -> loop.Trainer:
    config = replace(config, layout=layout, bucket_mib=0.01)
    return loop.Trainer(config, MeshReplicas(layout, comm), load_corpus(config.data))


def train(trainer: loop.Trainer, first: int, last: int) -> list[float]:
    """The losses of the whole batch."""
    found = []
    for step in range(first, last):
        mean = trainer.replicas.sum(trainer.backward(step).view(1)) / trainer.replicas.world_size
        trainer.update(step)
        found.append(float(mean))
    return found


def whole_of(trainer: loop.Trainer) -> Whole:
    """{name: {"weight": ..., "exp_avg": ...}}, gathered by what knows nothing of checkpoints."""
    spread, flat = trainer.replicated, {}
    weights, states = whole_weights(spread), trainer.optimizer.state_dict()["state"]
    for name, parameter in (named for part in spread.parts for named in part.module.named_parameters()):
        if not hasattr(parameter, "copy_of"):
            for key, value in states.get(name, {}).items():
                flat[f"{name} {key}"] = value if key == "step" else gather_parameter(parameter, spread.mesh, value)
    if isinstance(spread, Pipeline):
        flat = spread.everywhere(flat)
    found: Whole = {name: {"weight": value} for name, value in weights.items()}
    for path, value in sorted(flat.items()):
        name, key = path.split(" ")
        found[name]["weight" if key == "master" else key] = value
    return found


def distance(found: Whole, expected: Whole) -> float:
    """The largest, over weights and states, of the 2-norm of a difference over that of what was expected."""
    worst = 0.0
    for name, theirs in expected.items():
        assert found[name].keys() == theirs.keys()
        for key, value in theirs.items():
            worst = max(worst, float((found[name][key] - value).norm() / value.norm()))
    return worst


def same_bits(found: Whole, expected: Whole) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].keys() == theirs.keys() and all(torch.equal(found[name][key], theirs[key]) for key in theirs)
        for name, theirs in expected.items()
    )


# --- pairs of layouts ---
def save_here(rank: Rank, config: TrainConfig, layout: Layout, folder: Path) -> tuple[Whole, list[float], Whole, bool]:
    """What was saved, the losses afterwards, what was there at the end; and whether that is also what comes of it when
    the same layout loads it anew."""
    comm = rank.connect()
    trainer = trainer_of(config, layout, comm)
    train(trainer, 0, SAVED)
    with Checkpointer(folder, trainer.replicated, trainer.optimizer) as checkpoints:
        checkpoints.save(SAVED)
        saved = whole_of(trainer)
        losses = train(trainer, SAVED, STEPS)
        end = whole_of(trainer)
        checkpoints.wait()
    again = trainer_of(replace(config, seed=99), layout, comm)  # other weights
    again.config = replace(again.config, seed=config.seed)
    with Checkpointer(folder, again.replicated, again.optimizer) as checkpoints:
        checkpoints.load()
    repeats = train(again, SAVED, STEPS) == losses and same_bits(whole_of(again), end)
    return saved, losses, end, repeats


def load_there(rank: Rank, config: TrainConfig, layout: Layout, folder: Path) -> tuple[Whole, list[float], Whole]:
    trainer = trainer_of(replace(config, seed=99), layout, rank.connect())
    trainer.config = replace(trainer.config, seed=config.seed)
    train(trainer, 0, 1)  # what it has is overwritten, whatever it is
    with Checkpointer(folder, trainer.replicated, trainer.optimizer) as checkpoints:
        assert checkpoints.load() == {"step": SAVED}
    loaded = whole_of(trainer)
    return loaded, train(trainer, SAVED, STEPS), whole_of(trainer)


def load_alone(config: TrainConfig, folder: Path) -> Whole:
    """Into torch's own modules and optimizer."""
    model = GPT(config.model, seed=5).to(torch.float64 if config.dtype == "float64" else torch.float32)
    optimizer = torch.optim.AdamW(loop._groups(model, config), lr=1.0)
    load_checkpoint(list_checkpoints(folder)[-1], model, optimizer)
    assert optimizer.param_groups[0]["lr"] == loop.learning_rate(config, SAVED - 1)
    return {name: {**optimizer.state[p], "weight": p.detach()} for name, p in model.named_parameters()}


def draw(seed: int) -> tuple[str, int, Layout, int, Layout]:
    """A model and two layouts with their numbers of ranks; half the pairs are all in float64."""
    dice = random.Random(seed)
    name, mixed = dice.choice(sorted(MODELS)), dice.random() < 0.5
    found: list[Any] = [name]
    for _ in range(2):
        pp = dice.choice((1, 1, 2))
        most = 4 // pp
        dp, cp, tp = dice.choice(
            [(d, c, t) for d in (1, 2, 4) for c in (1, 2) for t in (1, 2, 4) if d * c * t <= most]
        )  # fmt: skip
        sequence = tp > 1 and dice.random() < 0.5
        precision = "bfloat16" if mixed and dice.random() < 0.7 else None
        schedule = dice.choice(sorted(SCHEDULES)) if pp > 1 else "1f1b"
        layout = Layout(
            dp=dp, cp=cp, tp=tp, zero=dice.randrange(4), sequence=sequence, precision=precision, pp=pp,
            schedule=schedule,
        )  # fmt: skip
        found += [pp * dp * cp * tp, layout]
    return tuple(found)


def move(seed: int, config: TrainConfig, folder: Path) -> None:
    name, world, layout, other_world, other = draw(seed)
    exact = layout.precision is None and other.precision is None
    config = replace(config, model=MODELS[name], dtype="float64" if exact else "float32")
    where = f"seed {seed}: {name}, from {layout} to {other}"
    before = run_ranks(world, save_here, config, layout, folder)
    saved, losses, end, _ = before[0]
    assert all(repeats for *_, repeats in before), where
    assert same_bits(load_alone(config, folder), saved), where
    for loaded, later, last in run_ranks(other_world, load_there, config, other, folder):
        assert same_bits(loaded, saved), where
        assert later == pytest.approx(losses, rel=1e-10 if exact else 1e-3), where
        assert distance(last, end) < (1e-10 if exact else 0.1), where


@pytest.mark.parametrize("seed", range(4))
def test_any_layout_loads_what_any_other_saved(seed, config, tmp_path):
    move(seed, config, tmp_path / "checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 150))
def test_fifty_pairs_of_layouts(seed, config, tmp_path):
    move(seed, config, tmp_path / "checkpoints")


def test_the_pairs_are_worth_comparing():
    pairs = [draw(seed) for seed in range(100, 150)]
    layouts = [layout for _, _, *rest in pairs for layout in (rest[0], rest[2])]
    assert {layout.schedule for layout in layouts if layout.pp > 1} == SCHEDULES.keys()
    assert sum((a.pp > 1) != (b.pp > 1) for _, _, a, _, b in pairs) >= 15
    assert sum(a != b for _, _, a, _, b in pairs) >= 45
    assert {layout.zero for layout in layouts} == {0, 1, 2, 3}
    assert {layout.tp for layout in layouts} == {layout.dp for layout in layouts} == {1, 2, 4}
    assert sum(a.precision is b.precision is None for _, _, a, _, b in pairs) >= 20
    assert sum(a.precision != b.precision for _, _, a, _, b in pairs) >= 5


def write_bytes(rank: Rank, config: TrainConfig, layout: Layout, folder: Path) -> int:
    trainer = trainer_of(config, layout, rank.connect())
    train(trainer, 0, 1)
    with Checkpointer(folder, trainer.replicated, trainer.optimizer) as checkpoints:
        entries, _, _ = checkpoints._copies()
        checkpoints.save(1)
    return sum(entry.piece.values.nbytes for entry in entries if entry.piece.values.dim())


@pytest.mark.parametrize("layout", [Layout(), Layout(zero=3), Layout(tp=2), Layout(tp=2, zero=1)], ids=str)
def test_every_rank_writes_its_share_and_nothing_twice(config, tmp_path, layout):
    found = run_ranks(4, write_bytes, config, layout, tmp_path)
    model = GPT(config.model)
    assert sum(found) == 8 * 3 * sum(p.numel() for p in model.parameters())
    assert max(found) <= 2 * min(found)


# --- hooks ---
LOSSY = ["int8", "topk", "powersgd", "batched_powersgd", "fp16", "hierarchical+int8"]


def owed_of(trainer: loop.Trainer) -> dict[str, Tensor]:
    """By name, what all ranks owe on average, whole."""
    spread, found = trainer.replicated, {}
    memory = spread.reducer.state.state_dict()["memory"]
    for name, parameter in spread.module.named_parameters():
        if name in memory:
            mean = spread.comm.all_reduce(memory[name].double(), "avg")
            found[name] = gather_parameter(parameter, spread.mesh, mean.view(parameter.shape))
    return found


def save_owing(rank: Rank, config: TrainConfig, layout: Layout, folder: Path) -> tuple[list[float], Any]:
    comm = rank.connect()
    trainer = trainer_of(config, layout, comm)
    train(trainer, 0, SAVED)
    with Checkpointer(folder, trainer.replicated, trainer.optimizer) as checkpoints:
        checkpoints.save(SAVED)
        owed = owed_of(trainer)
        losses = train(trainer, SAVED, STEPS)
        end = whole_of(trainer)
        checkpoints.wait()
    again = trainer_of(config, layout, comm)
    with Checkpointer(folder, again.replicated, again.optimizer) as checkpoints:
        checkpoints.load()
    assert again.replicated.reducer.state.steps == SAVED
    assert train(again, SAVED, STEPS) == losses
    assert same_bits(whole_of(again), end)
    return losses, owed


def load_owing(rank: Rank, config: TrainConfig, layout: Layout, folder: Path) -> Any:
    trainer = trainer_of(config, layout, rank.connect())
    with Checkpointer(folder, trainer.replicated, trainer.optimizer) as checkpoints:
        checkpoints.load()
    owed = owed_of(trainer)
    train(trainer, SAVED, STEPS)
    return owed


@pytest.mark.parametrize("hook", LOSSY)
@pytest.mark.parametrize("tp", [1, 2])
def test_what_a_hook_owes_goes_on(config, tmp_path, hook, tp):
    """Bit for bit on as many ranks; on other meshes the average that is owed stays the same."""
    config = replace(config, batch=12, dtype="float32", model=MODELS["odd"])
    here = Layout(dp=2, tp=tp, hook=hook)
    before = run_ranks(2 * tp, save_owing, config, here, tmp_path)
    owed = before[0][1]
    if not hook.startswith("hierarchical"):
        assert any(bool(each.any()) for each in owed.values())
    for world, there in [(4, Layout(dp=4 // tp, tp=tp, hook=hook)), (3, Layout(dp=3, hook=hook)),
                         (1, Layout(hook=hook)), (2, Layout(dp=1, cp=1, tp=2, hook=hook))]:  # fmt: skip
        for found in run_ranks(world, load_owing, config, there, tmp_path):
            for name, expected in owed.items():
                assert torch.allclose(found[name], expected, rtol=1e-5, atol=1e-9), f"{there}: {name}"


def load_with_another_hook(rank: Rank, config: TrainConfig, folder: Path) -> Any:
    comm = rank.connect()
    plain = trainer_of(config, Layout(), comm)
    with Checkpointer(folder, plain.replicated, plain.optimizer) as checkpoints:
        checkpoints.load()
    other = trainer_of(config, Layout(hook="topk"), comm)
    with Checkpointer(folder, other.replicated, other.optimizer) as checkpoints:
        checkpoints.load()
    assert other.replicated.reducer.state.steps == 0
    return owed_of(other)


def test_another_hook_takes_over_what_is_owed(config, tmp_path):
    config = replace(config, dtype="float32")
    owed = run_ranks(2, save_owing, config, Layout(hook="int8"), tmp_path)[0][1]
    for found in run_ranks(2, load_with_another_hook, config, tmp_path):
        assert owed.keys() <= found.keys() and all(torch.equal(found[name], owed[name]) for name in owed)


# --- other models, other optimizers ---
class Fused(nn.Module):
    """A projection that is cut within each of its three parts, and a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 24), nn.Linear(8, 6)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        y: Tensor = self.out(q * k + v) * self.scale
        return y


PLAN = {"qkv": Column(parts=3), "out": Row()}
OPTIMIZERS: dict[str, Any] = {
    "AdamW": {"amsgrad": True},
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "NAdam": {},
    "ASGD": {},
    "Adagrad": {},
}


def save_fused(rank: Rank, kind: str, layout: Layout, folder: Path) -> dict[str, Any]:
    spread, optimizer = fused(rank, kind, layout, seed=0)
    for _ in range(2):
        step_of(spread, optimizer)
    with Checkpointer(folder, spread, optimizer) as checkpoints:
        checkpoints.save(1)
    return step_of(spread, optimizer)


def load_fused(rank: Rank, kind: str, layout: Layout, folder: Path) -> dict[str, Any]:
    spread, optimizer = fused(rank, kind, layout, seed=1)
    with Checkpointer(folder, spread, optimizer) as checkpoints:
        checkpoints.load()
    return step_of(spread, optimizer)


def fused(rank: Rank, kind: str, layout: Layout, seed: int) -> tuple[DataParallel, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    spread = layout.spread(Fused().double(), layout.mesh(rank.connect()), PLAN, bucket_bytes=300)
    return spread, spread.optimizer(getattr(torch.optim, kind), **OPTIMIZERS[kind])


def step_of(spread: DataParallel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """One step of the same batch everywhere; the weights, whole."""
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)
    optimizer.zero_grad()
    spread(x).square().sum().backward()
    spread.finish()
    optimizer.step()
    with spread.gathered():
        return {name: gather_parameter(p, spread.mesh).clone() for name, p in spread.module.named_parameters()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_and_fused_projections_move(tmp_path, kind):
    expected = run_ranks(4, save_fused, kind, Layout(tp=2, zero=2), tmp_path)[0]
    for world, layout in [(3, Layout(zero=3)), (2, Layout(tp=2)), (1, Layout())]:
        for found in run_ranks(world, load_fused, kind, layout, tmp_path):
            for name, value in expected.items():
                assert torch.allclose(found[name], value, rtol=1e-10, atol=1e-14), f"{layout}: {name}"


def other_groups(rank: Rank, folder: Path) -> str:
    spread, optimizer = fused(rank, "SGD", Layout(zero=1), seed=0)
    step_of(spread, optimizer)
    with Checkpointer(folder, spread, optimizer) as checkpoints:
        checkpoints.save(1)
        checkpoints.wait()
    vectors = spread.optimizer(torch.optim.SGD, lambda name, p: {"lr": 0.1 if p.dim() > 1 else 0.2})
    with Checkpointer(folder, spread, vectors) as checkpoints:
        checkpoints.load()  # one group became two
        assert [group["lr"] for group in vectors.param_groups] == [0.1, 0.1]
        vectors.param_groups[0]["lr"] = 0.3
        checkpoints.save(2)
        checkpoints.wait()
    with Checkpointer(folder, spread, optimizer) as checkpoints, pytest.raises(InvalidArgument) as caught:
        checkpoints.load()
    return str(caught.value)


def test_groups_that_cannot_be_one_are_refused(tmp_path):
    for said in run_ranks(2, other_groups, tmp_path):
        assert "the parameters of group 0 are not a group's of the saved" in said


# --- stages of a pipeline ---
class Stages:
    """The face of a pipeline: rank r holds stages r and 3 - r, as ZBV has them; the head is tied to the embedding."""

    def __init__(self, comm: Any, seed: int) -> None:
        self.parts, self.comm = [], comm
        for stage in (comm.rank, 3 - comm.rank):
            torch.manual_seed(seed + stage)
            root = nn.Module()
            if stage == 0:
                root.token = nn.Embedding(7, 5)
            root.blocks = nn.ModuleDict({str(stage): nn.Linear(5, 5)})
            if stage == 3:
                root.head = nn.Linear(5, 7, bias=False)
                root.head.weight.copy_of = "token.weight"
            self.parts.append(DataParallel(root, comm.split(comm.rank), zero=1, bucket_bytes=100))

    def optimizer(self) -> torch.optim.Optimizer:
        from paracomm.parallel.optimizer import Shards

        weights = [each for part in self.parts for each in part.weights]
        named = [pair for part in self.parts for pair in part.module.named_parameters()]
        rule = lambda name, p: {"weight_decay": 0.1 * (p.dim() > 1)}  # noqa: E731
        publish = lambda: [part.publish() for part in self.parts]  # noqa: E731
        settle = lambda: [part.settle() for part in self.parts]  # noqa: E731
        return Shards(torch.optim.AdamW, weights, rule, named, publish, {"lr": 0.1}, settle, self.comm).optimizer


class OneStage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(7, 5)
        self.blocks = nn.ModuleDict({str(stage): nn.Linear(5, 5) for stage in range(4)})
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.token.weight


def through_stages(rank: Rank, folder: Path, saving: bool) -> dict[str, Tensor]:
    comm = rank.connect()
    stages = Stages(comm, 0 if saving else 50)
    optimizer = stages.optimizer()
    if saving:
        for part in stages.parts:
            sum(p.square().sum() for p in part.module.parameters()).backward()
            part.finish()
        optimizer.step()
    with Checkpointer(folder, stages, optimizer, ranks=comm.split(0)) as checkpoints:
        if saving:
            checkpoints.save(1)
        else:
            checkpoints.load()
    found = {}
    for part in stages.parts:
        for weights in part.weights:
            for where, _, state in optimizer.shards.runs(weights):
                assert len(state["exp_avg"]) == where.stop - where.start and bool(state["exp_avg"].any())
        found |= {name: p.detach().clone() for name, p in part.module.named_parameters()}
    return found


def test_stages_save_and_load_the_whole_model(tmp_path):
    one, other = run_ranks(2, through_stages, tmp_path, True)
    model = OneStage()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 9.0}, {"params": vectors, "weight_decay": 9.0}]
    optimizer = torch.optim.AdamW(groups)
    load_checkpoint(list_checkpoints(tmp_path)[-1], model, optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    whole = one | other
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole[name])
        assert bool(optimizer.state[parameter]["exp_avg"].any())
    with Checkpointer(tmp_path, model, optimizer) as checkpoints:
        checkpoints.save(2)
    one, other = run_ranks(2, through_stages, tmp_path, False)
    loaded = one | other
    assert torch.equal(loaded.pop("head.weight"), model.token.weight)
    assert all(torch.equal(value, whole[name]) for name, value in loaded.items())


# --- DistributedDataParallel ---
def save_ddp(rank: Rank, config: TrainConfig, folder: Path) -> dict[str, Tensor]:
    replicas = TorchReplicas("gloo")
    trainer = loop.Trainer(replace(config, reducer="ddp"), replicas, load_corpus(config.data))
    train(trainer, 0, SAVED)
    with Checkpointer(folder, trainer.replicated, trainer.optimizer, ranks=replicas.beside()) as checkpoints:
        checkpoints.save(SAVED)
    found = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    replicas.close()
    return found


def test_ddp_writes_whole_tensors_once(config, tmp_path):
    saved = run_ranks(2, save_ddp, config, tmp_path)[0]
    sizes = {path.name: path.stat().st_size for path in (tmp_path / f"step-{SAVED:08d}").iterdir()}
    assert sizes["__0_0.distcp"] > 3 * 8 * sum(value.numel() for value in saved.values())
    assert sizes.get("__1_0.distcp", 0) < 1000
    for found, _, _ in run_ranks(3, load_there, replace(config, batch=12), Layout(zero=3), tmp_path):
        assert all(torch.equal(found[name]["weight"], value) for name, value in saved.items())
