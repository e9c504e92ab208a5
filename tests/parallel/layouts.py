"""Layouts of one training run, and the table of docs/layouts.md. tests/parallel/training.py has the run.

CASES are held to one process over 50 steps; PROBES, whose gradients are rounded on purpose, step by step. Every pair
of FEATURES is in one of them or in REFUSALS. `python -m tests.parallel.layouts docs/layouts.md` writes the table anew.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from paracomm.models import Decoder, DecoderConfig, Seq2Seq, Seq2SeqConfig
from paracomm.parallel import Layout

SEED, VOCABULARY = 7, 53
BUCKET_BYTES = 30_000
"""Four to eight of them; the first has a third."""


# --- models ---
@dataclass(frozen=True)
class Variant:
    """A model and the length of its sequences; `source` of the encoder's, where it has one."""

    config: DecoderConfig
    source: int = 0

    def build(self) -> nn.Module:
        if isinstance(self.config, Seq2SeqConfig):
            return Seq2Seq(self.config, SEED)
        return Decoder(self.config, SEED)


def decoder(width: int, heads: int, T: int, depth: int = 2, **options: Any) -> Variant:
    return Variant(DecoderConfig(width, depth, heads, T, 0.1, VOCABULARY, **options))


def seq2seq(width: int, heads: int, T: int, S: int, **options: Any) -> Variant:
    return Variant(Seq2SeqConfig(width, 2, heads, T, 0.1, VOCABULARY, encoder_depth=1, **options), S)


LLAMA: dict[str, Any] = {"positions": "rotary", "norm": "rms", "mlp": "swiglu"}
VARIANTS = {
    "gpt": decoder(24, 4, 16),
    "llama": decoder(24, 4, 16, kv_heads=2, **LLAMA),
    "mixed": decoder(24, 6, 12, kv_heads=3, norm="rms", bias=True, hidden=50),
    "five": decoder(20, 5, 20, mlp="swiglu"),
    "seven": decoder(28, 7, 14, **LLAMA),
    "eight": decoder(16, 8, 16, bias=True),
    "deep": decoder(24, 4, 12, 6, kv_heads=2, **LLAMA),
    "seq2seq": seq2seq(24, 4, 16, 8, bias=True),
    "translator": seq2seq(24, 4, 16, 16, kv_heads=2, **LLAMA),
}


# --- layouts ---
FEATURES = ("pp", "hook", "ZeRO", "tp", "sequence", "cp", "recompute", "bfloat16", "accumulation", "clip")


@dataclass(frozen=True)
class Case:
    """Everything clips, so every layout has the feature "clip"."""

    variant: str = "gpt"
    dp: int = 1
    cp: int = 1
    tp: int = 1
    zero: int = 0
    sequence: bool = False
    context: Any = "ring"
    recompute: Any = "none"
    accumulate: int = 1
    precision: str | None = None
    hook: str | None = None
    chunks: int | None = None
    overlap: bool = True
    bucket_bytes: int = BUCKET_BYTES
    pp: int = 1
    schedule: str = "1f1b"
    microbatches: int | None = None
    quick: bool = False

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def tier(self) -> str:
        """When it is tested: "quick", "slow" or "exhaustive" (many ranks, but for those that combine most)."""
        if self.quick:
            return "quick"
        return "exhaustive" if self.world > 4 and len(self.features) < 5 else "slow"

    @property
    def name(self) -> str:
        sizes = [f"{axis}{size}" for axis in ("pp", "dp", "cp", "tp") if (size := getattr(self, axis)) > 1]
        parts = [
            self.variant,
            *sizes,
            self.schedule * (self.pp > 1),
            f"microbatches{self.microbatches}" * (self.microbatches is not None),
            "sequence" * self.sequence,
            f"zero{self.zero}" * (self.zero > 0),
            self.context * (self.context != "ring"),
            self.recompute * (self.recompute != "none"),
            f"accumulate{self.accumulate}" * (self.accumulate > 1),
            self.precision or "",
            self.hook or "",
            f"chunks{self.chunks}" * (self.chunks is not None),
            f"buckets{self.bucket_bytes}" * (self.bucket_bytes != BUCKET_BYTES),
            "late" * (not self.overlap),
        ]
        return "-".join(part for part in parts if part)

    @property
    def layout(self) -> Layout:
        """What users name; check() must take it."""
        return Layout(
            dp=self.dp, cp=self.cp, tp=self.tp, zero=self.zero, sequence=self.sequence, cp_method=self.context,
            hook=self.hook, recompute=self.recompute, precision=self.precision, pp=self.pp, schedule=self.schedule,
            microbatches=self.microbatches,
        )  # fmt: skip

    @property
    def features(self) -> frozenset[str]:
        has = {
            "pp": self.pp > 1,
            "hook": self.hook is not None,
            "ZeRO": self.zero > 0,
            "tp": self.tp > 1,
            "sequence": self.sequence,
            "cp": self.cp > 1,
            "recompute": self.recompute != "none",
            "bfloat16": self.precision is not None,
            "accumulation": self.accumulate > 1,
            "clip": True,
        }
        return frozenset(name for name in FEATURES if has[name])


