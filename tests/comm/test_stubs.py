"""The type stubs of the extension name what the extension has, and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import paracomm
from paracomm import _C

STUBS = ast.parse((Path(paracomm.__file__).parent / "_C.pyi").read_text())


def declared(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    names: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node
    return names


def public(names: object) -> set[str]:
    return {name for name in dir(names) if not name.startswith("_")}


def test_module() -> None:
    assert {name for name in declared(STUBS.body) if not name.startswith("_")} == public(_C)


def test_classes() -> None:
    for name, node in declared(STUBS.body).items():
        if not isinstance(node, ast.ClassDef):
            continue
        stub = {member for member in declared(node.body) if not member.startswith("_")}
        assert stub == public(getattr(_C, name)), name


def test_arguments() -> None:
    """Functions take what the stubs say: pybind11 puts the names into the docstrings."""
    for name, node in declared(STUBS.body).items():
        functions = declared(node.body) if isinstance(node, ast.ClassDef) else {"": node}
        for method, function in functions.items():
            if not isinstance(function, ast.FunctionDef) or not function.args.args + function.args.kwonlyargs:
                continue
            where = getattr(_C, name) if not method else getattr(getattr(_C, name), method)
            text = where.__doc__ if callable(where) else None
            for argument in [*function.args.args, *function.args.kwonlyargs]:
                if argument.arg not in ("self", "arg0") and text:
                    assert argument.arg in text, (
                        f"{name}.{method} has no argument {argument.arg}: {text.splitlines()[0]}"
                    )
