"""Pipeline parallelism over the axis "pp" of a mesh. Schedules are written, checked and simulated in paracomm.pipeline."""

from paracomm.parallel.pipeline.layer import Layer, cut_evenly, layers_of
from paracomm.parallel.pipeline.pipeline import Pipeline

__all__ = ["Layer", "Pipeline", "cut_evenly", "layers_of"]
