"""examples/layouts.py: few lines change, and the losses do not."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from ranks import Rank, run_ranks

FILE = Path(__file__).resolve().parents[2] / "examples" / "layouts.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("layouts_example", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_at_most_ten_lines_change() -> None:
    source = FILE.read_text()
    lines = source.splitlines()
    bodies = {
        node.name: lines[node.body[0].end_lineno : node.end_lineno]
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name in ("before", "after")
    }
    changes = difflib.ndiff(bodies["before"], bodies["after"])
    changed = [line[2:] for line in changes if line.startswith("+ ")]
    imports = [line for line in lines if line.startswith(("import paracomm", "from paracomm"))]
    assert len(changed) > 5 and len(imports) + len(changed) <= 10, "\n".join([*imports, *changed])


def losses(rank: Rank | None, **layout: int) -> list[float]:
    defaults = {"cp": 1, "tp": 1, "zero": 0, "steps": 4, "dropout": 0.0}
    module = example()
    options = argparse.Namespace(**(defaults | layout))
    return module.after(options) if rank is not None else module.before(options)


@pytest.mark.parametrize("layout", [{"tp": 2, "zero": 3}, {"cp": 2, "zero": 1}], ids=str)
def test_the_losses_stay(layout) -> None:
    expected = pytest.approx(losses(None), rel=1e-12)
    assert all(found == expected for found in run_ranks(4, losses, **layout))


def test_with_dropout_every_layout_draws_the_same() -> None:
    (alone,) = run_ranks(1, losses, dropout=0.1)
    assert alone != pytest.approx(losses(None), rel=1e-4)
    assert all(found == pytest.approx(alone, rel=1e-12) for found in run_ranks(2, losses, dropout=0.1, cp=2))