CASES = [
    # one process, through the same wrappers
    Case("gpt"),
    Case("llama", zero=3, recompute="full", accumulate=2),
    # 2
    Case("gpt", dp=2, quick=True),
    Case("llama", dp=2, zero=1),
    Case("gpt", dp=2, zero=2, accumulate=4),
    Case("mixed", dp=2, zero=3, recompute="selective", quick=True),
    Case("gpt", dp=2, accumulate=2, recompute="full"),
    Case("mixed", dp=2, zero=1, accumulate=2),
    Case("llama", tp=2, quick=True),
    Case("gpt", tp=2, sequence=True, recompute="full"),
    Case("gpt", tp=2, recompute="selective", accumulate=2),
    Case("llama", cp=2, quick=True),
    Case("gpt", cp=2, context="ulysses", recompute="selective"),
    Case("gpt", cp=2, zero=3, accumulate=2),
    Case("seq2seq", dp=2, zero=3),
    Case("seq2seq", tp=2, sequence=True, accumulate=2),
    Case("seq2seq", cp=2, quick=True),
    Case("translator", tp=2, chunks=3, sequence=True),
    # 3
    Case("gpt", dp=3, zero=2),
    Case("mixed", tp=3, sequence=True),
    Case("mixed", cp=3, zero=1),
    Case("mixed", cp=3, context="ulysses", recompute="full"),
    # 4
    Case("llama", dp=4, zero=3, accumulate=2),
    Case("gpt", dp=2, tp=2, zero=1),
    Case("gpt", dp=2, tp=2, zero=3, sequence=True, quick=True),
    Case("llama", dp=2, cp=2, zero=2),
    Case("llama", dp=2, cp=2, zero=3, context="ulysses", recompute="full"),
    Case("gpt", cp=2, tp=2, sequence=True, quick=True),
    Case("llama", cp=2, tp=2, accumulate=2, recompute="full"),
    Case("gpt", tp=4, sequence=True, chunks=2),
    Case("gpt", cp=4),
    Case("gpt", cp=4, context="ulysses", zero=2),
    Case("seq2seq", dp=2, tp=2, zero=2, sequence=True, quick=True),
    Case("translator", cp=2, tp=2, recompute="selective"),
    Case("translator", dp=2, cp=2, zero=1, accumulate=2),
    Case("seq2seq", cp=4, context="ulysses"),
    # 5
    Case("five", dp=5, zero=1),
    Case("five", tp=5, sequence=True),
    Case("five", cp=5),
    # 6
    Case("mixed", dp=2, tp=3, zero=3),
    Case("mixed", cp=2, tp=3, sequence=True),
    Case("mixed", dp=2, cp=3, zero=2),
    # 7
    Case("seven", dp=7, zero=3),
    Case("seven", tp=7),
    Case("seven", cp=7),
    # 8
    Case("gpt", dp=8, zero=2),
    Case("eight", tp=8, sequence=True),
    Case("eight", dp=2, tp=4, zero=1, accumulate=2),
    Case("gpt", dp=2, cp=2, tp=2, zero=3, sequence=True, recompute="full"),
    Case("eight", cp=8),
    Case("seq2seq", dp=2, cp=2, tp=2, zero=3, sequence=True),
    # pipelines: each schedule, then with everything else
    Case("gpt", pp=2, schedule="gpipe"),
    Case("gpt", pp=2, quick=True),
    Case("gpt", pp=2, schedule="interleaved"),
    Case("gpt", pp=2, schedule="zb-h1", zero=1),
    Case("mixed", pp=2, schedule="zbv", quick=True),
    Case("gpt", pp=2, schedule="dualpipev", microbatches=8),
    Case("llama", pp=2, microbatches=1),
    Case("llama", pp=2, accumulate=2, recompute="full"),
    Case("llama", pp=2, schedule="zb-h1", accumulate=2, recompute="full"),
    Case("mixed", pp=2, schedule="zb-h1", recompute="selective"),
    Case("seq2seq", pp=2, schedule="zbv"),
    Case("translator", pp=2, schedule="interleaved", accumulate=2),
    Case("deep", pp=3, microbatches=4),
    Case("deep", pp=3, schedule="zb-h1", microbatches=8),
    Case("seq2seq", pp=3, schedule="gpipe", microbatches=2),
    Case("deep", pp=4, schedule="interleaved", microbatches=8),
    Case("deep", pp=4, schedule="zbv", microbatches=8, recompute="full"),
    Case("deep", pp=4, schedule="dualpipev", microbatches=8),
    Case("gpt", pp=2, dp=2, zero=1, quick=True),
    Case("gpt", pp=2, dp=2, schedule="gpipe", zero=2),
    Case("gpt", pp=2, dp=2, schedule="interleaved", zero=2, accumulate=2, microbatches=2),
    Case("llama", pp=2, dp=2, schedule="zb-h1", zero=3),
    Case("gpt", pp=2, dp=2, schedule="zbv", zero=3, recompute="full"),
    Case("llama", pp=2, tp=2, schedule="zb-h1", quick=True),
    Case("gpt", pp=2, tp=2, schedule="1f1b", sequence=True),
    Case("gpt", pp=2, tp=2, schedule="dualpipev", sequence=True, microbatches=4),
    Case("llama", pp=2, cp=2, schedule="zbv"),
    Case("gpt", pp=2, cp=2, context="ulysses", recompute="selective"),
    Case("seq2seq", pp=2, tp=2, schedule="interleaved", sequence=True),
    Case("seq2seq", pp=2, cp=2, schedule="zb-h1", zero=2),
    Case("deep", pp=4, dp=2, schedule="1f1b", zero=2, microbatches=4),
    Case("deep", pp=4, tp=2, schedule="zbv", sequence=True, microbatches=8),
    Case("deep", pp=8, microbatches=8),
    Case("gpt", pp=2, dp=2, tp=2, schedule="zb-h1", zero=3, sequence=True),
    Case("llama", pp=2, dp=2, cp=2, schedule="interleaved", zero=2),
    Case("gpt", pp=2, cp=2, tp=2, schedule="dualpipev", sequence=True, recompute="full"),
    Case("translator", pp=2, dp=2, tp=2, schedule="zbv", zero=1),
    Case("deep", pp=6, microbatches=4),
]

