"""One training run on one process and on a mesh, and how far they are apart. layouts.py beside it has the layouts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from paracomm import hooks
from paracomm.parallel import DataParallel, Pipeline, parallelize, rng
from paracomm.parallel.attention import POSITION_BITS, Attention
from paracomm.parallel.context import context_positions
from paracomm.parallel.recompute import recompute
from paracomm.parallel.shard import gather_parameter
from tests.parallel.layouts import SEED, VARIANTS, VOCABULARY, Case, Variant

ROWS, STEPS = 8, 50
MAX_NORM = 0.5
# Of a gradient that is no larger than eps AdamW makes a step of almost full size, its rounding included. At the first
# step one element in thousands is that small: with an eps of 1e-5 one process in float32 errs from float64 by 7e-6
# there (a bias of "mixed", whose gradient is 3e-5), with 1e-3 by 2e-6.
ADAMW = {"lr": 1e-3, "eps": 1e-3, "weight_decay": 0.1}
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}


# --- data ---
Batch = dict[str, Tensor]


def batch(variant: Variant, step: int) -> Batch:
    """[ROWS, T] or [ROWS, S] each: tokens that count up, a quarter of the targets masked, and all of row 0's."""
    data = torch.Generator().manual_seed(step)
    T, S = variant.config.context, variant.source
    first, stride = torch.randint(0, VOCABULARY, (2, ROWS, 1), generator=data)
    text = (first + (1 + stride % 4) * torch.arange(max(T, S) + 1)) % VOCABULARY
    masked = torch.rand(ROWS, T, generator=data) < 0.25
    masked[0] = True
    found = {"tokens": text[:, :T], "targets": text[:, 1 : T + 1].masked_fill(masked, -100)}
    if S:
        lengths = torch.randint(1, S + 1, (ROWS, 1), generator=data)
        found |= {"source": text[:, :S].flip(1), "mask": torch.arange(S) < lengths}
    return found


def loss_sum(model: nn.Module, b: Batch) -> Tensor:
    total: Tensor
    if "source" in b:
        total, _ = model(b["source"], b["tokens"], b["targets"], b["mask"])
    else:
        total, _ = model(b["tokens"], b["targets"])
    return total


def place(variant: Variant, step: int, rows: Tensor, cp: int = 1, index: int = 0) -> rng.Place:
    source = context_positions(variant.source, cp, index) if variant.source else None
    return rng.Place(SEED, step, rows, context_positions(variant.config.context, cp, index), source)


# --- masks ---
Masks = dict[int, Tensor]
"""{stream: int64, sorted: twice each element's number, and one more where it stays}."""


@contextmanager
def recorded_masks() -> Iterator[Callable[[], Masks]]:
    """All that is drawn inside."""
    drawn: dict[int, list[Tensor]] = {}
    original = rng.keep_mask

    def keep_mask(stream: int, base: Tensor, offsets: Tensor, *rest: Any) -> Tensor:
        mask = original(stream, base, offsets, *rest)
        drawn.setdefault(stream, []).append((2 * (base[..., None] + offsets) + mask).flatten())
        return mask

    rng.keep_mask = keep_mask
    try:
        yield lambda: {stream: torch.cat(parts).unique() for stream, parts in drawn.items()}
    finally:
        rng.keep_mask = original


def expect_same_masks(comm: Any, found: Masks, expected: Masks, attention: set[int]) -> None:
    """Every element that a rank draws is one process's, and together they draw all that is not hidden."""
    for stream, whole in sorted(expected.items()):
        mine = torch.isin(whole, found.get(stream, whole[:0]))
        assert int(mine.sum()) == len(found.get(stream, ())), f"stream {stream}: bits that one process does not draw"
        drawn = comm.all_reduce(mine.to(torch.int32), "max") > 0
        if stream in attention:
            places = whole >> 1
            key, query = (places >> shift & (1 << POSITION_BITS) - 1 for shift in (0, POSITION_BITS))
            drawn |= key > query
        assert drawn.all(), f"stream {stream}: {int((~drawn).sum())} elements that no rank draws"
    assert not found.keys() - expected.keys()


# --- the run ---
@dataclass
class Run:
    initial: dict[str, Tensor]
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    masks: Masks
    """Of step 0."""


@cache
def one_process(name: str, dtype: torch.dtype) -> Run:
    """Plain torch, but for dropout."""
    variant = VARIANTS[name]
    model = variant.build().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    run = Run({n: p.detach().clone() for n, p in model.named_parameters()}, [], [], {}, {})
    for step in range(STEPS):
        with recorded_masks() if step == 0 else nullcontext(dict) as masks:
            run.losses.append(backward(model, variant, step))
            run.masks = run.masks or masks()
        run.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
    run.weights = {n: p.detach() for n, p in model.named_parameters()}
    return run


