"""Weights as one process has them, gathered from any layout. Checkpoints need none of this: see contents.py."""

from __future__ import annotations

from torch import Tensor

from paracomm.parallel import Pipeline
from paracomm.parallel.shard import gather_parameter
from paracomm.train.replicas import Replica, TorchReplica


def whole_weights(replica: Replica) -> dict[str, Tensor]:
    """{name: values} of every parameter, in the dtype of compute. A tied one has one name, its first. Collective."""
    if isinstance(replica, TorchReplica):
        return {name: parameter.detach() for name, parameter in replica.module.named_parameters()}
    mesh = replica.mesh
    assert mesh is not None
    with replica.gathered():
        found = {
            name: gather_parameter(parameter, mesh).clone()
            for part in replica.parts
            for name, parameter in part.module.named_parameters()
            if not hasattr(parameter, "copy_of")
        }
    return replica.everywhere(found) if isinstance(replica, Pipeline) else found
