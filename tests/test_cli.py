"""Numbers and lists on the command line: what cannot be ends with 2 and names the option, before anything is done."""

from __future__ import annotations

import importlib
from typing import Any, get_args, get_type_hints

import pytest
from typer.models import OptionInfo
from typer.testing import CliRunner

from paracomm.cli.main import COMMANDS, NESTED, build_app

WORDS = [*((name,) for name in COMMANDS), *NESTED]


def options_of(words: tuple[str, ...]) -> dict[str, tuple[set[Any], OptionInfo]]:
    """{flag: (its types, what was declared)} of a command."""
    module = importlib.import_module(NESTED.get(words, f"paracomm.cli.{words[0]}"))
    hints = get_type_hints(getattr(module, words[-1]), include_extras=True)
    found = {}
    for name, hint in hints.items():
        kind, *details = get_args(hint) or (hint,)
        if details and isinstance(details[0], OptionInfo):
            flags = [flag for flag in details[0].param_decls or () if flag.startswith("--")]
            found[(flags or [f"--{name.replace('_', '-')}"])[0]] = {kind, *get_args(kind)}, details[0]
    return found


def numbers() -> list[Any]:
    found = []
    for words in WORDS:
        for flag, (kinds, declared) in options_of(words).items():
            if kinds & {int, float}:
                found.append(pytest.param(words, flag, kinds, declared, id=" ".join((*words, flag))))
    return found


def refused(words: tuple[str, ...], *arguments: str) -> str:
    result = CliRunner().invoke(build_app([*words, *arguments]), [*words, *arguments], env={"COLUMNS": "500"})
    assert result.exit_code == 2, (arguments, result.output, result.exception)
    return result.output


@pytest.mark.parametrize(("words", "flag", "kinds", "declared"), numbers())
def test_numbers_have_a_range(words: tuple[str, ...], flag: str, kinds: set[Any], declared: OptionInfo) -> None:
    odd = ["", "x", "1e999", "nan", "-1"]
    if int in kinds:
        odd += ["1.5", str(10**30)]
        if list[int] not in kinds:
            assert declared.min is not None and declared.max is not None
            odd += [str(declared.min - 1), str(declared.max + 1)]
    else:
        odd += ["inf", "-inf", "-1e-30"]
    for value in odd:
        assert flag in refused(words, flag, value), value


@pytest.mark.parametrize(
    ("words", "flag", "values"),
    [
        ("simulate", "--sizes", ["", "-5", "nan", "inf", "1e400", "8,,9", "1Q", "9" * 30, "-0", "k"]),
        ("verify", "--worlds", ["", "0", "-1", "x", "1-", "nan", "1.5", "1,,2", "1-999999999"]),
        ("bench", "--sizes", ["", "-8", "nan", "8:4", "8:64:0", "8:64:-1", "8,,9", "99999999G", ":", "8:64:2:2"]),
        ("bench ddp", "--hosts", ["-1,0", "x,0", "0,", ",", "1e3,0", "0", "0,1,2"]),
        ("simulate", "--algorithm", ["nothing", ""]),
        ("tune", "--collective", ["nothing", ""]),
    ],
)
def test_lists(words: str, flag: str, values: list[str]) -> None:
    for value in values:
        refused(tuple(words.split()), flag, value)


def test_worlds_that_run_backwards() -> None:
    assert "must rise from the first to the last, got '5-3'" in refused(("verify",), "--worlds", "5-3")
