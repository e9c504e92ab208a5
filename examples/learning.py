"""What the examples share: the flags of a layout, a byte-pair vocabulary, batches of pairs, the loop, and the verdict.

An example makes its data, gives a Learner a model and a batch for each step, and compares what comes out of it with
baselines that know nothing. None of them knows how many ranks there are: that is the layout's to say.

Shapes: B rows, S source tokens, T target tokens. A batch is the whole one of a step, the same on every rank.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from paracomm import init
from paracomm.comm import Communicator
from paracomm.errors import InvalidArgument
from paracomm.models import Decoder, Seq2Seq, generate
from paracomm.parallel import Layout
from paracomm.parallel.context import context_positions
from paracomm.parallel.loss import IGNORED
from paracomm.parallel.rng import Place, at
from paracomm.train.replicas import use_one_thread

PAD, BEGIN, END = 0, 1, 2
SPECIAL = ("<pad>", "<begin>", "<end>")
LAYOUT = ("dp", "cp", "tp", "zero", "sequence", "cp_method", "hook", "recompute", "precision")
SPLIT_INTO = 1 << 16

Batch = dict[str, Tensor]
"""tokens, targets [B, T], and of an encoder-decoder source and mask [B, S]."""
Pair = tuple[list[int], list[int]]
"""Tokens of a source and of what follows from it."""
Item = TypeVar("Item")


# --- the command line ---
def options_of(
    description: str | None, arguments: Sequence[str] | None = None, **defaults: float
) -> argparse.Namespace:
    """The layout's flags, and one for each default, by its name."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    plain, group = Layout(), parser.add_argument_group("layout", "what ranks share; see `paracomm train --help`")
    for name in LAYOUT:
        flag, value = f"--{name.replace('_', '-')}", getattr(plain, name)
        if value is False:
            group.add_argument(flag, action="store_true")
        else:
            number = name == "dp" or isinstance(value, int)
            group.add_argument(flag, type=int if number else str, default=value)
    return parser.parse_args(arguments)


def layout_of(options: argparse.Namespace) -> Layout:
    return Layout(**{name: getattr(options, name) for name in LAYOUT})


# --- data ---
def held_out(key: str, one_in: int) -> bool:
    """Whether what has this key is for evaluation only: one key in `one_in`, by its hash.

    Rows that must not meet across the split give the same key.
    """
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return number % SPLIT_INTO < SPLIT_INTO // one_in


def from_first(comm: Communicator, make: Callable[[], str]) -> str:
    """What `make` gives on rank 0, on every rank. Collective."""
    return comm.exchange(make().encode() if comm.rank == 0 else b"")[0].decode()


