"""One model, its one-process gradients, and every hook with the error that it states: what test_acceptance walks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import (
    debugging_hooks,
    default_hooks,
    post_localSGD_hook,
    powerSGD_hook,
    quantization_hooks,
)

from paracomm import hooks

STEPS = 4
ROWS = 4
"""Of the whole batch: a weight's gradient has at most this rank, which PowerSGD of rank 4 keeps exactly."""


def model() -> nn.Module:
    """Several buckets of 20,000 bytes, sizes that no block divides."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(41, 65), nn.Tanh(), nn.Linear(65, 67), nn.Tanh(), nn.Linear(67, 49), nn.Tanh(), nn.Linear(49, 3)
    )


BUCKET_BYTES = 20_000


def batch(step: int) -> Tensor:
    return torch.randn(ROWS, 41, generator=torch.Generator().manual_seed(step))


def share(x: Tensor, rank: int, world_size: int) -> Tensor:
    rows = len(x) // world_size
    return x[rank * rows : (rank + 1) * rows]


def loss(output: Tensor) -> Tensor:
    return output.square().mean()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}


@dataclass
class Truth:
    """What one process computes in a step: each rank's gradients, and the mean's over the whole batch."""

    ranks: list[dict[str, Tensor]]
    mean: dict[str, Tensor]

    def largest(self) -> float:
        """The largest magnitude in any rank's gradients."""
        return max(float(g.abs().max()) for of in self.ranks for g in of.values())

    def magnitude(self, name: str) -> Tensor:
        """The mean over the ranks of the magnitudes."""
        return torch.stack([of[name].abs() for of in self.ranks]).mean(0)


def truth(step: int, world_size: int) -> Truth:
    single = model()

    def gradient(x: Tensor) -> dict[str, Tensor]:
        single.zero_grad()
        loss(single(x)).backward()
        return gradients(single)

    x = batch(step)
    return Truth([gradient(share(x, rank, world_size)) for rank in range(world_size)], gradient(x))


# --- stated errors: an allowance for every element, or for a whole tensor, of the first step ---
Bound = Callable[[Truth, str, Tensor], None]


def within(allowed: Tensor | float, result: Tensor, expected: Tensor, name: str) -> None:
    excess = ((result - expected).abs() - allowed).max()
    assert excess <= 0, f"{name}: {float(excess):.2e} beyond the stated error"


def exact(truth: Truth, name: str, result: Tensor) -> None:
    within(1e-5 * truth.largest(), result, truth.mean[name], name)


def rounded(unit: float) -> Bound:
    """Casts: each rank's rounding, and one for every addition, none of which is to more than the magnitudes."""

    def check(truth: Truth, name: str, result: Tensor) -> None:
        within(len(truth.ranks) * unit * truth.magnitude(name) + 1e-6, result, truth.mean[name], name)

    return check


def levels(count: float) -> Bound:
    """Both quantisations err by half a step of the largest magnitude at most, of which there are `count`."""

    def check(truth: Truth, name: str, result: Tensor) -> None:
        within(1.01 * truth.largest() / count, result, truth.mean[name], name)

    return check


def kept_largest(truth: Truth, name: str, result: Tensor) -> None:
    within(truth.largest(), result, truth.mean[name], name)


def not_larger(truth: Truth, name: str, result: Tensor) -> None:
    """A projection: the error of all of it is no larger than what is projected."""
    whole = torch.cat([g.flatten() for g in truth.mean.values()]).norm()
    assert (result - truth.mean[name]).norm() <= 1.01 * whole, name


def own(truth: Truth, name: str, result: Tensor) -> None:
    within(1e-6, result, truth.ranks[dist.get_rank()][name], name)


@dataclass
class Case:
    """A hook: `state` makes its state, given where the ranks meet. `alike`: all ranks get the same bits."""

    hook: Callable[[Any, Any], Any]
    state: Callable[[Any], Any]
    bound: Bound
    ours: bool = False
    on_gloo: bool = True
    alike: bool = True
    lost: float | None = None
    """Keeps a residual: what came out and what is kept add up to what went in, but for this share of it (rounding of
    sums in 16 bits)."""


BOUNDS: dict[str, tuple[Bound, float | None]] = {
    "allreduce": (exact, None),
    "fp16": (rounded(2.0**-11), STEPS * 2.0**-10),
    "bf16": (rounded(2.0**-8), STEPS * 2.0**-7),
    "int8": (levels(127), 1e-4),
    "int4": (levels(49 / 13), 1e-4),
    "topk": (kept_largest, 1e-4),
    "powersgd": (exact, 1e-4),
    "batched_powersgd": (not_larger, 1e-4),
    "fp16+powersgd": (levels(500), STEPS * 2.0**-9),
    "local_sgd": (exact, None),
    "hierarchical": (exact, None),
    "hierarchical+int8": (levels(127), None),
}
"""The stated error of each of our hooks, and `lost` of those with a residual: one without a line fails the test."""


