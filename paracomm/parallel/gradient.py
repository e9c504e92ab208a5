"""What `parameter.grad` is after finish() where the reduced gradient is not one whole tensor on this rank.

Under ZeRO 1 to 3 a rank has a block of each bucket, under tensor parallelism a shard, in a pipeline a stage's part of
the norm. A ReducedGradient stands for the whole: torch's clip_grad_norm_ and clip_grad_value_ give what they give on
one process, and what they do not need is refused by the parameter's name instead of being computed of a part.

    norm                      over all ranks that hold a part of it; refused in a pipeline: ranks hold other stages
    in place, by a number     on this rank's part
    everything else           ZeRO 0: on this rank's shard, as tensor parallelism means it; ZeRO 1 to 3: refused
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from paracomm.errors import InvalidArgument

NORMS = ("linalg_vector_norm", "norm", "_foreach_norm")
SCALED = ("mul", "div", "clamp", "clamp_min", "clamp_max", "neg", "zero", "nan_to_num", "clone", "zeros_like")
"""Element by element, by numbers; in place as well, and for lists."""
REDUCED = ("sum", "mean", "max", "min", "amax", "amin", "aminmax", "prod", "dot", "vdot", "var", "std", "var_mean",
           "std_mean", "any", "all", "argmax", "argmin", "equal", "count_nonzero", "logsumexp")  # fmt: skip
UNSCALE = "_amp_foreach_non_finite_check_and_unscale_"


class ReducedGradient(Tensor):
    """Stands for the reduced gradient of the parameter `name`, of which `part()` is what this rank has.

    Args:
        groups: communicators over which the parts of one gradient are spread.
        whole: whether the part has the shape of the parameter on this rank, so that it can be read as a tensor.
        alone: whether a norm over `groups` says all about the gradient's share in the model's norm.
        unscale: what GradScaler's check does of the parts, where it is not a maximum over `groups`.
    """

    of: str
    part: Callable[[], Tensor]
    groups: list[Any]
    whole: bool
    alone: bool
    unscale: Callable[[list[Tensor], Tensor, Tensor], None] | None
    fresh: Tensor | None
    """What a backward pass has added: under ZeRO 1 to 3 it begins anew."""

    @staticmethod
    def __new__(
        cls,
        like: Tensor,
        name: str,
        part: Callable[[], Tensor],
        groups: Sequence[Any],
        whole: bool,
        alone: bool,
        unscale: Callable[[list[Tensor], Tensor, Tensor], None] | None = None,
        dtype: torch.dtype | None = None,
    ) -> ReducedGradient:
        made: ReducedGradient = Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=dtype or like.dtype, device=like.device, requires_grad=False
        )
        made.of, made.part, made.groups, made.whole, made.alone = name, part, list(groups), whole, alone
        made.unscale, made.fresh = unscale, None
        return made

    def with_part(self, part: Tensor, dtype: torch.dtype | None = None) -> ReducedGradient:
        """One that stands for other values."""
        return ReducedGradient(self, self.of, lambda: part, self.groups, self.whole, self.alone, dtype=dtype)

    def taken(self) -> Tensor | None:
        """What a backward pass has added since the last call; under ZeRO 0 all of it."""
        fresh, self.fresh = self.fresh, None
        return self.part() if self.whole else fresh

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ReducedGradient('{self.of}', {list(self.shape)}, {self.part().numel()} elements on this rank)"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operation = func.overloadpacket.__name__
        if operation in NORMS:
            return _norms(operation, *args, **kwargs)
        if operation == UNSCALE:
            return _unscale(func, *args, **kwargs)
        mine = _first((args, kwargs))
        target = args[0] if args else None
        if operation in ("detach", "alias") and isinstance(target, ReducedGradient):
            return target.with_part(target.part()) if not target.whole else target.part()
        if operation == "_to_copy" and not mine.whole:  # module.to() converts the gradients too
            return mine.with_part(mine.part().clone(), kwargs.get("dtype"))
        if mine.whole:
            if operation in REDUCED:
                raise refused(mine, operation)
            found = func(*tree_map(_part, args), **tree_map(_part, kwargs))
            inplace = operation.endswith("_") and isinstance(target, ReducedGradient)
            return target if inplace else found
        if operation in ("add", "add_") and isinstance(target, ReducedGradient) and _in_backward():
            target.fresh = args[1]
            return target if operation == "add_" else args[1]
        if operation.removeprefix("_foreach_").rstrip("_") in SCALED and _numbers(args[1:], kwargs):
            found = func(*tree_map(_part, args), **_without_layout(kwargs))
            if operation.endswith("_"):
                return None if isinstance(target, (list, tuple)) else target
            if isinstance(target, ReducedGradient):
                return target.with_part(found)
        raise refused(mine, operation)


def _first(nested: Any) -> ReducedGradient:
    found: list[ReducedGradient] = []
    tree_map(lambda x: found.append(x) if isinstance(x, ReducedGradient) else None, nested)
    return found[0]


def _part(value: Any) -> Any:
    return value.part() if isinstance(value, ReducedGradient) else value


def _numbers(args: Any, kwargs: Any) -> bool:
    tensors: list[Tensor] = []
    tree_map(lambda x: tensors.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
    return all(x.dim() == 0 and not isinstance(x, ReducedGradient) for x in tensors)


def _without_layout(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key not in ("dtype", "layout", "device", "pin_memory")}


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def refused(gradient: ReducedGradient, operation: str) -> InvalidArgument:
    return InvalidArgument(
        f"{operation} of the gradient of '{gradient.of}', of which this rank has a part only: step with the optimizer "
        "that parallel.optimizer(kind, ...) makes, clip with parallel.clip_(max_norm)"
    )


def _norms(operation: str, gradients: Any, ord: Any = 2, dim: Any = None, *rest: Any, **_: Any) -> Any:
    """Of whole gradients; the ranks add up powers."""
    several = operation == "_foreach_norm"
    listed = list(gradients) if several else [gradients]
    order = float(2 if ord is None else ord)
    if dim:
        raise refused(_first(listed), f"{operation} by dimension")
    found: list[Tensor] = []
    for gradient in listed:
        if not isinstance(gradient, ReducedGradient):
            found.append(torch.linalg.vector_norm(gradient, order))
            continue
        if not gradient.alone or order == -math.inf:
            raise refused(gradient, operation)
        part = gradient.part()
        power = torch.linalg.vector_norm(part, order, dtype=torch.float64) if part.numel() else part.new_zeros(
            (), dtype=torch.float64)  # fmt: skip
        largest, count = math.isinf(order), order == 0
        power = (power if largest or count else power**order).reshape(1)
        for group in gradient.groups:
            power = group.all_reduce(power.contiguous(), op="max" if largest else "sum")
        power = power.reshape(())
        found.append((power if largest or count else power ** (1 / order)).to(part.dtype))
    return found if several else found[0]


def _unscale(func: Any, gradients: Sequence[Tensor], found_inf: Tensor, inverse: Tensor) -> None:
    """GradScaler's: every rank learns whether any part is not finite."""
    parts = [_part(gradient) for gradient in gradients]
    ours = _first(gradients).unscale
    if ours is not None:
        ours(parts, found_inf, inverse)
        return
    func(parts, found_inf, inverse)
    groups: dict[int, Any] = {}
    for gradient in gradients:
        if isinstance(gradient, ReducedGradient):
            groups |= {id(group): group for group in gradient.groups}
    for group in groups.values():
        found_inf.copy_(group.all_reduce(found_inf.detach().clone().reshape(1), op="max").reshape(found_inf.shape))
