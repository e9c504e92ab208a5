"""Pipeline parallelism over the axis "pp" of a mesh, by the schedules of paracomm.pipeline."""

from paracomm.parallel.pipeline.layer import Layer, layers_of
from paracomm.parallel.pipeline.pipeline import Pipeline

__all__ = ["Layer", "Pipeline", "layers_of"]
