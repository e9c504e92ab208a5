"""DeepSpeed's engine with ZeRO stage 2 on the CPU: the backend is named in `init_distributed`."""

import json
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch

deepspeed.init_distributed(dist_backend=sys.argv[1])
rank = torch.distributed.get_rank()
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Embedding(100, 64), torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 100)
)
settings = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
}
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.Adam(model.parameters(), 1e-2), config=settings)
losses = []
torch.manual_seed(1 + rank)
for _ in range(40):
    tokens = torch.randint(100, (4, 16))
    loss = torch.nn.functional.cross_entropy(engine(tokens).flatten(0, 1).float(), tokens.flatten())
    engine.backward(loss)
    engine.step()
    mean = loss.detach().clone()
    torch.distributed.all_reduce(mean)
    losses.append(mean.item() / 2)
if rank == 0:
    print(json.dumps({"losses": losses, "backend": torch.distributed.get_backend()}))
torch.distributed.destroy_process_group()