def shared_out(comm: Communicator, items: Sequence[Item], work: Callable[[Item], object]) -> list:
    """work(item) of every item, in their order, on every rank; each rank does its share. Results travel as JSON."""
    mine = json.dumps([work(item) for item in items[comm.rank :: comm.world_size]])
    shares = [json.loads(blob) for blob in comm.exchange(mine.encode())]
    return [shares[index % comm.world_size][index // comm.world_size] for index in range(len(items))]


class Vocabulary:
    """Byte-pair encoding of text (Sennrich et al., 2016) over bytes, so that nothing is unknown. Collective.

    It is learned on rank 0 from `texts`, which must not hold what is held out.
    """

    def __init__(self, comm: Communicator, texts: Iterable[str], size: int) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(from_first(comm, lambda: _learn_pieces(texts, size)))
        self.size: int = self._tokenizer.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [each.ids for each in self._tokenizer.encode_batch(list(texts))]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts, without their special tokens."""
        return [text.strip() for text in self._tokenizer.decode_batch([list(row) for row in rows])]


def _learn_pieces(texts: Iterable[str], size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def padded(rows: Sequence[Sequence[int]], multiple: int, filler: int) -> Tensor:
    """int64 [B, L]: the rows, filled up to the next multiple of `multiple` that holds the longest."""
    length = -(-max(map(len, rows)) // multiple) * multiple
    return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows])


def pairs_batch(pairs: Sequence[Pair], multiple: int) -> Batch:
    """Sources, and targets one behind what the decoder reads."""
    source = padded([source for source, _ in pairs], multiple, PAD)
    return {
        "source": source,
        "mask": source != PAD,
        "tokens": padded([[BEGIN, *target] for _, target in pairs], multiple, PAD),
        "targets": padded([[*target, END] for _, target in pairs], multiple, IGNORED),
    }


class Pairs:
    """Batches of pairs of like length: `batch(step)` is a function of the seed and the step.

    multiple: the lengths of padded sequences are multiples of it.
    """

    POOL = 16
    """So many batches' rows are sorted by length at a time: enough to be alike, too few to be always the same."""

    def __init__(self, pairs: Sequence[Pair], rows: int, multiple: int, seed: int = 0) -> None:
        if len(pairs) < rows:
            raise InvalidArgument(f"Pairs: {len(pairs)} pairs, expected at least one batch of {rows}")
        self.pairs, self.rows, self.multiple, self.seed = pairs, rows, multiple, seed
        self._epoch, self._order = -1, torch.empty(0, 0, dtype=torch.int64)
        self._lengths = torch.tensor([len(source) + len(target) for source, target in pairs])

    def batch(self, step: int) -> Batch:
        epoch, index = divmod(step, len(self.pairs) // self.rows)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return pairs_batch([self.pairs[i] for i in self._order[index].tolist()], self.multiple)

    def _shuffled(self, epoch: int) -> Tensor:
        """int64 [batches, rows]: every pair at most once."""
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.pairs), generator=draws)
        pools = [pool[self._lengths[pool].argsort()] for pool in order.split(self.POOL * self.rows)]
        whole = torch.cat(pools)
        batches = whole[: len(whole) // self.rows * self.rows].view(-1, self.rows)
        return batches[torch.randperm(len(batches), generator=draws)]


class Nearest:
    """What is known that is most like a text: the smallest angle between sets of trigrams, the rare ones counting more.

    What a memory without a model can do.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        postings: dict[str, list[int]] = defaultdict(list)
        for index, text in enumerate(texts):
            for gram in _trigrams(text):
                postings[gram].append(index)
        self._postings = {gram: np.array(where) for gram, where in postings.items()}
        self._weight = {gram: (math.log(len(texts) / len(where)) + 1) ** 2 for gram, where in postings.items()}
        squares = np.full(len(texts), 1e-9)
        for gram, where in self._postings.items():
            squares[where] += self._weight[gram]
        self._norms = np.sqrt(squares)

    def index(self, text: str) -> int:
        """Which of the texts; of equally near ones, the first."""
        score = np.zeros(len(self._norms))
        for gram in sorted(_trigrams(text) & self._postings.keys()):
            score[self._postings[gram]] += self._weight[gram]
        return int((score / self._norms).argmax())


def _trigrams(text: str) -> set[str]:
    framed = f"  {text.lower()} "
    return {framed[i : i + 3] for i in range(len(framed) - 2)}


# --- training ---
@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up and a cosine to zero; gradients are clipped to norm 1."""

    steps: int
    lr: float
    warmup: int = 100
    decay: float = 0.1
    seed: int = 0

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


@torch.no_grad()
def start_narrow(model: Decoder | Seq2Seq) -> None:
    """Matrices start at 1 / sqrt(width) in place of GPT-2's 0.02, which is that of a width of 2,500.

    Of narrow models it decides whether minutes are enough: finding one token of ten in a source, a width of 64 gets to
    0.005 nats in 120 steps, and with 0.02 still guesses (1.51 nats).
    """
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.mul_(50 / math.sqrt(model.config.width))


class Learner:
    """A model on the ranks of this job, as `layout` says. Everything is collective.

    Raises InvalidArgument where the layout cannot work with the model or its sequences.
    """

    def __init__(self, comm: Communicator, layout: Layout, model: Decoder | Seq2Seq, recipe: Recipe) -> None:
        config = model.config
        layout.check(
            world_size=comm.world_size, heads=config.heads, kv_heads=config.kv_heads, vocabulary=config.vocabulary,
            length=multiple_of(layout),
        )  # fmt: skip
        self.comm, self.recipe, self.model = comm, recipe, model
        self.mesh = layout.mesh(comm)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        start_narrow(model)
        self.parallel = layout.spread(model, self.mesh)
        self.optimizer = self.parallel.optimizer(
            torch.optim.AdamW, self._group, lr=recipe.lr, betas=(0.9, 0.98), fused=True
        )
        self.seconds = 0.0

    def _group(self, _: str, parameter: nn.Parameter) -> dict[str, float]:
        return {"weight_decay": self.recipe.decay if parameter.dim() >= 2 else 0.0}

    def _place(self, batch: Batch, step: int) -> Place:
        cp, index = self.mesh.size("cp"), self.mesh.index("cp")
        rows, T = batch["tokens"].shape
        source = context_positions(batch["source"].shape[1], cp, index) if "source" in batch else None
        mine = self.mesh.shard_rows(torch.arange(rows))
        return Place(self.recipe.seed, step, mine, context_positions(T, cp, index), source)

    def _nats(self, model: Callable[..., tuple[Tensor, Tensor]], batch: Batch, step: int) -> Tensor:
        """The sum of this rank's cross-entropies."""
        mine = {name: self.mesh.shard(x) for name, x in batch.items()}
        with at(self._place(batch, step)):
            if "source" in mine:
                return model(mine["source"], mine["tokens"], mine["targets"], mine["mask"])[0]
            return model(mine["tokens"], mine["targets"])[0]

    def train(self, batch_of: Callable[[int], Batch], say: Callable[[str], None], reports: int = 10) -> None:
        """All steps; `say` is told how it goes, on rank 0."""
        begin, steps = time.perf_counter(), self.recipe.steps
        self.parallel.train()
        sums = torch.zeros(2, dtype=torch.float64)
        for step in range(steps):
            sums += self._step(batch_of(step), step)
            if (step + 1) % max(1, steps // reports) == 0 or step + 1 == steps:
                total, count = self.mesh.group("dp", "cp").all_reduce(sums, "sum").tolist()
                self.seconds = time.perf_counter() - begin
                say(f"step {step + 1:5d}/{steps}   loss {total / max(count, 1):.3f} nats   {self.seconds:4.0f} s")
                sums = torch.zeros(2, dtype=torch.float64)

    def _step(self, batch: Batch, step: int) -> Tensor:
        """One step; (nats, tokens) of this rank, float64 [2]."""
        parts = self.mesh.size("dp", "cp")
        count = int((batch["targets"] != IGNORED).sum())
        self.optimizer.zero_grad()
        nats = self._nats(self.parallel, batch, step)
        (nats * (parts / count)).backward()  # gradients are averaged over the parts, whose numbers of tokens differ
        self.parallel.finish()
        self.parallel.clip_(1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(step)
        self.optimizer.step()
        return torch.tensor([float(nats.detach()), count / parts], dtype=torch.float64)

    # --- evaluation ---
    @torch.no_grad()
    def nats(self, batches: Iterable[Batch]) -> float:
        """The mean cross-entropy of a target, over all ranks."""
        self.parallel.eval()
        total, count = torch.zeros((), dtype=torch.float64), 0
        for batch in batches:
            total += self._nats(self.parallel, batch, 0)
            count += int((batch["targets"] != IGNORED).sum())
        return float(self.mesh.group("dp", "cp").all_reduce(total, "sum")) / count

    def write(self, sources: Sequence[list[int]], longest: int, rows: int = 64) -> list[list[int]]:
        """What the model, an encoder-decoder, likes best behind each source: at most `longest` tokens, without END."""
        order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
        rows = -(-rows // self.mesh.size("dp")) * self.mesh.size("dp")
        found: dict[int, list[int]] = {}
        for begin in range(0, len(order), rows):
            chosen = order[begin : begin + rows]
            filled = chosen + chosen[-1:] * (-len(chosen) % self.mesh.size("dp"))  # every rank has as many rows
            written = self._write([sources[index] for index in filled], longest)
            found |= dict(zip(filled, written, strict=True))
        return [found[index] for index in range(len(sources))]

    def _write(self, sources: list[list[int]], longest: int) -> list[list[int]]:
        source = self.mesh.shard_rows(padded(sources, 1, PAD))
        begin = torch.full((len(source), 1), BEGIN)
        with self.parallel.gathered():  # generation calls parts of the model, which ZeRO 3 would not notice
            tokens = generate(self.model, begin, longest, source_BS=source, source_mask=source != PAD, temperature=0.0)
        mine = [_until_end(row) for row in tokens[:, 1:].tolist()]
        shares = self.mesh.group("dp").exchange(json.dumps(mine).encode())
        return [row for share in shares for row in json.loads(share)]


def _until_end(row: list[int]) -> list[int]:
    return row[: row.index(END)] if END in row else row


def multiple_of(layout: Layout) -> int:
    """What the lengths of sequences have to be multiples of."""
    return 2 * layout.cp * layout.tp


# --- the verdict ---
@dataclass(frozen=True)
class Bar:
    """The least difference by which the model has to be better than one baseline; None: it is shown, and no more."""

    name: str
    value: float
    margin: float | None = None


@dataclass(frozen=True)
class Verdict:
    """A model's quality on held-out data beside baselines, in `unit`; `less`: smaller is better."""

    unit: str
    value: float
    bars: Sequence[Bar]
    less: bool = False

    def gain(self, bar: Bar) -> float:
        return bar.value - self.value if self.less else self.value - bar.value

    @property
    def passed(self) -> bool:
        """False for a value that is not a number."""
        return all(self.gain(bar) >= bar.margin for bar in self.bars if bar.margin is not None)

    def lines(self) -> list[str]:
        width = max(len(bar.name) for bar in self.bars)
        found = [f"held-out {self.unit}", f"  {'trained model':{width}}  {self.value:7.3f}"]
        for bar in self.bars:
            asked = ""
            if bar.margin is not None:
                ok = self.gain(bar) >= bar.margin
                asked = f"   better by {self.gain(bar):.3f}, asked {bar.margin:.3f}: {'ok' if ok else 'FAILED'}"
            found.append(f"  {bar.name:{width}}  {bar.value:7.3f}{asked}")
        return found


Example = Callable[[Communicator, argparse.Namespace, Callable[[str], None]], Verdict]


def run(example: Example, options: argparse.Namespace) -> int:
    """Trains on the ranks of this job; 0, or 1 on rank 0 where the model is not better than its baselines as asked."""
    use_one_thread()
    begin = time.perf_counter()
    with init() as comm:
        first = comm.rank == 0
        say: Callable[[str], None] = (lambda text: print(text, flush=True)) if first else (lambda _: None)
        verdict = example(comm, options, say)
        for line in verdict.lines():
            say(line)
        took, worked = time.perf_counter() - begin, time.process_time()
        say(f"{took:.0f} s in all on {comm.world_size} ranks, of which the first computed {worked:.0f} s")
        comm.barrier()
    return int(first and not verdict.passed)