def backward(model: nn.Module, variant: Variant, step: int) -> float:
    """The loss of the whole batch on one process; gradients are in the parameters."""
    whole = batch(variant, step)
    with rng.at(place(variant, step, torch.arange(ROWS))):
        loss = loss_sum(model, whole) / (whole["targets"] != -100).sum()
    model.zero_grad()
    loss.backward()
    return float(loss.detach())


class Trainer:
    """One layout on the ranks of `comm`; `local` is the largest gradient that this rank had before a reduction."""

    def __init__(self, comm: Any, case: Case, dtype: torch.dtype, kind: Any, **options: Any) -> None:
        self.case, self.variant = case, VARIANTS[case.variant]
        config = self.variant.config
        case.layout.check(
            world_size=comm.world_size, heads=config.heads, kv_heads=config.kv_heads, vocabulary=config.vocabulary,
            length=config.context,
        )  # fmt: skip
        self.mesh = case.layout.mesh(comm)
        model = parallelize(
            self.variant.build().to(dtype), self.mesh, sequence=case.sequence, context=case.context,
            chunks=case.chunks,
        )  # fmt: skip
        self.local = 0.0
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._note)
        self.states: list[Any] = []
        wrapped: dict[str, Any] = {
            "zero": case.zero, "average": False, "precision": case.precision, "overlap": case.overlap,
            "bucket_bytes": case.bucket_bytes, "first_bucket_bytes": max(1, case.bucket_bytes // 3),
        }  # fmt: skip
        self.parallel: DataParallel | Pipeline
        if case.pp > 1:
            make_hook = None if case.hook is None else self._make_hook
            schedule = case.layout.pipeline_schedule()
            self.parallel = Pipeline(
                model, self.mesh, schedule, recompute=case.recompute, make_hook=make_hook, **wrapped
            )  # fmt: skip
        else:
            recompute(model, case.recompute)
            if case.hook is not None:
                wrapped["state"], wrapped["hook"] = self._make_hook()
            self.parallel = DataParallel(model, self.mesh, **wrapped)
        for copied in (p for part in self.parallel.parts for p in part.module.parameters() if hasattr(p, "copy_of")):
            if case.hook is not None:  # elsewhere nobody asks for it, and gradients may have left by then
                copied.register_post_accumulate_grad_hook(self._note)
        self.optimizer = self.parallel.optimizer(kind, **options)

    def _make_hook(self) -> tuple[Any, Any]:
        assert self.case.hook is not None
        state, hook = hooks.make_hook(self.case.hook, self.mesh.group("dp", "cp"))
        self.states.append(state)
        return state, hook

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters, by their names in the model; of tied ones the first."""
        for part in self.parallel.parts:
            yield from ((n, p) for n, p in part.module.named_parameters() if not hasattr(p, "copy_of"))

    def _note(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.local = max(self.local, float(parameter.grad.abs().max()))

    def weights(self) -> dict[str, Tensor]:
        """Whole, on every rank: those that the optimizer steps."""
        masters: dict[str, Any] = {}
        if self.case.precision is not None:
            masters = self.optimizer.state_dict()["state"]
        with self.parallel.gathered():
            found = {
                name: gather_parameter(p, self.mesh, masters.get(name, {}).get("master")).clone()
                for name, p in self._named()
            }
        return self.parallel.everywhere(found) if isinstance(self.parallel, Pipeline) else found

    def step(self, step: int) -> tuple[float, float]:
        """(loss of the whole batch, norm before clipping)."""
        mesh, case = self.mesh, self.case
        group = mesh.group("dp", "cp")
        mine = {name: mesh.shard(x) for name, x in batch(self.variant, step).items()}
        rows = mesh.shard_rows(torch.arange(ROWS))
        count = group.all_reduce((mine["targets"] != -100).sum())
        loss = torch.zeros((), dtype=torch.float64)
        self.optimizer.zero_grad()
        for index, own in enumerate(torch.arange(len(rows)).chunk(case.accumulate)):
            last = index + 1 == case.accumulate
            part = {name: x[own] for name, x in mine.items()}
            with rng.at(place(self.variant, step, rows[own], case.cp, mesh.index("cp"))):
                loss += self._backward(part, count, last)
        self.parallel.finish()
        norm = self.parallel.clip_(MAX_NORM)
        self.optimizer.step()
        return float(mesh.group("pp", "dp", "cp").all_reduce(loss)), norm

    def _backward(self, part: Batch, count: Tensor, last: bool) -> Tensor:
        if isinstance(self.parallel, Pipeline):
            return self.parallel.forward_backward(part, divisor=count, more=not last)
        total = loss_sum(self.parallel, part) / count
        with nullcontext() if last else self.parallel.no_sync():
            total.backward()
        return total.detach()

    def close(self) -> None:
        for state in self.states:
            state.close()
        self.mesh.close()


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference, relative to the largest entry of its tensor, and where it is."""
    assert found.keys() == expected.keys()
    return max((float((found[n] - b).abs().max() / b.abs().max()), n) for n, b in expected.items())


def spread(trainer: Trainer, comm: Any, dtype: torch.dtype, steps: int = STEPS) -> dict[str, Any]:
    """How far the run of a layout is from that on one process; initial weights and masks must be the same bits."""
    expected = one_process(trainer.case.variant, dtype)
    initial = trainer.weights()
    assert initial.keys() == expected.initial.keys()
    assert all(torch.equal(x, expected.initial[name]) for name, x in initial.items()), "initial weights"
    cores = {core.stream for core in trainer.variant.build().modules() if isinstance(core, Attention)}
    losses, norms = [], []
    for step in range(steps):
        with recorded_masks() if step == 0 else nullcontext(dict) as masks:
            loss, norm = trainer.step(step)
        if step == 0:
            expect_same_masks(comm, masks(), expected.masks, cores)
        losses.append(loss)
        norms.append(norm)

    def worst(ours: list[float], theirs: list[float]) -> float:
        return max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=False))

    found: dict[str, Any] = {"losses": worst(losses, expected.losses), "norms": worst(norms, expected.norms)}
    if steps == STEPS:
        found["weights"], found["where"] = apart(trainer.weights(), expected.weights)
    return found


