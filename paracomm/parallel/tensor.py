"""Tensor parallelism: layers whose weights lie on the ranks of a group by columns, rows or vocabulary.

    ColumnLinear         y_r = x W_r^T + b_r       W by output features; y stays on its rank
    RowLinear            y = sum_r z_r W_r^T + b   W by input features; z_r came from a column layer
    VocabularyEmbedding  rows of the table
    VocabularyHead       rows of the table; logits, or the loss with no rank ever holding a whole row of logits

Each takes a plain module's place under the same parameter names; paracomm.parallel.plan puts them there. Activations
between layers are whole on every rank or, with sequence parallelism, sharded in T; see paracomm.parallel.sequence for
what is sent then. Shapes: B batch, T positions, t = T / ranks, D width, V vocabulary, n, N rows of a matrix.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paracomm import kernels
from paracomm.comm import Communicator
from paracomm.errors import InvalidArgument
from paracomm.kernels.autocast import as_autocast
from paracomm.kernels.derivatives import once, wanted
from paracomm.parallel.loss import IGNORED, merged_loss, vocabulary_loss
from paracomm.parallel.sequence import Reduction, gather_and_multiply


class Region:
    """What the parallel layers of one model share: the group, and whether activations are sharded in T.

    Args:
        chunks: pieces of a collective that overlaps with a multiplication; None: by size.
    """

    def __init__(self, group: Communicator, *, sequence: bool = False, chunks: int | None = None) -> None:
        if chunks is not None and chunks < 1:
            raise InvalidArgument(f"chunks is {chunks}, expected None or at least 1")
        self.group = group
        self.index: int = group.rank
        self.size: int = group.world_size
        self.sequence = sequence and self.size > 1
        self.chunks = chunks

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, activations are whole on every rank, for lengths that do not divide. Without gradients."""
        before, self.sequence = self.sequence, False
        try:
            with torch.no_grad():
                yield
        finally:
            self.sequence = before

    def own(self, T: int) -> slice:
        """This rank's positions; raises InvalidArgument if the ranks do not divide T."""
        if T % self.size:
            raise InvalidArgument(f"sequence parallel: {T} positions do not divide by the {self.size} ranks of tp")
        t = T // self.size
        return slice(self.index * t, (self.index + 1) * t)


def rows_of(x: Tensor, sequence: bool) -> Tensor:
    """x [..., D] as a matrix; with `sequence` x is [B, T, D] and the rows are in the order (t, b)."""
    count = x.shape[:-1].numel()  # not -1, which no features leave open
    if not sequence:
        return x.reshape(count, x.shape[-1])
    if x.dim() != 3:
        raise InvalidArgument(f"sequence parallel: activations of shape {list(x.shape)}, expected [B, T, D]")
    return x.transpose(0, 1).reshape(count, x.shape[-1])