PROBES = [
    # 2
    Case("gpt", dp=2, hook="int8", quick=True),
    Case("gpt", dp=2, hook="int8", zero=1),
    Case("llama", cp=2, hook="int8", recompute="full"),
    Case("gpt", dp=2, hook="int8", accumulate=2),
    Case("gpt", dp=2, hook="int8", precision="bfloat16"),
    Case("gpt", dp=2, precision="bfloat16", quick=True),
    Case("gpt", dp=2, precision="bfloat16", zero=1, accumulate=2),
    Case("llama", dp=2, precision="bfloat16", zero=2, recompute="selective"),
    Case("gpt", tp=2, precision="bfloat16", recompute="full"),
    Case("llama", tp=2, precision="bfloat16", sequence=True),
    Case("gpt", cp=2, precision="bfloat16"),
    Case("seq2seq", cp=2, precision="bfloat16", context="ulysses"),
    # 4
    Case("gpt", dp=2, tp=2, hook="int8", quick=True),
    Case("gpt", dp=2, tp=2, hook="int8", sequence=True, zero=1),
    Case("translator", dp=2, cp=2, hook="int8", accumulate=2),
    Case("gpt", dp=2, tp=2, precision="bfloat16", sequence=True, zero=3, quick=True),
    Case("llama", dp=2, cp=2, precision="bfloat16", zero=3, accumulate=2),
    Case("gpt", pp=2, precision="bfloat16", quick=True),
    Case("llama", pp=2, schedule="zbv", precision="bfloat16", recompute="full"),
    Case("gpt", pp=2, dp=2, schedule="zb-h1", precision="bfloat16", zero=2),
    Case("gpt", pp=2, dp=2, hook="int8"),
    Case("gpt", pp=2, dp=2, schedule="zbv", hook="int8", zero=1),
]


