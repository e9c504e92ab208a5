"""Pipeline parallelism over the axis "pp" of a mesh, by the schedules of paracomm.pipeline."""

from paracomm.parallel.pipeline.layer import Layer, cut_evenly, layers_of
from paracomm.parallel.pipeline.pipeline import Pipeline

__all__ = ["Layer", "Pipeline", "cut_evenly", "layers_of"]