def shaped(rows: Tensor, shape: torch.Size, sequence: bool) -> Tensor:
    """The inverse of rows_of() for an x of `shape`, but that with `sequence` T follows from the number of rows."""
    if not sequence:
        return rows.view(*shape[:-1], rows.shape[-1])
    return rows.view(len(rows) // shape[0], shape[0], rows.shape[-1]).transpose(0, 1)


# --- linear layers ---
class _Columns(torch.autograd.Function):
    """One matrix [n, D] through several weights W_i [O_i, D] with biases b_i [O_i] or None, interleaved: [N, O_i] each.

    These Functions see matrices only, so that what they return may be changed in place.
    """

    @staticmethod
    def forward(ctx: Any, region: Region, rows: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = cast("tuple[Tensor, ...]", parameters[::2]), parameters[1::2]
        if region.sequence:
            matrices = [weight.t() for weight in weights]
            rows, products = gather_and_multiply(region.group, rows, matrices, biases, region.chunks)
        else:
            products = [F.linear(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, *weights)
        ctx.region, ctx.sequence = region, region.sequence
        return tuple(products)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if wanted() and not ctx.sequence:
            return _Columns.differentiable(ctx, *grads)
        return _Columns.values(ctx, *grads)

    @staticmethod
    def differentiable(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Of rows that all ranks have, and whose gradient is therefore the sum of the ranks'."""
        rows, *weights = ctx.saved_tensors
        dys = [
            rows.new_zeros(rows.shape[0], weight.shape[0]) if dy is None else dy
            for dy, weight in zip(grads, weights, strict=True)
        ]
        own = _CopyTo.apply(rows, ctx.region)
        terms = [dy @ weight for dy, weight in zip(dys, weights, strict=True)]
        drows = _ReduceFrom.apply(torch.stack(terms).sum(0), ctx.region) if ctx.needs_input_grad[1] else None
        results = [result for dy in dys for result in (dy.t() @ own, dy.sum(0))]
        return None, drows, *(x if need else None for x, need in zip(results, ctx.needs_input_grad[2:], strict=True))

    @staticmethod
    @once("ColumnLinear with sequence parallelism")
    def values(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        rows, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad
        # Every rank takes part in the sum, so that a product nobody used counts as zeros.
        dys = [
            rows.new_zeros(rows.shape[0], weight.shape[0]) if dy is None else dy
            for dy, weight in zip(grads, weights, strict=True)
        ]
        reduction = None
        if needed[1]:
            terms = list(zip(dys, weights, strict=True))
            reduction = Reduction(ctx.region.group, terms, ctx.sequence, ctx.region.chunks)
        results: list[Tensor | None] = []
        for index, (dy, grad) in enumerate(zip(dys, grads, strict=True)):
            weight_needed, bias_needed = needed[2 + 2 * index : 4 + 2 * index]
            results.append(dy.t() @ rows if weight_needed and grad is not None else None)
            results.append(dy.sum(0) if bias_needed and grad is not None else None)
        return None, None if reduction is None else reduction.wait(), *results


class _Row(torch.autograd.Function):
    """This rank's features [N, I_r] through W [O, I_r], summed over the ranks: [N, O], or its own rows of it."""

    @staticmethod
    def forward(ctx: Any, region: Region, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = Reduction(region.group, [(rows, weight.t())], region.sequence, region.chunks).wait()
        if bias is not None:
            y += bias
        ctx.save_for_backward(rows, weight)
        ctx.region, ctx.sequence = region, region.sequence
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        if wanted() and not ctx.sequence:
            return _Row.differentiable(ctx, dy)
        return _Row.values(ctx, dy)

    @staticmethod
    def differentiable(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """Of a dy that all ranks have."""
        rows, weight = ctx.saved_tensors
        _, rows_needed, weight_needed, bias_needed = ctx.needs_input_grad
        own = _CopyTo.apply(dy, ctx.region)
        return (
            None,
            own @ weight if rows_needed else None,
            own.t() @ rows if weight_needed else None,
            dy.sum(0) if bias_needed else None,
        )

    @staticmethod
    @once("RowLinear with sequence parallelism")
    def values(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        rows, weight = ctx.saved_tensors
        _, rows_needed, weight_needed, bias_needed = ctx.needs_input_grad
        db = dy.sum(0) if bias_needed else None
        drows = None
        if ctx.sequence:
            dy, (drows,) = gather_and_multiply(ctx.region.group, dy, [weight], [None], ctx.region.chunks)
        elif rows_needed:
            drows = dy @ weight
        return None, drows, dy.t() @ rows if weight_needed else None, db


def columns(region: Region, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
    """x through several weights [O_i, D] and biases [O_i] or None, interleaved, as column layers that share x."""
    if region.size == 1:
        pairs = zip(cast("tuple[Tensor, ...]", parameters[::2]), parameters[1::2], strict=True)
        return tuple(F.linear(x, weight, bias) for weight, bias in pairs)
    x, *cast_parameters = as_autocast(x, *parameters)
    products = _Columns.apply(region, rows_of(x, region.sequence), *cast_parameters)
    return tuple(shaped(product, x.shape, region.sequence) for product in products)


class SameInput(list["weakref.ref[ColumnLinear]"]):
    """The layers that have one input. Copies of the layers have copies of each other here."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SameInput:
        found = memo[id(self)] = SameInput()
        for layer in (layer for ref in self if (layer := ref()) is not None):
            found.append(weakref.ref(copy.deepcopy(layer, memo)))
        return found


class ColumnLinear(nn.Module):
    """x [..., D] -> this rank's features [..., O_r] of an nn.Linear.

    Layers that share a `shared` have the same input: the first of them that sees it computes all their outputs, so
    that x is gathered once, and its gradient summed once.
    """

    bias: nn.Parameter | None

    def __init__(self, region: Region, weight: nn.Parameter, bias: nn.Parameter | None, shared: SameInput) -> None:
        super().__init__()
        self.region = region
        self.weight = weight
        self.register_parameter("bias", bias)
        self.out_features, self.in_features = weight.shape
        self._shared = shared
        self._ready: tuple[Tensor, Tensor] | None = None
        shared.append(weakref.ref(self))

    def forward(self, x: Tensor) -> Tensor:
        if self._ready is not None:
            seen, y = self._ready
            self._ready = None
            if seen is x:
                return y
        layers: list[ColumnLinear] = [layer for ref in self._shared if (layer := ref()) is not None]
        parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
        outputs = columns(self.region, x, *parameters)
        for layer, y in zip(layers, outputs, strict=True):
            layer._ready = None if layer is self else (x, y)
        return outputs[layers.index(self)]

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features} here, {self.region.size} ranks, {len(self._shared)} shared"


class RowLinear(nn.Module):
    """This rank's features z_r [..., I_r] -> the whole y [..., O] of an nn.Linear; with sequence [B, T / ranks, O]."""

    bias: nn.Parameter | None

    def __init__(self, region: Region, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.region = region
        self.weight = weight
        self.register_parameter("bias", bias)
        self.out_features, self.in_features = weight.shape

    def forward(self, z: Tensor) -> Tensor:
        sequence = self.region.sequence
        if sequence:
            self.region.own(z.shape[1])
        z, weight, bias = as_autocast(z, self.weight, self.bias)
        return shaped(_Row.apply(self.region, rows_of(z, sequence), weight, bias), z.shape, sequence)

    def extra_repr(self) -> str:
        return f"{self.in_features} here -> {self.out_features}, {self.region.size} ranks"


# --- vocabulary ---
class VocabularyEmbedding(nn.Module):
    """Integer tokens [B, T] (any shape without sequence) -> rows of a table of `total`, of which `first`.. lie here.

    The output is whole, [B, T, D], or, in a sequence-parallel region, [B, T / ranks, D].
    """

    def __init__(
        self, region: Region, weight: nn.Parameter, first: int, total: int, padding_index: int | None
    ) -> None:  # fmt: skip
        super().__init__()
        self.region = region
        self.weight = weight
        self.first = first
        self.total = total
        own = padding_index is not None and 0 <= padding_index - first < len(weight)
        self.padding_index = padding_index - first if own and padding_index is not None else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Raises InvalidArgument for a token that is not in the table."""
        expect_within(tokens, self.total, "a token")
        local = tokens - self.first
        elsewhere = (local < 0) | (local >= len(self.weight))
        x = F.embedding(local.masked_fill(elsewhere, 0), self.weight, self.padding_index)
        x = x.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return scatter_sum(x, self.region) if self.region.sequence else reduce_from(x, self.region)

    def extra_repr(self) -> str:
        return f"rows {self.first}..{self.first + len(self.weight) - 1}, {self.region.size} ranks"


class VocabularyHead(nn.Module):
    """x [..., D] -> logits [..., V] over a table [V, D] whose rows `first`.. lie here, or their loss.

    `sizes` are the numbers of rows of all ranks.
    """

    bias: nn.Parameter | None

    def __init__(
        self, region: Region, weight: nn.Parameter, bias: nn.Parameter | None, first: int, sizes: Sequence[int]
    ) -> None:
        super().__init__()
        self.region = region
        self.weight = weight
        self.register_parameter("bias", bias)
        self.first = first
        self.sizes = list(sizes)

    def _local(self, x: Tensor) -> Tensor:
        return columns(self.region, x, self.weight, self.bias)[0]

    def forward(self, x: Tensor) -> Tensor:
        return gather_last(self._local(x), self.region, self.sizes)

    def loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of the cross-entropies of targets [...], their count), without targets of -100; see loss.Head.

        Raises InvalidArgument for a target beyond the vocabulary.
        """
        expect_within(targets[targets != IGNORED], sum(self.sizes), "a target")
        group, sequence = self.region.group, self.region.sequence
        targets = (targets.transpose(0, 1) if sequence else targets).reshape(-1)
        if kernels.runs(x) and not sequence:  # sharded rows are gathered while they are multiplied
            own = (copy_to(x, self.region).flatten(0, -2), self.weight, self.bias)
            return merged_loss(*kernels.partial_cross_entropy(*own, targets - self.first), targets, group)
        return vocabulary_loss(rows_of(self._local(x), sequence), targets, group, self.first)

    def extra_repr(self) -> str:
        return f"rows {self.first}..{self.first + len(self.weight) - 1}, {self.region.size} ranks"


def expect_within(tokens: Tensor, total: int, what: str) -> None:
    """Raises InvalidArgument unless all tokens are in 0..total - 1; no rank has rows to miss them by."""
    if tokens.numel():
        low, high = (int(end) for end in tokens.aminmax())
        if low < 0 or high >= total:
            raise InvalidArgument(f"{what} of {low}..{high}, but the vocabulary has {total}")


# --- activations ---
# Each is linear, and its backward another one of them, so that it can be differentiated as often as asked.
class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, region: Region) -> Tensor:
        ctx.region = region
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ReduceFrom.apply(grad, ctx.region), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, region: Region) -> Tensor:
        ctx.region = region
        return _all_reduce(x, region)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (_CopyTo.apply(grad, ctx.region) if wanted() else grad), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TBD: Tensor, region: Region) -> Tensor:
        ctx.region = region
        return region.group.reduce_scatter(x_TBD.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grad, ctx.region), None


class _Gather(torch.autograd.Function):
    """What follows differs from rank to rank, so that gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x_tBD: Tensor, region: Region) -> Tensor:
        ctx.region = region
        return _all_gather(x_tBD, region)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ScatterSum.apply(grad, ctx.region), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TBD: Tensor, region: Region) -> Tensor:
        ctx.region = region
        return x_TBD[region.own(len(x_TBD))].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Join.apply(grad, ctx.region), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_tBD: Tensor, region: Region) -> Tensor:
        ctx.region = region
        return _all_gather(x_tBD, region)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (_Split.apply(grad, ctx.region) if wanted() else grad[ctx.region.own(len(grad))]), None


class _GatherFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, region: Region, sizes: Sequence[int]) -> Tensor:
        ctx.region, ctx.sizes = region, sizes
        return region.group.all_gather_v(x.contiguous(), rows=sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (
            (_CutFirst.apply(grad, ctx.region, ctx.sizes) if wanted() else _cut(grad, ctx.region, ctx.sizes)),
            None,
            None,
        )


class _CutFirst(torch.autograd.Function):
    """This rank's rows of an x that all ranks have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, region: Region, sizes: Sequence[int]) -> Tensor:
        ctx.region, ctx.sizes = region, sizes
        return _cut(x, region, sizes).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _GatherFirst.apply(grad, ctx.region, ctx.sizes), None, None


def _cut(x: Tensor, region: Region, sizes: Sequence[int]) -> Tensor:
    return x.narrow(0, sum(sizes[: region.index]), sizes[region.index])


def _all_reduce(x: Tensor, region: Region) -> Tensor:
    x = x.contiguous()
    return region.group.all_reduce(x, out=torch.empty_like(x))


def _all_gather(x_tBD: Tensor, region: Region) -> Tensor:
    return region.group.all_gather(x_tBD.contiguous()).flatten(0, 1)


def copy_to(x: Tensor, region: Region) -> Tensor:
    """x, whose gradients on the ranks are summed in backward."""
    return x if region.size == 1 else _CopyTo.apply(x, region)


def reduce_from(x: Tensor, region: Region) -> Tensor:
    """The sum of every rank's x; the gradient passes as it is."""
    return x if region.size == 1 else _ReduceFrom.apply(x, region)


def scatter_sum(x_BTD: Tensor, region: Region) -> Tensor:
    """This rank's positions [B, T / ranks, D] of the sum of every rank's x; gradients are gathered."""
    if region.size == 1:
        return x_BTD
    region.own(x_BTD.shape[1])
    return _ScatterSum.apply(x_BTD.transpose(0, 1), region).transpose(0, 1)


def split(x_BTD: Tensor, region: Region) -> Tensor:
    """This rank's positions [B, T / ranks, D] of an x that all ranks have; gradients are gathered."""
    return x_BTD if region.size == 1 else _Split.apply(x_BTD.transpose(0, 1), region).transpose(0, 1)


def join(x_BtD: Tensor, region: Region) -> Tensor:
    """Everybody's positions, [B, T, D]; what follows is the same on all ranks, so that gradients are only cut."""
    return x_BtD if region.size == 1 else _Join.apply(x_BtD.transpose(0, 1), region).transpose(0, 1)


def gather_last(x: Tensor, region: Region, sizes: Sequence[int]) -> Tensor:
    """Everybody's features, of which rank r has sizes[r], side by side; gradients are only cut."""
    return x if region.size == 1 else _GatherFirst.apply(x.movedim(-1, 0), region, sizes).movedim(0, -1)
