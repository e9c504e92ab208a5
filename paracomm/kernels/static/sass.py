"""Reads machine code as nvdisasm prints it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

_LABEL = re.compile(r"^(\.L\w*):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_OPCODE = re.compile(r"^(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)")
_BRANCH = re.compile(r"\bBRA\b.*?`\((\.L\w*)\)")


@dataclass(frozen=True)
class Code:
    """A kernel's instructions in order, and where its labels are."""

    instructions: list[str]
    labels: dict[str, int]

    @cached_property
    def mix(self) -> Counter[str]:
        """How often each opcode occurs, without its modifiers."""
        return Counter(opcode(line).split(".")[0] for line in self.instructions)

    def loops(self) -> list[list[str]]:
        """Bodies of the loops that hold no other loop, in order: from a label to a branch back to it."""
        spans = set()
        for place, line in enumerate(self.instructions):
            found = _BRANCH.search(line)
            if found is not None and self.labels.get(found[1], place + 1) <= place:
                spans.add((self.labels[found[1]], place))
        inner = [
            (begin, end)
            for begin, end in sorted(spans)
            if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans)
        ]
        return [self.instructions[begin : end + 1] for begin, end in inner]


def parse(text: str) -> Code:
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label is not None:
            labels[label[1]] = len(instructions)
            continue
        found = _INSTRUCTION.match(line)
        if found is not None:
            instructions.append(found[1])
    return Code(instructions, labels)


def opcode(instruction: str) -> str:
    """With its modifiers: "HGMMA.64x128x16.F32.BF16"."""
    found = _OPCODE.match(instruction)
    return found[1] if found is not None else ""
