"""Training in any layout beside the same model in one process: losses, gradient norms and weights must agree.

Both start from the same seed and go on from their own updates, so that an error in any step shows in all later ones.
The one process is torch's own loop; of ours it has the model alone, and under mixed precision the optimizer.
The error of the weights is the 2-norm of all differences over that of all weights: AdamW makes full steps of gradients
next to zero, so that single entries differ by more than rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import paracomm
from paracomm import kernels
from paracomm.errors import InvalidArgument
from paracomm.parallel import Layout
from paracomm.train.config import TrainConfig
from paracomm.train.data import Corpus
from paracomm.train.loop import Trainer, read_corpus
from paracomm.train.replicas import MeshReplicas, Replicas, TorchReplicas, open_replicas, use_one_thread
from paracomm.train.whole import whole_weights

TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "rounded": 5e-2}
"""Relative. "rounded": bfloat16, or a hook that rounds gradients."""
EXACT_HOOKS = (None, "allreduce", "hierarchical")
ROUNDING_HOOKS = ("fp16", "bf16", "int8", "int4", "hierarchical+int8")


@dataclass(frozen=True)
class Agreement:
    """One step's comparison; the worst over all ranks."""

    dtype: str
    step: int
    loss: float
    loss_error: float
    norm_error: float
    weight_error: float
    worst_parameter: str
    identical_ranks: bool

    @property
    def ok(self) -> bool:
        worst = max(self.loss_error, self.norm_error, self.weight_error)
        return worst <= TOLERANCE[self.dtype] and self.identical_ranks


def expect_comparable(layout: Layout) -> None:
    """Raises InvalidArgument for a hook that leaves out most of a gradient."""
    if layout.hook not in (*EXACT_HOOKS, *ROUNDING_HOOKS):
        raise InvalidArgument(
            f"check: hook {layout.hook} leaves out most of each gradient, so that no step is one process's; compare "
            "the losses of whole runs"
        )


def check(config: TrainConfig, steps: int = 5) -> list[Agreement]:
    """Trains `steps` steps both ways on the ranks of this job, in float64 and float32 where both are to agree to
    rounding; all ranks have the same answer. Raises InvalidArgument as expect_comparable()."""
    expect_comparable(config.layout)
    use_one_thread()
    replicas = open_replicas(config.reducer, config.backend, config.layout)
    try:
        config.share(replicas.part[1])
        corpus = read_corpus(config, replicas)
        one = _accuracy(config) == "rounded" or config.kernels == "triton"  # which have no float64
        dtypes = [config.dtype] if one else ["float64", "float32"]
        with kernels.backend(config.kernel_backend):
            return [row for dtype in dtypes for row in compare(config, dtype, steps, replicas, corpus)]
    finally:
        replicas.close()


def _accuracy(config: TrainConfig) -> str:
    exact = config.layout.precision is None and config.layout.hook in EXACT_HOOKS
    return config.dtype if exact else "rounded"


def compare(config: TrainConfig, dtype: str, steps: int, replicas: Replicas, corpus: Corpus) -> list[Agreement]:
    """`steps` rows for one dtype."""
    config = replace(config, dtype=dtype)
    spread, single = Trainer(config, replicas, corpus), Trainer(_of_one(config), _one_process(config), corpus)
    rows = []
    for step in range(steps):
        mean = float(replicas.sum(spread.backward(step).view(1))) / replicas.world_size
        with kernels.backend("eager"):
            loss = float(single.backward(step))
        norms = spread.update(step), single.update(step)
        found, expected = whole_weights(spread.replicated), whole_weights(single.replicated)
        errors, scale = _distances(found, expected)
        here = torch.tensor([abs(mean / loss - 1), abs(norms[0] / norms[1] - 1), float(errors.norm() / scale)]).double()
        loss_error, norm_error, weight_error = _gather(replicas, here).nan_to_num(nan=float("inf")).amax(0).tolist()
        rows.append(
            Agreement(
                dtype=_accuracy(config),
                step=step,
                loss=mean,
                loss_error=loss_error,
                norm_error=norm_error,
                weight_error=weight_error,
                worst_parameter=list(expected)[int(errors.argmax())],
                identical_ranks=_same_bits(replicas, list(found.values())),
            )
        )
    return rows


def _one_process(config: TrainConfig) -> Replicas:
    """torch by itself; under mixed precision, which torch has no optimizer for, a mesh of one rank."""
    precision = config.layout.precision
    if precision is None:
        return TorchReplicas(None)
    alone = paracomm.connect(0, 1, exchange=lambda blob: [blob], transport="local")
    return MeshReplicas(Layout(precision=precision), alone)


def _of_one(config: TrainConfig) -> TrainConfig:
    return replace(config, layout=Layout(precision=config.layout.precision), reducer="paracomm")


def _distances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The 2-norm of each tensor's difference, and that of everything that was expected; float64."""
    differences = [(found[name].double() - theirs.double()).norm() for name, theirs in expected.items()]
    return torch.stack(differences), torch.stack([theirs.double().norm() for theirs in expected.values()]).norm()


def _same_bits(replicas: Replicas, tensors: list[Tensor]) -> bool:
    """Whether every tensor has the same bits on all ranks, by a checksum of its words."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = []
    for tensor in tensors:
        bits = tensor.contiguous().view(-1).view(words[tensor.itemsize]).long()
        sums.append((bits * (2 * torch.arange(len(bits)) + 1)).sum())
    everyone = _gather(replicas, torch.stack(sums))
    return bool((everyone == everyone[0]).all())


def _gather(replicas: Replicas, x: Tensor) -> Tensor:
    everyone = torch.zeros(replicas.world_size, *x.shape, dtype=x.dtype)
    everyone[replicas.rank] = x
    return replicas.sum(everyone)
