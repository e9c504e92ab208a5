"""Weights and optimizer states as one process has them, gathered from any layout, and cut for it again.

All of this is collective, and every rank gets the whole. States are what torch's own optimizer over the whole model
gives: parameters are numbered in the order of its groups.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from paracomm.parallel.shard import gather_parameter, shard_of
from paracomm.train.replicas import Replica, TorchReplica


def whole_weights(replica: Replica) -> dict[str, Tensor]:
    """{name: values} of every parameter, in the dtype of compute. A tied one has one name, its first."""
    if isinstance(replica, TorchReplica):
        return {name: parameter.detach() for name, parameter in replica.module.named_parameters()}
    assert replica.mesh is not None
    with replica.gathered():
        return {
            name: gather_parameter(parameter, replica.mesh).clone()
            for name, parameter in replica.module.named_parameters()
        }


def whole_state(replica: Replica, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights and buffers by name, the optimizer's state_dict()); weights are the optimizer's own, float32 under mixed
    precision."""
    weights = whole_weights(replica)
    buffers = dict(replica.module.named_buffers())
    state = optimizer.state_dict()
    if isinstance(replica, TorchReplica):
        return weights | buffers, state
    assert replica.mesh is not None
    for name, parameter in replica.module.named_parameters():
        of_one = state["state"].get(name, {})
        for key in sorted(of_one):
            if _is_cut_as(parameter, key, of_one[key]):
                of_one[key] = gather_parameter(parameter, replica.mesh, of_one[key])
        weights[name] = of_one.pop("master", weights[name])
    numbers = _numbers(state)
    return weights | buffers, {
        "state": {number: state["state"][name] for name, number in numbers.items() if name in state["state"]},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]
        ],
    }


def load_whole_state(replica: Replica, optimizer: torch.optim.Optimizer, whole: dict[str, Any]) -> None:
    """Gives the optimizer its part of what whole_state() has gathered; weights stay as they are.

    Raises InvalidArgument or ValueError where the groups do not have the same numbers of parameters.
    """
    if isinstance(replica, TorchReplica):
        optimizer.load_state_dict(whole)
        return
    names = {number: name for name, number in _numbers(optimizer.state_dict()).items()}
    parameters = dict(replica.module.named_parameters())
    state: dict[str, dict[str, Any]] = {}
    for number, of_one in whole["state"].items():
        shard = shard_of(parameters[names[number]])
        state[names[number]] = {
            key: value if shard is None or key == "step" else shard.take(value) for key, value in of_one.items()
        }
    groups = [
        {**group, "params": [names.get(number, number) for number in group["params"]]}
        for group in whole["param_groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _is_cut_as(parameter: Tensor, key: str, value: Any) -> bool:
    return key != "step" and isinstance(value, Tensor) and value.shape == parameter.shape


def _numbers(state: dict[str, Any]) -> dict[str, int]:
    names = itertools.chain.from_iterable(group["params"] for group in state["param_groups"])
    return {name: number for number, name in enumerate(names)}
