"""A test program that ships with Hugging Face accelerate, as it is: it takes the group it finds.

Run as: torchrun --nproc-per-node 2 with_accelerate.py BACKEND FOLDER NAME, where NAME is test_sync, test_ops, ...
"""

import runpy
import sys

import torch

backend, _, name = sys.argv[1:]
sys.argv[1:] = []
torch.distributed.init_process_group(backend)
runpy.run_module(f"accelerate.test_utils.scripts.{name}", run_name="__main__")
