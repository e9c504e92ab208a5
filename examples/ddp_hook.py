"""The one-line change: a program on DistributedDataParallel, before and after it sends its gradients as int8 blocks.

torchrun --standalone --nproc-per-node 2 examples/ddp_hook.py

Another backend of torch does as well (--backend gloo, on GPUs nccl); only "paracomm" counts the bytes that are sent.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from paracomm import hooks

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--backend", default="paracomm")
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()

dist.init_process_group(options.backend)
rank = dist.get_rank()
device = torch.device("cpu")
if options.backend == "nccl":
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8)).to(device)


def train(name: str, state: hooks.HookState, hook: hooks.Hook) -> None:
    ddp = DistributedDataParallel(network())
    ddp.register_comm_hook(state, hook)  # <- the one line
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.2, momentum=0.9)
    before = state.bytes_sent()
    data = torch.Generator().manual_seed(1 + rank)
    for _ in range(options.steps):
        x = torch.randn(64, 64, generator=data).to(device)
        loss = nn.functional.cross_entropy(ddp(x), x[:, :8].argmax(1))  # which of the first 8 is largest?
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mean = loss.detach()
    dist.all_reduce(mean)
    sent = state.bytes_sent()
    counted = "not counted by this backend"
    if sent is not None and before is not None:
        counted = f"{(sent - before) / options.steps / 1e3:.0f} kB a step"
    if rank == 0:
        print(f"{name:<22} loss {float(mean) / dist.get_world_size():.4f}, sent {counted}", flush=True)
    state.close()


# Without register_comm_hook, DDP sends the same; the state of this hook is there to count it.
train("before, float32", hooks.AllReduceState(), hooks.allreduce_hook)
train("after, int8 blocks", hooks.QuantizedState(bits=8), hooks.int8_hook)
dist.destroy_process_group()
