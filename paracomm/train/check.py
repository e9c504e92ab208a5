"""Data-parallel training beside the same model in one process: losses and gradients must agree.

Both start from the same seed and go on from their own updates, so that an error in any step shows in all later ones.
A gradient's error is the largest difference over the tensor's largest entry.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from paracomm.train.config import TrainConfig
from paracomm.train.data import Corpus, load_corpus
from paracomm.train.loop import Trainer
from paracomm.train.replicas import Alone, Replicas, open_replicas, use_one_thread

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


@dataclass(frozen=True)
class Agreement:
    """One step's comparison; the worst over all ranks."""

    dtype: str
    step: int
    loss: float
    loss_error: float
    gradient_error: float
    worst_parameter: str
    identical_ranks: bool

    @property
    def ok(self) -> bool:
        limit = TOLERANCE[self.dtype]
        return self.loss_error <= limit and self.gradient_error <= limit and self.identical_ranks


def check(config: TrainConfig, steps: int = 5) -> list[Agreement]:
    """Trains `steps` steps both ways, in float64 and float32, on the ranks of this job; all have the same answer."""
    use_one_thread()
    replicas = open_replicas(config.reducer, config.backend)
    try:
        config.share(replicas.world_size)
        corpus = load_corpus(config.data)
        return [row for dtype in TOLERANCE for row in compare(config, dtype, steps, replicas, corpus)]
    finally:
        replicas.close()


def compare(config: TrainConfig, dtype: str, steps: int, replicas: Replicas, corpus: Corpus) -> list[Agreement]:
    """`steps` rows for one dtype."""
    config = replace(config, dtype=dtype, model=replace(config.model, dropout=0.0))
    parallel = Trainer(config, replicas, corpus)
    single = Trainer(config, Alone(), corpus)
    rows = []
    for step in range(steps):
        mean = replicas.sum(parallel.backward(step).view(1)) / replicas.world_size
        expected = single.backward(step)
        loss_error = abs(float(mean) - float(expected)) / abs(float(expected))
        names, errors = _gradient_errors(parallel, single)
        worst = int(errors.argmax())
        everyone = _gather(replicas, torch.stack([errors[worst], torch.tensor(loss_error).double()]))
        rows.append(
            Agreement(
                dtype=dtype,
                step=step,
                loss=float(mean),
                loss_error=float(everyone[:, 1].max()),
                gradient_error=float(everyone[:, 0].max()),
                worst_parameter=names[worst],
                identical_ranks=_same_bits(replicas, parallel),
            )
        )
        parallel.update(step)
        single.update(step)
    return rows


def _gradient_errors(ours: Trainer, theirs: Trainer) -> tuple[list[str], torch.Tensor]:
    names, errors = [], []
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        scale = b.grad.abs().max().double().clamp_min(torch.finfo(b.dtype).tiny)
        names.append(name)
        errors.append((a.grad.double() - b.grad.double()).abs().max() / scale)
    return names, torch.nan_to_num(torch.stack(errors), nan=float("inf"))


def _same_bits(replicas: Replicas, trainer: Trainer) -> bool:
    """Whether every gradient has the same bits on all ranks, by a checksum of its words."""
    words = torch.int64 if trainer.config.dtype == "float64" else torch.int32
    sums = []
    for parameter in trainer.model.parameters():
        assert parameter.grad is not None
        bits = parameter.grad.contiguous().view(-1).view(words).long()
        sums.append((bits * (2 * torch.arange(len(bits)) + 1)).sum())
    everyone = _gather(replicas, torch.stack(sums))
    return bool((everyone == everyone[0]).all())


def _gather(replicas: Replicas, x: torch.Tensor) -> torch.Tensor:
    everyone = torch.zeros(replicas.world_size, *x.shape, dtype=x.dtype)
    everyone[replicas.rank] = x
    return replicas.sum(everyone)
