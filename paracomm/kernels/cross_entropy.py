"""Cross-entropy of a linear head without its logits: what runs cross_entropy_kernels.py, or its eager twin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paracomm.errors import InvalidArgument
from paracomm.kernels import derivatives, reference_cross_entropy, select
from paracomm.kernels.arguments import expect_indices, expect_positive, expect_tensors, is_integer, readable
from paracomm.kernels.attention import NO_CAP
from paracomm.kernels.autocast import autocast_dtype, autocast_off, cast


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    ignore: int = -100,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum of the cross-entropies of x weight^T + bias at targets, their number), without those at `ignore`.

    x [N, D], weight [V, D], bias [V] or None; targets int64 [N]. The sum is a float32 scalar (float64 for float64), in
    nats, the number int64. softcap: logits l become softcap tanh(l / softcap) (Gemma 2). Nothing of size N V is held,
    see cross_entropy_kernels.py and reference_cross_entropy.py. Differentiable in x, weight and bias, deterministic;
    second derivatives hold the logits. Under autocast logits are products in its dtype, and their loss is in float32.

    Raises InvalidArgument for shapes and dtypes that do not fit, and on a CPU for a target that is neither `ignore` nor
    in 0..V-1; on a GPU, where asking would wait for it, such a target makes the sum NaN.
    """
    expect_tensors("cross_entropy", {"x": x, "weight": weight}, {"bias": bias})
    if not is_integer(ignore):
        raise InvalidArgument(f"cross_entropy: ignore is {ignore!r}, expected an integer")
    if (lower := autocast_dtype(x)) is not None:
        x, weight, bias = cast(lower, x, weight, bias)
        with autocast_off(x):
            return linear_cross_entropy(x, weight, bias, targets, ignore=ignore, softcap=softcap)
    _check(x, weight, bias, targets, softcap)
    V = len(weight)
    if readable(targets):
        _check_targets(targets, V, ignore)
    if not select.runs(x):
        return reference_cross_entropy.linear_cross_entropy(x, weight, bias, targets, ignore, softcap)
    lse, logit, rest = _forward_op(x, weight, bias, targets, NO_CAP if softcap is None else softcap)
    counted = targets != ignore
    logit = logit.masked_fill(counted & ((targets < 0) | (targets >= V)), torch.nan)
    return (lse - logit + rest).masked_fill(~counted, 0.0).sum(), counted.sum()


def partial_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """(lse [N], logit [N]) over the rows of the table that lie here: log of the sum of exp l, and l at the target.

    As linear_cross_entropy(), but `targets` count from the first token of `weight`, and one that is not here, whatever
    it is, has a logit of 0. Both are float32 (float64 for float64) and differentiable. Over ranks r of a vocabulary
    (Shoeybi et al., "Megatron-LM", 2019, section 3):

        m = max of lse_r;  s = sum of exp(lse_r - m);  loss = m + log s - sum of logit_r
        dlse_r = exp(lse_r - m) / s dloss;  dlogit_r = -dloss

    An empty table has an lse of -inf.
    """
    expect_tensors("cross_entropy", {"x": x, "weight": weight}, {"bias": bias})
    if (lower := autocast_dtype(x)) is not None:
        x, weight, bias = cast(lower, x, weight, bias)
        with autocast_off(x):
            return partial_cross_entropy(x, weight, bias, targets, softcap=softcap)
    _check(x, weight, bias, targets, softcap)
    if not select.runs(x):
        return reference_cross_entropy.partial(x, weight, bias, targets, softcap)
    return _forward_op(x, weight, bias, targets, NO_CAP if softcap is None else softcap)[:2]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise InvalidArgument(
            f"cross_entropy: x {list(x.shape)} and weight {list(weight.shape)}, expected [N, D] and [V, D]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InvalidArgument(f"cross_entropy: bias {list(bias.shape)}, expected {[len(weight)]}")
    expect_indices("cross_entropy", "targets", targets, torch.int64, tuple(x.shape[:1]), x)
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and (given.dtype != x.dtype or given.device != x.device):
            raise InvalidArgument(
                f"cross_entropy: {name} is {given.dtype} on {given.device}, expected {x.dtype} on {x.device} as x"
            )
    expect_positive("cross_entropy", softcap=softcap)


def _check_targets(targets: Tensor, V: int, ignore: int) -> None:
    if not targets.numel():
        return
    low, high = targets.aminmax()
    if low >= 0 and high < V:  # the common case, by one pass
        return
    wrong = (targets != ignore) & ((targets < 0) | (targets >= V))
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        raise InvalidArgument(
            f"cross_entropy: target {int(targets[place])} of row {place}, expected 0 to {V - 1} or {ignore} (ignored)"
        )


@torch.library.custom_op("paracomm::cross_entropy_forward", mutates_args=())
def _forward_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, logit, rest), see cross_entropy_kernels.launch_forward."""
    if select.runs(x):
        from paracomm.kernels import cross_entropy_kernels

        return cross_entropy_kernels.launch_forward(x, weight, bias, targets, softcap)
    lse, logit = reference_cross_entropy.partial(x, weight, bias, targets, softcap or None)
    return lse, logit, torch.zeros_like(lse)


@_forward_op.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    lse = x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    return lse, torch.empty_like(lse), torch.empty_like(lse)


@torch.library.custom_op("paracomm::cross_entropy_backward", mutates_args=())
def _backward_op(
    dlse: Tensor, dlogit: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor,
    rest: Tensor, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dweight, dbias or empty)."""
    if select.runs(x):
        from paracomm.kernels import cross_entropy_kernels

        return cross_entropy_kernels.launch_backward(dlse, dlogit, x, weight, bias, targets, lse, rest, softcap)
    return reference_cross_entropy.partial_backward(dlse, dlogit, x, weight, bias, targets, lse, softcap or None)


@_backward_op.register_fake
def _(
    _: Tensor, __: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *___: Any
) -> tuple[Tensor, Tensor, Tensor]:
    like = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight))
    return *like, weight.new_empty(0 if bias is None else len(weight))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, targets, softcap = inputs
    lse, _, rest = output
    ctx.save_for_backward(x, weight, bias, targets, lse, rest)
    ctx.mark_non_differentiable(rest)
    ctx.softcap, ctx.backend = softcap, select.current()


def _differentiate(ctx: Any, dlse: Tensor, dlogit: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, targets, lse, rest = ctx.saved_tensors
    with select.backend(ctx.backend), autocast_off(x):
        if derivatives.wanted():
            found = derivatives.pull_back(
                lambda x, w, b: reference_cross_entropy.partial(x, w, b, targets, ctx.softcap or None),
                (x, weight, bias), (dlse, dlogit), ctx.needs_input_grad[:3],
            )  # fmt: skip
            return *found, None, None
        dx, dweight, dbias = _backward_op(dlse, dlogit, x, weight, bias, targets, lse, rest, ctx.softcap)
    return dx, dweight, None if bias is None else dbias, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)