@dataclass(frozen=True)
class Refusal:
    """What Layout(...).check(...) refuses, why, and the pair of features that it is about, if it is about one."""

    layout: dict[str, Any]
    reason: str
    pair: tuple[str, str] | None = None
    facts: dict[str, int] = field(default_factory=dict)


REFUSALS = [
    Refusal({"hook": "int8", "zero": 2}, "under ZeRO 2 a rank receives its own block only", ("hook", "ZeRO")),
    Refusal({"hook": "int8", "zero": 3}, "under ZeRO 3 a rank receives its own block only", ("hook", "ZeRO")),
    Refusal({"sequence": True}, "sequence with tp 1", ("tp", "sequence")),
    Refusal({"schedule": "zbv"}, "they are a pipeline's"),
    Refusal({"microbatches": 4}, "they are a pipeline's"),
    Refusal({"pp": 4, "schedule": "zbv"}, "8 stages, more than the 6 layers", facts={"layers": 6}),
    Refusal({"pp": 2}, "4 microbatches do not divide the 6 samples", facts={"rows": 6}),
    Refusal({"hook": "local_sgd"}, "averages models between steps"),
    Refusal({"tp": 3}, "tp 3 does not divide the 4 heads", facts={"heads": 4}),
    Refusal({"tp": 4}, "tp 4 does not divide the 2 key-value heads", facts={"heads": 4, "kv_heads": 2}),
    Refusal({"tp": 4}, "more than the vocabulary of 3", facts={"vocabulary": 3}),
    Refusal({"cp": 3}, "expected a multiple of 6", facts={"length": 16}),
    Refusal({"cp": 2, "cp_method": "ulysses"}, "cp 2 does not divide the 3 heads", facts={"heads": 3}),
    Refusal(
        {"cp": 2, "tp": 4, "sequence": True}, "does not divide the 6 positions", ("sequence", "cp"), {"length": 12}
    ),
]


# --- pairs ---
def cases_of(pair: tuple[str, str]) -> list[Case]:
    """The cases that have both features, those with the fewest others first."""
    both = [case for case in (*CASES, *PROBES) if set(pair) <= case.features and case.world > 1]
    return sorted(both, key=lambda case: (len(case.features), case.world))


def pairs() -> list[tuple[str, str]]:
    return list(itertools.combinations(FEATURES, 2))


def table() -> str:
    """Markdown: what every pair is held to, and where."""
    lines = ["| pair | held to one process by | layouts, the plainest |", "|---|---|---|"]
    for pair in pairs():
        cases = cases_of(pair)
        bounds = {"exact": "1e-10 in float64, 1e-5 in float32 after 50 steps"}
        if "hook" in pair:
            bounds = {"hook": "the hook's own error at each step"}
        if "bfloat16" in pair:
            bounds["bfloat16"] = "twice bfloat16's own error at each step"
            bounds.pop("exact", None)
        held = " plus ".join(bounds.values())
        for refusal in REFUSALS:
            if refusal.pair == pair:
                layout = ", ".join(f"{key} {value}" for key, value in refusal.layout.items())
                held += f"; {layout} is refused: {refusal.reason}"
        lines.append(f"| {pair[0]} × {pair[1]} | {held} | {len(cases)}, `{cases[0].name}` |")
    return "\n".join(lines) + "\n"


BEGIN, END = "<!-- pairs -->\n", "<!-- end of pairs -->\n"


def with_table(text: str) -> str:
    """docs/layouts.md with the table as it is now."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_table(page.read_text()))