def digest(trainer: Trainer, steps: int) -> str:
    """Of the losses and norms of some steps, and of the weights after them."""
    sha = hashlib.sha256()
    for step in range(steps):
        sha.update(repr(trainer.step(step)).encode())
    return bits(trainer.weights(), sha)


def bits(tensors: dict[str, Tensor], sha: Any = None) -> str:
    sha = hashlib.sha256() if sha is None else sha
    for name in sorted(tensors):
        assert tensors[name].isfinite().all(), name
        sha.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return str(sha.hexdigest())


# --- probes: a step from the weights that a layout has, beside one process's step from the same weights ---
@dataclass
class Probe:
    """Errors of the gradients that an optimizer was given, as shares of what is allowed: at most 1."""

    elements: float
    whole: float
    alike: bool
    """Whether all ranks had the same weights all the time, of which those of tp hold some twice."""


def gradient_at(
    case: Case, weights: dict[str, Tensor], step: int, dtype: torch.dtype
) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients as float64) of the whole batch on one process, at these weights rounded to `dtype`."""
    variant = VARIANTS[case.variant]
    model = variant.build().to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    loss = backward(model, variant, step)
    return loss, {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def probe(comm: Any, case: Case, steps: int) -> Probe:
    """Plain gradient descent at a rate of 1, so that the weights' difference is the clipped gradient.

    What is allowed. A hook of 8 bits: every message is off by 1/254 of the largest number in it, and there are two; a
    step gives what it held back to the next. bfloat16: twice what one process in bfloat16 is off from float64.
    """
    trainer = Trainer(comm, case, torch.float32, torch.optim.SGD, lr=1.0)
    ranks = case.dp * case.cp
    worst, whole, alike = 0.0, 0.0, True
    before = trainer.weights()
    for step in range(steps):
        trainer.local = 0.0
        loss, norm = trainer.step(step)
        after = trainer.weights()
        alike &= len(set(comm.exchange(bits(after).encode()))) == 1
        largest = float(comm.all_reduce(torch.tensor(trainer.local, dtype=torch.float64), "max"))
        factor = min(1.0, MAX_NORM / (norm + 1e-6))
        found = {name: (before[name].double() - after[name].double()) / factor for name in before}
        assert abs(float(flat(found).norm()) / norm - 1) < 1e-3, "not clipped to the norm"
        right_loss, exact = gradient_at(case, before, step, torch.float64)
        expected, rounding = exact, torch.zeros(())
        if case.precision is not None:
            rounded_loss, expected = gradient_at(case, before, step, torch.bfloat16)
            rounding = flat(expected) - flat(exact)
            assert abs(loss - rounded_loss) <= 0.01, (loss, rounded_loss)
        else:
            assert abs(loss / right_loss - 1) < 1e-5
        allowed = 2 * float(rounding.abs().max()) + 1e-6
        error = flat(found) - flat(expected)
        if case.hook is not None:
            allowed += ranks * largest / 127 * (1.01 if step == 0 else 2.1)
        else:
            whole = max(whole, float(error.norm()) / (2 * float(rounding.norm())))
        worst = max(worst, float(error.abs().max()) / allowed)
        before = after
    trainer.close()
    return Probe(worst, whole, alike)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])
