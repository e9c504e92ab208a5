"""Lightning's Trainer and its demo Transformer: the backend is named by the strategy."""

import json
import sys

import lightning
import torch
from lightning.pytorch.demos import Transformer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset


class LanguageModel(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Transformer(vocab_size=100, ninp=64, nhead=4, nhid=128, nlayers=2, dropout=0.0)
        self.losses = []

    def training_step(self, batch, _):
        (tokens,) = batch
        loss = torch.nn.functional.nll_loss(self.model(tokens, tokens), tokens.flatten())
        self.log("loss", loss, sync_dist=True)
        self.losses.append(self.all_gather(loss.detach()).mean().item())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


lightning.seed_everything(0)
model = LanguageModel()
data = DataLoader(TensorDataset(torch.randint(100, (80, 16))), batch_size=4)
trainer = lightning.Trainer(
    accelerator="cpu",
    devices=2,
    max_epochs=2,
    strategy=DDPStrategy(process_group_backend=sys.argv[1]),
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    default_root_dir=sys.argv[2],
)
trainer.fit(model, data)
trainer.save_checkpoint(sys.argv[2] + "/end.ckpt")
if trainer.is_global_zero:
    print(json.dumps({"losses": model.losses, "backend": torch.distributed.get_backend()}))
