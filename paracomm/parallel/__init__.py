"""Ways to train one model on many ranks."""

from paracomm.parallel import rng
from paracomm.parallel.bucket import Bucket, Hook, Reducer
from paracomm.parallel.data import DataParallel
from paracomm.parallel.layout import Layout
from paracomm.parallel.mesh import Mesh
from paracomm.parallel.pipeline import Pipeline
from paracomm.parallel.plan import parallelize

__all__ = ["Bucket", "DataParallel", "Hook", "Layout", "Mesh", "Pipeline", "Reducer", "parallelize", "rng"]
