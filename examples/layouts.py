"""From one process to a mesh: a loop of one's own before, and after, on any layout. Ten lines change, with the import.

python examples/layouts.py                                                          # before, and after on one process
torchrun --standalone --nproc-per-node 4 examples/layouts.py --tp 2 --zero 3        # after, on 4: the same losses

The model is of torch's own layers. --cp and --tp spread its positions and its heads, what is left is data parallel, and
--zero shares what its ranks would all hold. With --dropout "before" draws from torch's generator; what "after"
draws depends on the seed, the step and the element alone, so that all its layouts agree.
"""

import argparse
import os

import torch
import torch.nn.functional as F
from torch import nn

from paracomm import init, parallel

BATCH, LENGTH, VOCABULARY, WIDTH, HEADS, DEPTH = 8, 32, 61, 64, 4, 2


class Model(nn.Module):
    """A causal language model of torch's layers: nothing in it knows of ranks."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=self.head.weight.dtype)
        x = self.token(tokens) + self.position(positions)
        return self.head(self.encoder(x, mask=mask, is_causal=True))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens that count up by 1 to 4, what follows each, and positions: all [BATCH, LENGTH]."""
    data = torch.Generator().manual_seed(step)
    first, stride = torch.randint(0, VOCABULARY, (2, BATCH, 1), generator=data)
    tokens = (first + (1 + stride % 4) * torch.arange(LENGTH + 1)) % VOCABULARY
    return tokens[:, :-1], tokens[:, 1:], torch.arange(LENGTH).expand(BATCH, -1)


def before(options: argparse.Namespace) -> list[float]:
    """The loss of every step, on one process."""
    torch.manual_seed(0)
    model = Model(options.dropout).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(options.steps):
        x, y, positions = batch(step)
        loss = F.cross_entropy(model(x, positions).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def after(options: argparse.Namespace) -> list[float]:
    """The loss of every step, on any mesh."""
    torch.manual_seed(0)
    mesh = parallel.Mesh(init(), cp=options.cp, tp=options.tp)
    model = parallel.DataParallel(parallel.parallelize(Model(options.dropout).double(), mesh), mesh, zero=options.zero)
    optimizer = model.optimizer(torch.optim.AdamW, lr=1e-2)
    losses = []
    for step in range(options.steps):
        x, y, positions = map(mesh.shard, batch(step))
        with parallel.rng.at(parallel.rng.Place(0, step, mesh.shard_rows(torch.arange(BATCH)), positions[0])):
            loss = F.cross_entropy(model(x, positions).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        model.finish()
        model.clip_(1.0)
        optimizer.step()
        losses.append(float(mesh.group("dp", "cp").all_reduce(loss.detach(), "avg")))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cp", type=int, default=1, help="ranks that share a sequence")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share a layer")
    parser.add_argument("--zero", type=int, default=0, choices=range(4), help="0 to 3: what dp ranks share")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dropout", type=float, default=0.0)
    options = parser.parse_args()
    layout = parallel.Layout(cp=options.cp, tp=options.tp, zero=options.zero)
    layout.check(heads=HEADS, length=LENGTH)  # raises InvalidArgument for what cannot work
    torch.set_num_threads(1)
    alone, spread = before(options), after(options)
    if os.environ.get("RANK", "0") == "0":
        for step in range(0, options.steps, max(1, options.steps // 5)):
            print(f"step {step:3}   before {alone[step]:.12f}   after {spread[step]:.12f}")
        apart = max(abs(a / b - 1) for a, b in zip(spread, alone, strict=True))
        print(f"{options.steps} steps: losses at most {apart:.1e} apart (relative)", flush=True)


if __name__ == "__main__":
    main()
