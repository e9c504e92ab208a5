"""Steps of our models on a CPU, where the kernels' eager twins run, beside the same models in torch's own modules.

    python bench/kernels_cpu.py [--rounds 15]

Both have the same weights; losses and gradients are compared first. Then steps (forward, backward, AdamW) go in turns,
in one process of one thread. A line holds the medians and the median of the rounds' ratios, torch's time over ours.
Times are of the CPU, not of the wall, so that other processes of the machine matter less. Rows without dropout are held
to 1; those with it are for information: our masks follow from an element's place, and are drawn in backward again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from paracomm.models import Decoder, DecoderConfig
from paracomm.models.layers import Rotary
from paracomm.parallel import rng

HERE = Path(__file__).resolve().parent
LLAMA: dict[str, Any] = {"kv_heads": 2, "positions": "rotary", "norm": "rms", "mlp": "swiglu", "tied": False}
LEAST = 1.0


# --- torch's own ---
class TorchBlock(nn.Module):
    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.c = c
        norm = nn.RMSNorm if c.norm == "rms" else nn.LayerNorm
        self.attention_norm, self.mlp_norm = norm(c.width, eps=c.epsilon), norm(c.width, eps=c.epsilon)
        self.sizes = [c.heads * c.head_width, *[c.key_value_heads * c.head_width] * 2]
        self.qkv = nn.Linear(c.width, sum(self.sizes), bias=c.bias)
        self.out = nn.Linear(c.width, c.width, bias=c.bias)
        self.gate = nn.Linear(c.width, c.hidden_width, bias=c.bias) if c.mlp == "swiglu" else None
        self.up = nn.Linear(c.width, c.hidden_width, bias=c.bias)
        self.down = nn.Linear(c.hidden_width, c.width, bias=c.bias)
        self.dropout = nn.Dropout(c.dropout)
        self.gelu, self.silu = nn.GELU("tanh"), nn.SiLU()

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        B, T, D = x.shape
        q, k, v = (
            part.view(B, T, -1, self.c.head_width).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).split(self.sizes, dim=-1)
        )
        if tables is not None:
            q, k = rotated(q, *tables), rotated(k, *tables)
        p = self.c.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p, enable_gqa=q.shape[1] != k.shape[1])
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(B, T, D)))
        h = self.mlp_norm(x)
        h = self.gelu(self.up(h)) if self.gate is None else self.silu(self.gate(h)) * self.up(h)
        return x + self.dropout(self.down(h))


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-high, low], dim=-1) * sine


class TorchModel(nn.Module):
    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(c.vocabulary, c.width)
        self.position = nn.Embedding(c.context, c.width) if c.positions == "learned" else None
        self.blocks = nn.ModuleList(TorchBlock(c) for _ in range(c.depth))
        self.norm = nn.RMSNorm(c.width, eps=c.epsilon) if c.norm == "rms" else nn.LayerNorm(c.width, eps=c.epsilon)
        self.head = nn.Linear(c.width, c.vocabulary, bias=False)
        if c.tied:
            self.head.weight = self.token.weight
        tables = None
        if self.position is None:
            tables = Rotary(c.context, c.head_width, c.rotary_base)._table(torch.empty(0))
        self.tables = tables

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.token(tokens)
        if self.position is not None:
            x = x + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x, self.tables)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


# --- a row ---
@dataclass(frozen=True)
class Row:
    name: str
    batch: int = 12
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> DecoderConfig:
        return DecoderConfig(**self.options)

    @property
    def held(self) -> bool:
        return self.config.dropout == 0.0


MEDIUM = {"width": 256, "depth": 2, "heads": 4, "context": 256}
ROWS = [
    Row("gpt, learned, LayerNorm, gelu"),
    Row("llama, rotary, RMSNorm, swiglu, grouped queries", options=LLAMA),
    Row("gpt, wider, vocabulary 8192", 4, {**MEDIUM, "vocabulary": 8192}),
    Row("llama, wider, vocabulary 8192", 4, {**MEDIUM, **LLAMA, "vocabulary": 8192}),
    Row("gpt, dropout 0.1", options={"dropout": 0.1}),
    Row("llama, dropout 0.1", options={**LLAMA, "dropout": 0.1}),
]


def pair(row: Row) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of ours and one of torch's. Raises AssertionError unless they compute the same."""
    config = row.config
    ours, theirs = Decoder(config), TorchModel(config)
    names = {name: name.replace(".attention.", ".").replace(".mlp.", ".") for name, _ in ours.named_parameters()}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            theirs.get_parameter(names[name]).copy_(parameter)
    data = torch.Generator().manual_seed(0)
    text = torch.randint(config.vocabulary, (row.batch, config.context + 1), generator=data)
    tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    place = rng.Place(0, 0, torch.arange(row.batch), torch.arange(config.context))

    def our_loss() -> Tensor:
        with rng.at(place):
            total, count = ours(tokens, targets)
        return total / count

    def their_loss() -> Tensor:
        return theirs(tokens, targets)

    def step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def run() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return run

    ours.eval(), theirs.eval()
    a, b = our_loss(), their_loss()
    a.backward(), b.backward()
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    for name, parameter in ours.named_parameters():
        expected = theirs.get_parameter(names[name]).grad
        assert (parameter.grad - expected).abs().max() <= 1e-4 * expected.abs().max(), name
    ours.train(), theirs.train()
    return step(ours, our_loss), step(theirs, their_loss)


def measure(row: Row, rounds: int) -> dict[str, Any]:
    steps = dict(zip(("ours", "torch"), pair(row), strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name in sorted(steps, reverse=bool(turn % 2)):
            start = time.process_time()
            steps[name]()
            if turn >= 2:
                seconds[name].append(time.process_time() - start)
    ratio = statistics.median(t / o for t, o in zip(seconds["torch"], seconds["ours"], strict=True))
    return {"row": asdict(row), "seconds": seconds, "ratio": ratio}


def main(rounds: Annotated[int, typer.Option(help="Steps of each in turns.")] = 15) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    short = False
    lines = []
    for row in ROWS:
        found = measure(row, rounds)
        ours, theirs = (statistics.median(found["seconds"][name]) * 1e3 for name in ("ours", "torch"))
        verdict = "" if not row.held else "PASS" if found["ratio"] >= LEAST else "SHORT"
        short |= verdict == "SHORT"
        typer.echo(f"{row.name:50} ours {ours:7.1f} ms  torch {theirs:7.1f} ms  ratio {found['ratio']:.3f} {verdict}")
        lines.append(json.dumps(found))
    (HERE / "results" / "kernels-cpu.jsonl").write_text("\n".join(lines) + "\n")
    raise typer.Exit(1 if short else 0)


if __name__ == "__main__":
    typer.run(main)
