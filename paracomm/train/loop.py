"""The training loop: AdamW, cosine schedule with warm-up, clipping by global norm, evaluation, checkpoints."""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from paracomm.errors import Error, InvalidArgument, Mismatch
from paracomm.models.gpt import GPT, next_byte_loss
from paracomm.parallel.bucket import MIB
from paracomm.parallel.rng import Place, at
from paracomm.train.checkpoint import list_checkpoints, load_checkpoint, read_state, save_checkpoint
from paracomm.train.config import DTYPES, TrainConfig
from paracomm.train.data import Corpus, batch, evaluation_batches, load_corpus
from paracomm.train.metrics import Display, MetricLog
from paracomm.train.replicas import Replicas, open_replicas, use_one_thread

FINAL_LR_SHARE = 0.1


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine from `lr` to a tenth of it at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Trainer:
    """Model, optimizer and data of one rank; `backward` and `update` make one step."""

    def __init__(
        self, config: TrainConfig, replicas: Replicas, corpus: Corpus, resume_from: Path | None = None
    ) -> None:
        self.config = config
        self.replicas = replicas
        self.corpus = corpus
        self._share = config.share(replicas.world_size)
        self.model = GPT(config.model, seed=config.seed).to(DTYPES[config.dtype])
        self.optimizer = _adamw(self.model, config)
        if resume_from is not None:
            load_checkpoint(resume_from, self.model, self.optimizer)
        self.replicated = replicas.replicate(self.model, int(config.bucket_mib * MIB))

    def backward(self, step: int) -> Tensor:
        """Gradients of `step`'s global batch in every parameter; returns this rank's share of the loss, in nats."""
        config, rank = self.config, self.replicas.rank
        inputs, targets = batch(
            self.corpus.train,
            config.model.context,
            config.batch,
            seed=config.seed,
            step=step,
            rank=rank,
            world_size=self.replicas.world_size,
        )
        self.model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for index, (x_BT, y_BT) in enumerate(zip(inputs.split(self._share), targets.split(self._share), strict=True)):
            last = index == config.accumulate - 1
            first = (rank * config.accumulate + index) * self._share
            place = Place(config.seed, step, torch.arange(first, first + len(x_BT)), torch.arange(x_BT.shape[1]))
            with at(place), nullcontext() if last else self.replicated.no_sync():
                loss = next_byte_loss(self.replicated(x_BT), y_BT) / config.accumulate
                loss.backward()
            total += loss.detach()
        self.replicated.finish()
        return total

    def update(self, step: int) -> Tensor:
        """Clips, steps the optimizer, and returns the gradients' global norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        self.optimizer.step()
        return norm

    @torch.no_grad()
    def evaluate(self) -> float:
        """Bits a byte on the held-out text, over all ranks."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for x_BT, y_BT in evaluation_batches(
            self.corpus.held_out,
            self.config.model.context,
            self.config.eval_windows,
            self._share,
            rank=self.replicas.rank,
            world_size=self.replicas.world_size,
        ):
            sums += torch.tensor([float(next_byte_loss(self.model(x_BT), y_BT)) * x_BT.numel(), x_BT.numel()])
        self.model.train()
        self.replicas.sum(sums)
        return float(sums[0] / sums[1]) / math.log(2)


def _adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


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
    replicas = open_replicas(config.reducer, config.backend)
    try:
        return _train(config, replicas)
    finally:
        replicas.close()


def _train(config: TrainConfig, replicas: Replicas) -> Result:
    config.share(replicas.world_size)
    corpus = load_corpus(config.data)
    _expect_same(replicas, int(corpus.digest[:12], 16), f"the text under '{corpus.source}'")
    checkpoint = _checkpoint_to_resume(config, corpus)
    first_step = 0 if checkpoint is None else read_state(checkpoint)["step"]
    _expect_same(replicas, first_step, f"the last checkpoint in '{config.folder}'")
    trainer = Trainer(config, replicas, corpus, checkpoint)
    log: MetricLog | None = None
    with Display(config.steps, first_step, rank=replicas.rank) as display:
        if replicas.rank == 0:
            if checkpoint is None:
                _move_aside(config.folder)
            log = MetricLog(config.folder, first_step)
            (config.folder / "config.json").write_text(json.dumps(config.described(), indent=1) + "\n")
        _introduce(display, trainer, first_step, log)
        try:
            held_out_bits = _steps(trainer, display, log, first_step)
        finally:
            if log is not None:
                log.close()
    return _conclude(trainer, display, held_out_bits)


