"""The first sentence of a function's docstring, written from its code alone, in ROUGE-L on functions never seen.

make example-summaries
torchrun --standalone --nproc-per-node 2 examples/summaries.py --tp 2       # the same run, a layer on two ranks

The functions are those of the standard library and of the packages that torch brings. Each rank reads its share of the
files. Functions whose first sentences have the same words are on one side of the split, and what is held out is dropped
where the same code is also on the other.

Beside it: lead-n, the first words of the code, which are the function's name and arguments (n is what is best on the
functions to learn from); the sentence that is most like all others; and that of the function whose code is most alike.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from learning import (
    Bar,
    Learner,
    Nearest,
    Pairs,
    Recipe,
    Verdict,
    Vocabulary,
    held_out,
    layout_of,
    multiple_of,
    options_of,
    run,
    shared_out,
)

from paracomm.comm import Communicator
from paracomm.models import Seq2Seq, Seq2SeqConfig

DEFAULTS = {
    "steps": 1500, "batch": 64, "width": 128, "depth": 2, "heads": 4, "dropout": 0.1, "lr": 3e-3, "seed": 0,
    "vocabulary": 4000, "code": 40, "longest": 24, "questions": 1000,
}  # fmt: skip
LEAD_MARGIN, CONSTANT_MARGIN = 5.0, 5.0
"""In points of ROUGE-L."""
PACKAGES = ("torch", "numpy", "sympy", "networkx")
ONE_IN, ALIKE = 25, 3
LEAST_WORDS, MOST_WORDS = 3, 20

Examples = list[tuple[str, str]]
"""The words of a function's code, and those of its first sentence."""


# --- data ---
def sources() -> list[Path]:
    """The files of the standard library and of PACKAGES, in an order that is the same everywhere."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        if found is not None and found.submodule_search_locations:
            roots.append(Path(next(iter(found.submodule_search_locations))))
    files = ((root, file) for root in roots for file in sorted(root.rglob("*.py")))
    skipped = {"site-packages", "dist-packages", "test", "tests", "testing"}
    return [file for root, file in files if skipped.isdisjoint(file.relative_to(root).parts)]


def functions(file: Path) -> Examples:
    """Those of a file that have a docstring; none where it cannot be read."""
    try:
        text = file.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError):
        return []
    return list(_documented(tree, text.splitlines()))


def _documented(tree: ast.Module, lines: list[str]) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        sentence = _words(first_sentence(docstring))
        says = node.body[0]
        head = " ".join(lines[node.lineno - 1 : says.lineno - 1]).strip().removeprefix("async ").removeprefix("def ")
        code = head + " " + " ".join(lines[says.end_lineno or 0 : node.end_lineno])
        if sentence.isascii() and LEAST_WORDS <= len(words_of(sentence)) <= MOST_WORDS:
            yield _words(code)[:400], sentence


def first_sentence(docstring: str) -> str:
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    return re.split(r"(?<=[a-z)])\.\s", paragraph, maxsplit=1)[0].rstrip(".")


def _words(text: str) -> str:
    """In small letters, names taken apart: "getRow_index(" gives "get row index("."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text).replace("_", " ")
    return " ".join(apart.lower().split())


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text)


def split(examples: Examples) -> tuple[Examples, Examples]:
    """(to learn from, held out): no sentence and no code is on both sides. Of functions that say the same, the first
    few are kept."""
    train: Examples = []
    unseen: Examples = []
    seen: Counter[str] = Counter()
    for code, sentence in dict.fromkeys(examples):
        key = " ".join(words_of(sentence))
        seen[key] += 1
        if seen[key] <= ALIKE:
            (unseen if held_out(key, ONE_IN) else train).append((code, sentence))
    known = {code for code, _ in train}
    return train, [each for each in unseen if each[0] not in known]


# --- quality ---
def rouge_l(found: Sequence[str], expected: Sequence[str]) -> float:
    """The mean F1 of the longest common subsequence of words, 0 to 100 (Lin, "ROUGE", 2004, section 3)."""
    scores = [_rouge_l(words_of(ours), words_of(theirs)) for ours, theirs in zip(found, expected, strict=True)]
    return 100 * sum(scores) / len(scores)


