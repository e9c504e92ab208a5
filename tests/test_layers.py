"""The law of imports: who may know whom. It walks the sources, so that an import inside a function counts as well."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "paracomm"

# A room of paracomm/ -> the rooms that it may import. Each may import itself; EVERYBODYS are what the name says.
PYTHON_ROOMS = {
    "background": set(),
    "errors": set(),
    "version": set(),
    "schedule": set(),
    "pipeline": set(),
    "timeline": set(),
    "kernels": set(),
    "build_info": {"_C"},
    "bootstrap": {"comm"},
    "comm": {"schedule", "_C"},
    "_auto": {"backend"},
    "backend": {"comm", "bootstrap"},
    "hooks": {"comm"},
    "parallel": {"comm", "hooks", "kernels", "pipeline"},
    "models": {"parallel", "kernels"},
    "train": {"models", "parallel", "pipeline", "kernels", "hooks", "backend", "comm", "schedule"},
    "cli": {
        "train",
        "models",
        "parallel",
        "pipeline",
        "kernels",
        "hooks",
        "backend",
        "comm",
        "schedule",
        "bootstrap",
        "build_info",
    },
    "__init__": {"comm", "bootstrap"},
    "__main__": {"cli"},
}
# Third parties that a room must not know, whether at the top of a file or inside a function.
FORBIDDEN = {
    "schedule": {"torch", "triton", "mpi4py", "typer", "rich"},
    "pipeline": {"torch", "triton", "mpi4py", "typer"},
    "timeline": {"torch", "numpy", "typer", "rich"},
    "errors": {"numpy", "torch"},
}
EVERYBODYS = {"background", "errors", "timeline", "version"}

# A room of src/ -> the rooms whose headers it may include.
CPP_ROOMS = {
    "core": set(),
    "reduce": {"core"},
    "codec": {"core", "reduce"},
    "random": {"reduce"},
    "transport": {"core"},
    "schedule": {"core"},
    "executor": {"core", "reduce", "transport", "schedule"},
    "comm": {"core", "reduce", "transport", "schedule", "executor"},
}


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports; `from a import b` gives a.b."""
    names: list[tuple[int, str]] = []
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names += [(node.lineno, f"{origin}.{alias.name}") for alias in node.names]
    return names


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_python_imports(path: Path) -> None:
    room = room_of(path)
    assert room in PYTHON_ROOMS, f"{path.relative_to(ROOT)}: room '{room}' has no line in PYTHON_ROOMS"
    allowed = PYTHON_ROOMS[room] | EVERYBODYS | {room}
    for line, name in imported(path):
        top, *rest = name.split(".")
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        assert top not in {"tests", "bench", *FORBIDDEN.get(room, set())}, where
        if top != "paracomm":
            continue
        # `import paracomm` and `from paracomm import init` mean the face of the package, which is comm's.
        target = rest[0] if rest and is_room(rest[0]) else "comm"
        assert target in allowed, f"{where}; {room} may import {sorted(allowed)}"


def is_room(name: str) -> bool:
    return name == "_C" or (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "src").rglob("*.[hc]*")), ids=lambda path: str(path.relative_to(ROOT)))
def test_cpp_includes(path: Path) -> None:
    room = path.relative_to(ROOT / "src").parts[0]
    allowed = CPP_ROOMS[room] | {room}
    text = path.read_text()
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
        included = name.split("/")[0]
        assert included in allowed, f"{path.relative_to(ROOT)} includes {name}; {room} may include {sorted(allowed)}"
    foreign = re.findall(r"^\s*#\s*include\s+<((?:Python|pybind11|torch|ATen|c10|cuda)[^>]*)>", text, re.MULTILINE)
    assert foreign == [], f"{path.relative_to(ROOT)} includes {foreign}: libparacomm builds with g++ alone"


@pytest.mark.parametrize("path", sorted((ROOT / "src" / "transport").glob("*.[hc]*")), ids=lambda path: path.name)
def test_transports_know_no_operators(path: Path) -> None:
    # Signature carries a dtype and an operator past the transport, which only compares it.
    assert not re.search(r"\bReduceOp\b|\bselect_reduce\b", path.read_text())