def _steps(trainer: Trainer, display: Display, log: MetricLog | None, first_step: int) -> float:
    """All steps from `first_step`; returns the last evaluation."""
    config, held_out_bits = trainer.config, math.nan
    window = Window()
    for step in range(first_step, config.steps):
        start, blocked = time.perf_counter(), trainer.replicated.blocked_s or 0.0
        window.loss += float(trainer.backward(step))
        norm = float(trainer.update(step))
        window.seconds += time.perf_counter() - start
        window.blocked_s += (trainer.replicated.blocked_s or 0.0) - blocked
        window.steps += 1
        done, last = step + 1, step + 1 == config.steps
        values = None
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
            _save(trainer, done)
    return held_out_bits if first_step < config.steps else trainer.evaluate()


def _save(trainer: Trainer, step: int) -> None:
    if trainer.replicas.rank == 0:
        state = {"config": trainer.config.described(), "corpus": trainer.corpus.digest}
        save_checkpoint(trainer.config.folder / "checkpoints", step, trainer.model, trainer.optimizer, state)
    trainer.replicas.barrier()


def _checkpoint_to_resume(config: TrainConfig, corpus: Corpus) -> Path | None:
    if not config.resume:
        return None
    checkpoints = list_checkpoints(config.folder / "checkpoints")
    if not checkpoints:
        raise InvalidArgument(f"train: nothing to resume from in '{config.folder / 'checkpoints'}'")
    state = read_state(checkpoints[-1])
    wanted = config.described()
    decisive = ("model", "batch", "accumulate", "seed", "dtype")
    changed = [name for name in decisive if state["config"][name] != wanted[name]]
    if changed:
        was = ", ".join(f"{name} was {state['config'][name]} and is {wanted[name]}" for name in changed)
        raise InvalidArgument(f"train: '{checkpoints[-1]}' is of another run: {was}")
    if state["corpus"] != corpus.digest:
        raise InvalidArgument(f"train: '{checkpoints[-1]}' was trained on other text than '{corpus.source}' holds now")
    return checkpoints[-1]


def _move_aside(folder: Path) -> None:
    """A fresh run of a name that exists keeps the old one beside it as NAME.1, NAME.2, ..."""
    if folder.exists():
        taken = 1
        while (aside := folder.with_name(f"{folder.name}.{taken}")).exists():
            taken += 1
        folder.rename(aside)


def _expect_same(replicas: Replicas, value: int, what: str) -> None:
    values = torch.zeros(replicas.world_size, dtype=torch.int64)
    values[replicas.rank] = value
    replicas.sum(values)
    others = (values != value).nonzero().flatten().tolist()
    if others:
        raise Mismatch(f"train rank {replicas.rank}: ranks {others} do not have {what} that this rank has")


def _introduce(display: Display, trainer: Trainer, first_step: int, log: MetricLog | None) -> None:
    config, corpus, replicas = trainer.config, trainer.corpus, trainer.replicas
    shape = config.model
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    display.say(
        f"GPT of {parameters:,} parameters (width {shape.width}, depth {shape.depth}, context {shape.context}), "
        f"{replicas.world_size} x {config.reducer}, batch {config.batch} x {shape.context} bytes"
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
    config, unigram_bits, sample = trainer.config, trainer.corpus.unigram_bits(), b""
    if trainer.replicas.rank == 0:
        sample = trainer.model.generate(config.prompt.encode(), config.sample_bytes, seed=config.seed)
        display.say(f"held-out {held_out_bits:.3f} bits/byte; byte frequencies alone give {unigram_bits:.3f}")
        display.say(f"run in {config.folder}; a sample:\n{sample.decode(errors='replace')}")
    trainer.replicas.barrier()
    return Result(config.steps, held_out_bits, unigram_bits, sample)
