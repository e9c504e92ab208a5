"""fairscale's sharded optimizer (OSS) and ShardedDataParallel: both take a process group."""

import json
import sys

import torch
from fairscale.nn.data_parallel import ShardedDataParallel
from fairscale.optim import OSS

torch.distributed.init_process_group(sys.argv[1])
group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
optimizer = OSS(net.parameters(), torch.optim.Adam, group=group, lr=1e-2)
model = ShardedDataParallel(net, optimizer, process_group=group)
torch.manual_seed(1 + rank)
losses = []
for _ in range(40):
    x = torch.randn(8, 16)
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), x[:, :4].argmax(1))
    loss.backward()
    optimizer.step()
    mean = loss.detach().clone()
    torch.distributed.all_reduce(mean)
    losses.append(mean.item() / 2)
if rank == 0:
    print(json.dumps({"losses": losses, "backend": torch.distributed.get_backend()}))
torch.distributed.destroy_process_group()