KINDS = {
    **hooks.HOOKS,
    "int4": replace(hooks.HOOKS["int4"], make=partial(hooks.HOOKS["int4"].make, warm_up=1)),
}
"""Our hooks, with warm-ups that end within a test."""


def ours() -> dict[str, Case]:
    return {
        name: Case(kind.hook, kind.make, BOUNDS[name][0], ours=True, lost=BOUNDS[name][1])
        for name, kind in KINDS.items()
    }


def torchs() -> dict[str, Case]:
    """torch's own, as they come. Their state is a process group where it is no state of theirs."""
    power = partial(
        powerSGD_hook.PowerSGDState, matrix_approximation_rank=4, start_powerSGD_iter=2, min_compression_rate=2
    )
    local = partial(post_localSGD_hook.PostLocalSGDState, start_localSGD_iter=2)
    found = {
        "allreduce_hook": Case(default_hooks.allreduce_hook, lambda group: group, exact),
        "fp16_compress_hook": Case(default_hooks.fp16_compress_hook, lambda group: group, rounded(2.0**-10)),
        "bf16_compress_hook": Case(default_hooks.bf16_compress_hook, lambda group: group, rounded(2.0**-7)),
        # Gloo's future of an all_gather is no list of lists, which these two take apart: torch's own, in 2.13.
        "quantization_pertensor_hook": Case(
            quantization_hooks.quantization_pertensor_hook, lambda group: group, levels(100), on_gloo=False
        ),
        "quantization_perchannel_hook": Case(
            quantization_hooks.quantization_perchannel_hook, lambda group: group, levels(100), on_gloo=False
        ),
        "powerSGD_hook": Case(powerSGD_hook.powerSGD_hook, power, exact),
        # Its warm-up only: the compression itself asserts in torch 2.13 (a matrix where a stack of them is expected).
        "batched_powerSGD_hook": Case(
            powerSGD_hook.batched_powerSGD_hook, partial(power, start_powerSGD_iter=STEPS + 1), exact
        ),
        "post_localSGD_hook": Case(
            post_localSGD_hook.post_localSGD_hook, lambda group: local(process_group=group, subgroup=group), exact
        ),
        "noop_hook": Case(debugging_hooks.noop_hook, lambda group: group, own, alike=False),
        "fp16_compress_wrapper": Case(
            default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook), lambda group: group, rounded(2.0**-10)
        ),
        "bf16_compress_wrapper": Case(
            default_hooks.bf16_compress_wrapper(default_hooks.allreduce_hook), lambda group: group, rounded(2.0**-7)
        ),
    }
    return {f"torch:{name}": case for name, case in found.items()}


def check_steps(case: Case, replica: Any, module: nn.Module, state: Any, everyone: Callable[[Tensor], Tensor],
                rank: int, world_size: int) -> None:  # fmt: skip
    """STEPS steps without an optimizer: gradients beside the one-process ones, alike on all ranks, and nothing lost.

    everyone: gathers a tensor of every rank, [world_size, numel].
    """
    result = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    expected = copy.deepcopy(result)
    for step in range(STEPS):
        right = truth(step, world_size)
        module.zero_grad()
        loss(replica(share(batch(step), rank, world_size))).backward()
        if hasattr(replica, "finish"):
            replica.finish()
        for name, gradient in gradients(module).items():
            if step == 0 or case.lost is None:
                case.bound(right, name, gradient)
            if case.alike:
                bits = everyone(gradient.contiguous().flatten())
                assert (bits == bits[0]).all(), f"{name} differs between ranks in step {step}"
            result[name] += gradient
            expected[name] += right.mean[name]
    if case.lost is not None:
        kept = state.state_dict()["memory"]
        assert kept and kept.keys() <= result.keys(), "the residuals do not carry the names of the parameters"
        for name, expected_sum in expected.items():
            left = everyone(kept[name]).mean(0) if name in kept else torch.zeros(expected_sum.numel())
            missing = (result[name] + left.view_as(expected_sum) - expected_sum).abs().max()
            assert missing <= case.lost * expected_sum.abs().max() + 1e-7, f"{name}: {float(missing):.1e} was lost"
