"""Runs what the README shows.

A block that starts with ```python runnable is run as a script, and with ranks=N after that by torchrun on N ranks.
Commands are checked to exist: every `make` target, every `paracomm` subcommand with its options.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python runnable(?: ranks=(\d+))?\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SHELL = [
    line.strip()
    for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
INLINE = re.findall(r"`((?:make|paracomm) [^`]+)`", README)
COMMANDS = sorted({command.partition(" #")[0].strip() for command in SHELL + INLINE})


def run(command: list[str], cwd: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "XDG_CACHE_HOME": str(cwd)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment)
    assert done.returncode == 0, f"{shlex.join(command)} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_there_are_blocks_to_run() -> None:
    assert len(BLOCKS) >= 3
    assert any("make train" in command for command in COMMANDS)


@pytest.mark.parametrize(("ranks", "code"), BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_python_block(ranks: str, code: str, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(code)
    if ranks:
        pytest.importorskip("torch", reason="torchrun comes with torch, which is not installed")
        run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)],
            tmp_path,
        )
    else:
        run([sys.executable, str(script)], tmp_path)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_make_target(command: str) -> None:
    target = shlex.split(command)[1]
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("paracomm ")])
def test_paracomm_command(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    command_words = words[1:3] if words[1:3] == ["bench", "ddp"] else words[1:2]
    text = run([sys.executable, "-m", "paracomm", *command_words, "--help"], tmp_path)
    for option in (word.partition("=")[0] for word in words[2:] if word.startswith("--")):
        assert re.search(rf"{re.escape(option)}\b", text), f"`{command}`: --help knows no {option}\n{text}"
