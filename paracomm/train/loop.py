"""The training loop: AdamW, cosine schedule with warm-up, clipping by global norm, evaluation, checkpoints."""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from paracomm import kernels
from paracomm.comm.agreement import outcomes
from paracomm.errors import Error, InvalidArgument, Mismatch
from paracomm.models.gpt import GPT
from paracomm.parallel import Pipeline
from paracomm.parallel.bucket import MIB
from paracomm.parallel.loss import IGNORED
from paracomm.parallel.rng import Place, at
from paracomm.timeline import span
from paracomm.train.checkpoint import Checkpointer, list_checkpoints, read_state
from paracomm.train.config import DTYPES, TrainConfig
from paracomm.train.data import Corpus, batch, evaluation_batches, load_corpus
from paracomm.train.metrics import Display, MetricLog
from paracomm.train.replicas import MeshReplicas, Replicas, open_replicas, use_one_thread
from paracomm.train.trace import Tracer, make_folder
from paracomm.train.whole import whole_weights

FINAL_LR_SHARE = 0.1


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine from `lr` to a tenth of it at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Trainer:
    """Model, optimizer and data of one rank; `backward` and `update` make one step. Everything is collective."""

    def __init__(self, config: TrainConfig, replicas: Replicas, corpus: Corpus) -> None:
        self.config = config
        self.replicas = replicas
        self.corpus = corpus
        self._share = config.share(replicas.part[1])
        self._positions = replicas.positions(config.model.context)
        model = GPT(config.model, seed=config.seed).to(DTYPES[config.dtype])
        self.parameter_count = sum(parameter.numel() for parameter in model.parameters())
        self.replicated = replicas.replicate(model, int(config.bucket_mib * MIB), self._share)
        self.model = self.replicated if isinstance(self.replicated, Pipeline) else self.replicated.module
        self.optimizer = self.replicated.optimizer(
            torch.optim.AdamW, _groups(self.model, config), lr=config.lr, betas=(0.9, 0.95), fused=True
        )

    def backward(self, step: int) -> Tensor:
        """Gradients of `step`'s global batch, reduced; returns this rank's share of the loss, in nats.

        The mean over all ranks is the loss: each has equally many positions, and of a pipeline the last rank counts for
        all of them.
        """
        config, (index, parts) = self.config, self.replicas.part
        inputs, targets = batch(
            self.corpus.train,
            config.model.context,
            config.batch,
            seed=config.seed,
            step=step,
            rank=index,
            world_size=parts,
        )
        self.optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for turn, (x_BT, y_BT) in enumerate(zip(inputs.split(self._share), targets.split(self._share), strict=True)):
            last = turn == config.accumulate - 1
            place = self._place(step, (index * config.accumulate + turn) * self._share, len(x_BT))
            with at(place):
                total += self._turn(x_BT[:, self._positions], y_BT[:, self._positions], turn, last)
        self.replicated.finish()
        return total

    def _turn(self, x_BT: Tensor, y_BT: Tensor, turn: int, last: bool) -> Tensor:
        replicated, divisor = self.replicated, y_BT.numel() * self.config.accumulate
        if isinstance(replicated, Pipeline):
            batch = {"tokens": x_BT, "targets": y_BT}
            return replicated.forward_backward(batch, divisor=divisor, more=not last) * self.config.layout.pp
        with nullcontext() if last else replicated.no_sync():
            with span("compute", "forward", turn=turn):
                nats, _ = replicated(x_BT, y_BT)
                loss = nats / divisor
            with span("compute", "backward", turn=turn):
                loss.backward()
        return cast("Tensor", loss.detach())

    def _place(self, step: int, first_row: int, rows: int) -> Place:
        return Place(self.config.seed, step, torch.arange(first_row, first_row + rows), self._positions)

    def update(self, step: int) -> float:
        """Clips, steps the optimizer, and returns the gradients' global norm before clipping."""
        with span("compute", "clip"):
            norm = self.replicated.clip_(self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        with span("compute", "optimizer"):
            self.optimizer.step()
        return norm

    @torch.no_grad()
    def evaluate(self) -> float:
        """Bits a byte on the held-out text, over all ranks."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        index, parts = self.replicas.part
        for x_BT, y_BT in evaluation_batches(
            self.corpus.held_out,
            self.config.model.context,
            self.config.eval_windows,
            self._share,
            rank=index,
            world_size=parts,
        ):
            for nats, count in self._evaluated(x_BT[:, self._positions], y_BT[:, self._positions]):
                sums += torch.stack([nats.double(), count.double()])
        self.model.train()
        self.replicas.sum(sums)
        return float(sums[0] / sums[1]) / math.log(2)

    def _evaluated(self, x_BT: Tensor, y_BT: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(sum of the nats, targets that count) of this rank's windows; of a pipeline the last rank has them."""
        if not isinstance(self.replicated, Pipeline):
            with at(self._place(0, 0, len(x_BT))):
                return [self.model(x_BT, y_BT)]
        missing = -len(x_BT) % self.config.layout.microbatch_count
        x_BT = torch.cat([x_BT, x_BT[:1].expand(missing, -1)])
        y_BT = torch.cat([y_BT, torch.full((missing, y_BT.shape[1]), IGNORED)])
        with at(self._place(0, 0, len(x_BT))):
            return [(nats, count) for nats, count in self.replicated({"tokens": x_BT, "targets": y_BT})]

    def sample(self) -> bytes:
        """The prompt and what follows, on rank 0; b"" elsewhere, unless ranks have to write together."""
        config, layout = self.config, self.config.layout
        if layout.pp > 1:
            weights = whole_weights(self.replicated)
            if self.replicas.rank:
                return b""
            model = GPT(config.model).to(next(iter(weights.values())).dtype)
            model.load_state_dict(weights, strict=False)  # a tied head has no name of its own
        elif self.replicas.rank and layout.tp == 1 and layout.zero < 3:
            return b""
        else:
            model = cast("GPT", self.model)
        return model.generate(config.prompt_bytes, config.sample_bytes, seed=config.seed)


def _groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


@dataclass
class Window:
    """Sums since the last record."""

    steps: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    blocked_s: float = 0.0

    def record(self, trainer: Trainer, step: int, norm: float) -> dict[str, float | None]:
        """The window's figures, the loss averaged over the ranks; every rank calls it."""
        config, replicas = trainer.config, trainer.replicas
        loss = float(replicas.sum(torch.tensor([self.loss], dtype=torch.float64))) / replicas.world_size / self.steps
        measured = trainer.replicated.blocked_s is not None
        return {
            "loss": loss,
            "bits_per_byte": loss / math.log(2),
            "lr": learning_rate(config, step),
            "gradient_norm": norm,
            "tokens_per_s": self.steps * config.batch * config.model.context / self.seconds,
            "steps_per_s": self.steps / self.seconds,
            "wait_share": self.blocked_s / self.seconds if measured else None,
        }


@dataclass(frozen=True)
class Result:
    """How a run ended: bits a byte on held-out text, and the entropy that a byte count alone reaches."""

    steps: int
    held_out_bits: float
    unigram_bits: float
    sample: bytes


def train(config: TrainConfig) -> Result:
    """Trains as `config` says, on the ranks of this job; rank 0 reports and writes `config.folder`.

    Raises InvalidArgument, Mismatch (the ranks do not have the same text or checkpoint), Error (the loss is not finite)
    and what communication raises.
    """
    use_one_thread()
    replicas = open_replicas(config.reducer, config.backend, config.layout)
    try:
        with kernels.backend(config.kernel_backend):
            return _train(config, replicas)
    finally:
        replicas.close()


def _train(config: TrainConfig, replicas: Replicas) -> Result:
    config.share(replicas.part[1])
    corpus, checkpoint, first_step = _inputs(config, replicas)
    trainer = Trainer(config, replicas, corpus)
    log = _make_folders(config, replicas, first_step)
    try:
        with Checkpointer(
            config.checkpoints, trainer.replicated, trainer.optimizer, ranks=replicas.beside()
        ) as checkpoints:
            if checkpoint is not None:
                checkpoints.load(checkpoint)
            return _run(trainer, checkpoints, first_step, log)
    finally:
        if log is not None:
            log.close()


def read_corpus(config: TrainConfig, replicas: Replicas) -> Corpus:
    """The text, read on each rank. Collective; raises on every rank what is wrong on one."""
    corpora: list[Corpus] = []

    def read() -> str:
        corpora.append(load_corpus(config.data))
        corpora[0].expect_context(config.model.context)
        return corpora[0].digest

    digests = outcomes(replicas.exchange, read)
    _expect_same(replicas.rank, digests, f"the text under '{corpora[0].source}'")
    return corpora[0]


def _inputs(config: TrainConfig, replicas: Replicas) -> tuple[Corpus, Path | None, int]:
    """The text, the checkpoint to go on from and its step: each rank's own, which must be the same."""
    corpus, found = read_corpus(config, replicas), []

    def read_checkpoint() -> int:
        found.append(_checkpoint_to_resume(config, corpus))
        return 0 if found[0] is None else int(read_state(found[0])["step"])

    steps = outcomes(replicas.exchange, read_checkpoint)
    _expect_same(replicas.rank, steps, f"the last checkpoint in '{config.checkpoints}'")
    return corpus, found[0], steps[0]


def _make_folders(config: TrainConfig, replicas: Replicas, first_step: int) -> MetricLog | None:
    """Where the run will write, tried before it begins; rank 0's log. Collective."""
    log: MetricLog | None = None

    def make_room() -> None:
        nonlocal log
        try:
            if not config.resume:
                _move_aside(config.folder)
                if list_checkpoints(config.checkpoints):
                    _move_aside(config.checkpoints)
            log = MetricLog(config.folder, first_step)
            (config.folder / "config.json").write_text(json.dumps(config.described(), indent=1) + "\n")
        except OSError as error:
            raise InvalidArgument(f"train: cannot write to '{config.folder}': {error}") from error

    outcomes(replicas.exchange, make_room if replicas.rank == 0 else None)
    if config.trace is not None:
        outcomes(replicas.exchange, partial(make_folder, config.trace))
    return log


def _run(trainer: Trainer, checkpoints: Checkpointer, first_step: int, log: MetricLog | None) -> Result:
    config, replicas = trainer.config, trainer.replicas
    with (
        Display(config.steps, first_step, rank=replicas.rank) as display,
        _tracer(trainer, display, first_step) as tracer,
    ):
        _introduce(display, trainer, first_step, log)
        held_out_bits = _steps(trainer, display, log, checkpoints, first_step, tracer)
        checkpoints.wait()
    return _conclude(trainer, display, held_out_bits)


def _tracer(trainer: Trainer, display: Display, first_step: int) -> Tracer:
    config, replicas = trainer.config, trainer.replicas
    comm = replicas.comm if isinstance(replicas, MeshReplicas) else None
    return Tracer(config.trace, config.trace_steps, first_step, config.steps, comm, display.say)


def _steps(
    trainer: Trainer, display: Display, log: MetricLog | None, checkpoints: Checkpointer, first_step: int,
    tracer: Tracer,
) -> float:  # fmt: skip
    """All steps from `first_step`; returns the last evaluation."""
    config, held_out_bits = trainer.config, math.nan
    window = Window()
    for step in range(first_step, config.steps):
        blocked = trainer.replicated.blocked_s or 0.0
        with tracer.step(step):
            start = time.perf_counter()
            loss = float(trainer.backward(step))
            window.loss += loss
            norm = trainer.update(step)
            window.seconds += time.perf_counter() - start
        window.blocked_s += (trainer.replicated.blocked_s or 0.0) - blocked
        window.steps += 1
        done, last = step + 1, step + 1 == config.steps
        values = None
        if not math.isfinite(norm):  # the same on every rank
            raise Error(
                f"train: the loss is {loss} and the norm of its gradients {norm} at step {done}; try a smaller --lr"
            )
        if done % config.log_every == 0 or last:
            values = window.record(trainer, step, norm)
            window = Window()
            if log is not None:
                log.write(done, values)
            if not math.isfinite(values["loss"] or 0.0):
                raise Error(f"train: the loss is {values['loss']} at step {done}; try a smaller --lr")
        display.advance(done, values)
        if done % config.eval_every == 0 or last:
            held_out_bits = trainer.evaluate()
            display.say(f"step {done}/{config.steps}  held-out {held_out_bits:.3f} bits/byte")
            if log is not None:
                log.write(done, {"held_out_bits_per_byte": held_out_bits})
        if done % config.checkpoint_every == 0 or last:
            layout = {"ranks": trainer.replicas.world_size, "layout": str(config.layout)}
            checkpoints.save(done, {"config": config.described(), "corpus": trainer.corpus.digest, **layout})
    return held_out_bits if first_step < config.steps else trainer.evaluate()


def _checkpoint_to_resume(config: TrainConfig, corpus: Corpus) -> Path | None:
    if not config.resume:
        return None
    checkpoints = list_checkpoints(config.checkpoints)
    if not checkpoints:
        raise InvalidArgument(f"train: nothing to resume from in '{config.checkpoints}'")
    state = read_state(checkpoints[-1])
    wanted = config.described()
    decisive = ("model", "batch", "accumulate", "seed", "dtype")
    if not isinstance(state.get("config"), dict) or not {"corpus", *decisive} <= {"corpus", *state["config"]}:
        raise InvalidArgument(
            f"train: '{checkpoints[-1]}' was not saved by paracomm train: it has no settings of a run"
        )
    changed = [name for name in decisive if state["config"][name] != wanted[name]]
    if changed:
        was = ", ".join(f"{name} was {state['config'][name]} and is {wanted[name]}" for name in changed)
        raise InvalidArgument(f"train: '{checkpoints[-1]}' is of another run: {was}")
    if state.get("corpus") != corpus.digest:
        raise InvalidArgument(f"train: '{checkpoints[-1]}' was trained on other text than '{corpus.source}' holds now")
    return checkpoints[-1]


def _move_aside(folder: Path) -> None:
    """A fresh run of a name that exists keeps the old one beside it as NAME.1, NAME.2, ..."""
    if folder.exists():
        taken = 1
        while (aside := folder.with_name(f"{folder.name}.{taken}")).exists():
            taken += 1
        folder.rename(aside)


def _expect_same(rank: int, values: list[Any], what: str) -> None:
    others = [other for other, value in enumerate(values) if value != values[rank]]
    if others:
        raise Mismatch(f"train rank {rank}: ranks {others} do not have {what} that this rank has")


def _introduce(display: Display, trainer: Trainer, first_step: int, log: MetricLog | None) -> None:
    config, corpus, replicas = trainer.config, trainer.corpus, trainer.replicas
    shape, layout = config.model, str(config.layout)
    display.say(
        f"GPT of {trainer.parameter_count:,} parameters (width {shape.width}, depth {shape.depth}, context "
        f"{shape.context}), {replicas.world_size} x {config.reducer}{layout and f' ({layout})'}, batch {config.batch} "
        f"x {shape.context} bytes"
    )
    display.say(
        f"text: {len(corpus.train):,} bytes in {corpus.files[0]} files, {len(corpus.held_out):,} held out in "
        f"{corpus.files[1]}, from {corpus.source}"
    )
    if log is not None and not log.has_tensorboard:
        display.say(f"tensorboard is not installed (pip install tensorboard): metrics go to {log.path} only")
    if first_step:
        display.say(f"resumed at step {first_step} of {config.steps}")


def _conclude(trainer: Trainer, display: Display, held_out_bits: float) -> Result:
    config, unigram_bits, sample = trainer.config, trainer.corpus.unigram_bits(), trainer.sample()
    display.say(f"held-out {held_out_bits:.3f} bits/byte; byte frequencies alone give {unigram_bits:.3f}")
    display.say(f"run in {config.folder}; a sample:\n{sample.decode(errors='replace')}")
    trainer.replicas.barrier()
    return Result(config.steps, held_out_bits, unigram_bits, sample)
