"""The head of a language model and its loss: on one process, and over a vocabulary that lies on several ranks.

Cross-entropy over ranks (Shoeybi et al., "Megatron-LM", 2019, section 3), for each row l of logits and its target:

    m = max l           all_reduce(max) of the ranks' own
    s = sum exp(l - m)  all_reduce, together with the target's l - m, which its owner has and the others take as 0
    loss = log s - (l_target - m);     dloss/dl = exp(l - m) / s - [target]

so that 3 numbers a row are sent, whatever the vocabulary. The sum over rows is the same on every rank. Where kernels
run, logits are never held: a rank gives log sum exp(l) of its own, which takes the place of max l above.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paracomm import kernels
from paracomm.comm import Communicator
from paracomm.errors import InvalidArgument
from paracomm.kernels.derivatives import once

IGNORED = -100
"""A target that does not count."""


class Head(nn.Module):
    """x [..., D] -> logits [..., V] = x weight^T + bias, of the table `weight` [V, D], which an embedding may share."""

    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of the cross-entropies, count), in nats, over the targets [...] (int64) that are not -100.

        The sum is float32 or wider, the count int64; both are scalars. Divide by the count over all ranks of dp and cp.
        Logits of a large vocabulary are not held, see kernels.linear_cross_entropy.
        """
        return kernels.linear_cross_entropy(
            x.flatten(0, -2), self.weight, self.bias, targets.reshape(-1), ignore=IGNORED
        )


def vocabulary_loss(logits: Tensor, targets: Tensor, group: Communicator, first: int) -> tuple[Tensor, Tensor]:
    """(sum, count) as of Head.loss(), where this rank has the logits [N, V_r] of tokens `first`.. for targets [N].

    Every rank of `group` gives the same targets and gets the same sum. Raises InvalidArgument for other shapes.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise InvalidArgument(
            f"vocabulary_loss: logits {list(logits.shape)} and targets {list(targets.shape)}, expected [N, V] and [N]"
        )
    return _VocabularyLoss.apply(logits, targets, group, first), (targets != IGNORED).sum()


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: Communicator, first: int) -> Tensor:
        e = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        counted = targets != IGNORED
        local = targets - first
        own = (local >= 0) & (local < e.shape[1])  # never where the target is IGNORED
        local = local.masked_fill(~own, 0)
        most = group.all_reduce(e.amax(1), "max")
        e -= most.unsqueeze(1)
        sums = e.new_empty(2, len(e))
        sums[1] = e.gather(1, local.unsqueeze(1)).squeeze(1).masked_fill(~own, 0.0)
        sums[0] = e.exp_().sum(1)
        group.all_reduce(sums)
        ctx.save_for_backward(e, sums[0], local, own, counted)
        ctx.dtype = logits.dtype
        return (sums[0].log() - sums[1]).masked_fill(~counted, 0.0).sum()

    @staticmethod
    @once("vocabulary_loss")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        e, s, local, own, counted = ctx.saved_tensors
        dlogits = e * (grad * counted / s).unsqueeze(1)
        dlogits.scatter_add_(1, local.unsqueeze(1), -(grad * own).unsqueeze(1))
        return dlogits.to(ctx.dtype), None, None, None


def merged_loss(lse_N: Tensor, logit_N: Tensor, targets_N: Tensor, group: Communicator) -> tuple[Tensor, Tensor]:
    """(sum, count) as of vocabulary_loss(), of what kernels.partial_cross_entropy gives on each rank."""
    counted = targets_N != IGNORED
    return _MergedLoss.apply(lse_N, logit_N, counted, group), counted.sum()


class _MergedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lse: Tensor, logit: Tensor, counted: Tensor, group: Communicator) -> Tensor:
        most = group.all_reduce(lse.clone(), "max")
        sums = torch.stack([(lse - most).exp(), logit])
        own = sums[0].clone()
        group.all_reduce(sums)
        ctx.save_for_backward(own / sums[0], counted)
        return (most + sums[0].log() - sums[1]).masked_fill(~counted, 0.0).sum()

    @staticmethod
    @once("merged_loss")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        share, counted = ctx.saved_tensors
        return grad * counted * share, -grad * counted, None, None
