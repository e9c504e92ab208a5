"""Ways to train one model on many ranks."""

from paracomm.parallel.bucket import Bucket, Hook, Reducer
from paracomm.parallel.data import DataParallel

__all__ = ["Bucket", "DataParallel", "Hook", "Reducer"]
