"""Where a change to the module made behind DataParallel's back is noticed: at forward(), finish() and step().

What can be taken up is: values that were written in place, and other memory for a parameter (Weights.take_up). What
cannot be is an error that names the parameter: another object in a parameter's place, one that came or went, one that
was frozen or unfrozen.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paracomm.errors import InvalidArgument
from paracomm.parallel.weights import Weights


class Gate:
    """Holds `module` to the parameters that it had when it was wrapped, which lie in `weights`."""

    def __init__(self, module: nn.Module, weights: Sequence[Weights]) -> None:
        self._module = module
        self._weights = list(weights)
        self._names = {
            id(member): name
            for each in weights
            for name, member in zip(each.bucket.names, each.bucket.members, strict=True)
        }
        self._members = [member for each in weights for member in each.bucket.members]
        self._places = [
            (owner, leaf, parameter)
            for owner in module.modules()
            for leaf, parameter in owner._parameters.items()
            if parameter is not None and id(parameter) in self._names
        ]
        self._remember()

    def _remember(self) -> None:
        self._seen = [
            (owner, list(owner._parameters.values()), list(owner._modules.values())) for owner in self._module.modules()
        ]
        self._frozen = [(name, p) for name, p in self._module.named_parameters() if id(p) not in self._names]

    def _as_it_was(self) -> bool:
        return all(
            _same(owner._parameters, parameters) and _same(owner._modules, modules)
            for owner, parameters, modules in self._seen
        )

    def before_forward(self) -> None:
        """Takes up other memory. torch.func.functional_call may put plain tensors in the parameters' place."""
        if not self._as_it_was():
            self._expect_known()
        self._expect_frozen()
        for each in self._weights:
            each.take_up()

    def before_reduction(self) -> None:
        """As before_forward(), and expects every parameter to be there and to require a gradient."""
        if not self._as_it_was():
            self._expect_known()
            there = {id(parameter) for parameter in self._module.parameters()}
            for member in self._members:
                if id(member) not in there:
                    raise _changed(self._names[id(member)], "is no longer the module's")
            self._remember()
        self._expect_frozen()
        for member in self._members:
            if not member.requires_grad:
                raise _changed(self._names[id(member)], "was frozen later")
        for each in self._weights:
            each.take_up()

    def _expect_known(self) -> None:
        frozen = {id(parameter) for _, parameter in self._frozen}
        for name, parameter in self._module.named_parameters():
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad and id(parameter) not in self._names:
                if id(parameter) in frozen:
                    continue  # _expect_frozen() names it
                raise _changed(name, "is an object that came later")

    def _expect_frozen(self) -> None:
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise _changed(name, "was unfrozen later")

    @torch.no_grad()
    def take_back(self) -> None:
        """Puts the parameters back in their places with the values of what load_state_dict(assign=True) put there."""
        for owner, leaf, member in self._places:
            now = owner._parameters.get(leaf)
            if now is None or now is member:
                continue
            if now.shape != member.shape or now.dtype != member.dtype:
                raise InvalidArgument(
                    f"load_state_dict(assign=True): '{self._names[id(member)]}' is {now.dtype} {list(now.shape)}, "
                    f"expected {member.dtype} {list(member.shape)}"
                )
            member.copy_(now.detach())
            owner._parameters[leaf] = member


def _same(now: dict[str, Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now.values(), before))


def _changed(name: str, what: str) -> InvalidArgument:
    return InvalidArgument(
        f"DataParallel: parameter '{name}' {what}; what is trained was fixed when the module was wrapped. Change the "
        "module before, or write values in place: parameter.copy_(values)"
    )


def distinct(tensor: Tensor) -> Tensor:
    """A view of the elements of `tensor` that lie in memory of their own: an expanded dimension has one."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def overlaps(tensor: Tensor) -> bool:
    """Whether elements of `tensor` may share memory."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False