def _rouge_l(found: list[str], expected: list[str]) -> float:
    row = [0] * (len(expected) + 1)  # of the words so far: the longest common subsequence with each beginning
    for word in found:
        before = row
        row = [0]
        for index, other in enumerate(expected):
            row.append(before[index] + 1 if word == other else max(row[-1], before[index + 1]))
    return 2 * row[-1] / (len(found) + len(expected)) if found and expected else 0.0


def lead(code: str, count: int) -> str:
    return " ".join(words_of(code)[:count])


def best_lead(train: Examples) -> int:
    """The number of words that lead-n does best with, of a sample to learn from."""
    sample = train[:: max(1, len(train) // 1000)]
    codes, sentences = zip(*sample, strict=True)
    return max(range(1, 16), key=lambda n: rouge_l([lead(code, n) for code in codes], sentences))


def most_central(train: Examples) -> str:
    """Of the sentences that occur most often, the one that is most like a sample of all."""
    sample = [sentence for _, sentence in train[:: max(1, len(train) // 500)]]
    common = [sentence for sentence, _ in Counter(sentence for _, sentence in train).most_common(50)]
    return max(common, key=lambda sentence: rouge_l([sentence] * len(sample), sample))


def rouge_beside(train: Examples, unseen: Examples, found: Sequence[str]) -> Verdict:
    codes, expected = zip(*unseen, strict=True)
    count, constant = best_lead(train), most_central(train)
    memory = Nearest([code[:150] for code, _ in train])
    nearest = [train[memory.index(code[:150])][1] for code in codes]
    bars = [
        Bar(f"lead-{count}", rouge_l([lead(code, count) for code in codes], expected), LEAD_MARGIN),
        Bar(f'always "{constant}"', rouge_l([constant] * len(codes), expected), CONSTANT_MARGIN),
        Bar("the most similar function's", rouge_l(nearest, expected)),
    ]
    return Verdict("ROUGE-L", rouge_l(found, expected), bars)


# --- the example ---
def summaries(comm: Communicator, options: argparse.Namespace, say: Callable[[str], None]) -> Verdict:
    layout = layout_of(options)
    multiple = multiple_of(layout)
    found = chain.from_iterable(shared_out(comm, sources(), functions))
    train, unseen = split([(code, sentence) for code, sentence in found])
    unseen = unseen[:: max(1, len(unseen) // options.questions)]
    words = Vocabulary(comm, chain.from_iterable(train), options.vocabulary)
    codes, sentences = (words.encode(side) for side in zip(*train, strict=True))
    pairs = [
        (code[: options.code], sentence)
        for code, sentence in zip(codes, sentences, strict=True)
        if len(sentence) < options.longest
    ]
    say(f"{len(pairs):,} functions to learn from, {len(unseen):,} held out, {words.size:,} pieces of words")
    config = Seq2SeqConfig(
        width=options.width, depth=options.depth, heads=options.heads, dropout=options.dropout, positions="rotary",
        norm="rms", vocabulary=words.size,
        context=-(-max(options.code, options.longest) // multiple) * multiple,
    )  # fmt: skip
    recipe = Recipe(options.steps, options.lr, seed=options.seed)
    learner = Learner(comm, layout, Seq2Seq(config, options.seed), recipe)
    say(f"{learner.parameters:,} parameters, {options.batch} functions a step")
    learner.train(Pairs(pairs, options.batch, multiple, options.seed).batch, say)
    asked = [code[: options.code] for code in words.encode([code for code, _ in unseen])]
    written = words.decode(learner.write(asked, options.longest))
    for (code, sentence), ours in list(zip(unseen, written, strict=True))[:: max(1, len(unseen) // 5)]:
        say(f"  {code[:100]}\n    {ours}\n    ({sentence})")
    return rouge_beside(train, unseen, written)


if __name__ == "__main__":
    raise SystemExit(run(summaries, options_of(__doc__, **DEFAULTS)))
