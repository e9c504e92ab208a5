"""Weights as one process has them, gathered from any layout. Checkpoints need none of this: see contents.py."""

from __future__ import annotations

from torch import Tensor

from paracomm.parallel.shard import gather_parameter
from paracomm.train.replicas import Replica, TorchReplica


def whole_weights(replica: Replica) -> dict[str, Tensor]:
    """{name: values} of every parameter, in the dtype of compute. A tied one has one name, its first. Collective."""
    if isinstance(replica, TorchReplica):
        return {name: parameter.detach() for name, parameter in replica.module.named_parameters()}
    assert replica.mesh is not None
    with replica.gathered():
        return {
            name: gather_parameter(parameter, replica.mesh).clone()
            for name, parameter in replica.module.named_parameters()
        }
