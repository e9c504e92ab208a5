"""The Trainer of Hugging Face transformers (over accelerate), a GPT-2 of random weights: it takes the group it finds,
for its option `ddp_backend` accepts only names that it knows."""

import json
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

torch.distributed.init_process_group(sys.argv[1])

set_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=32, n_embd=64, n_layer=2, n_head=4))
rows = torch.randint(100, (160, 16)).tolist()
data = [{"input_ids": row, "labels": row} for row in rows]
arguments = TrainingArguments(
    output_dir=sys.argv[2],
    max_steps=40,
    per_device_train_batch_size=2,
    per_device_eval_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    logging_steps=1,
    save_steps=20,
    eval_strategy="steps",
    eval_steps=20,
    use_cpu=True,
    report_to=[],
    disable_tqdm=True,
)
trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8])
trainer.train()
if trainer.is_world_process_zero():
    losses = [entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]
    print(json.dumps({"losses": losses, "backend": torch.distributed.get_backend()}))
torch.distributed.destroy_process_group()
