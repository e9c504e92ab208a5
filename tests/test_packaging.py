"""What the package promises to whoever installs it: one version, no libtorch, no torch needed, any CPU."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import paracomm

ROOT = Path(__file__).resolve().parent.parent

# What must work without torch: schedules, NumPy collectives between two ranks, and the command line.
WITHOUT_TORCH = """
    import sys, threading
    import numpy as np
    import paracomm, paracomm.schedule
    from paracomm.cli.doctor import examine

    barrier, blobs = threading.Barrier(2), [b"", b""]

    def rank_main(rank, sums):
        def exchange(blob):
            blobs[rank] = blob
            barrier.wait(30)
            gathered = list(blobs)
            barrier.wait(30)
            return gathered

        comm = paracomm.connect(rank, 2, exchange=exchange, transport="local")
        array = np.full(1000, rank + 1.0, dtype=np.float32)
        comm.all_reduce(array)
        sums[rank] = array

    sums = [None, None]
    threads = [threading.Thread(target=rank_main, args=(rank, sums), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(np.array_equal(array, np.full(1000, 3.0)) for array in sums), sums
    assert examine()["build"]["extension"], examine()["build"]
    assert "torch" not in sys.modules
"""


def run(command: list[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def extension() -> Path:
    from paracomm import _C

    return Path(_C.__file__)


def test_one_version() -> None:
    from paracomm.build_info import build_info

    assert re.fullmatch(r"\d+\.\d+\.\d+", paracomm.__version__)
    assert importlib.metadata.version("paracomm") == paracomm.__version__
    assert build_info()["version"] == paracomm.__version__


def test_extension_links_neither_torch_nor_cuda() -> None:
    libraries = run(["ldd", str(extension())])
    assert "libstdc++" in libraries
    assert not re.search(r"torch|c10|cuda|nccl|libmpi", libraries), libraries


def test_extension_exports_only_its_entry_point() -> None:
    names = [line.split()[-1] for line in run(["nm", "--dynamic", "--defined-only", str(extension())]).splitlines()]
    assert names == ["PyInit__C"]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="only x86-64 has objects of a wider instruction set")
def test_wide_objects_share_no_code_with_the_baseline() -> None:
    """The linker keeps one copy of an inline function: it must not be one that needs AVX."""
    # Not of builds that sanitizers or gcov instrument: those are for tests alone, and calls of their own are in them.
    folders = [path for name in ("cpp", "python-*") for path in (ROOT / "build").glob(name)]
    objects = [path for folder in folders for path in folder.glob("CMakeFiles/paracomm.dir/src/reduce/*avx*.o")]
    if not objects:
        pytest.skip("no build folder here: paracomm was installed from a wheel")
    for path in objects:
        shared = re.findall(r"^\S* +[WVu] (.*)$", run(["nm", "--demangle", str(path)]), re.MULTILINE)
        assert shared == [], f"{path} defines {shared}"


def test_importing_paracomm_imports_no_torch() -> None:
    run([sys.executable, "-c", "import paracomm, paracomm.schedule, sys; assert 'torch' not in sys.modules"])


def test_works_where_torch_is_not_installed() -> None:
    block = "import sys; sys.modules['torch'] = None\n"
    script = block + textwrap.dedent(WITHOUT_TORCH).replace(
        '"torch" not in sys.modules', "sys.modules['torch'] is None"
    )
    run([sys.executable, "-c", script])


def test_stubs_name_everything_in_the_extension() -> None:
    stub = (ROOT / "paracomm" / "_C.pyi").read_text()
    from paracomm import _C

    public = [name for name in dir(_C) if not name.startswith("_")]
    missing = [
        name for name in public if not re.search(rf"^(class|def|async def) {name}\b|^{name}\s*[:=]", stub, re.MULTILINE)
    ]
    assert missing == []


@pytest.mark.slow
def test_stubs_agree_with_the_extension(tmp_path: Path) -> None:
    # What every class of pybind11 has and no stub can say: its metaclass, and an __init__ that only refuses.
    allowed = tmp_path / "allowed"
    names = re.findall(r"^class (\w+)", (ROOT / "paracomm" / "_C.pyi").read_text(), re.MULTILINE)
    allowed.write_text("".join(f"paracomm._C.{name}\nparacomm._C.{name}.__init__\n" for name in names))
    command = [
        "-m",
        "mypy.stubtest",
        "paracomm._C",
        "--mypy-config-file",
        "pyproject.toml",
        "--allowlist",
        str(allowed),
        "--ignore-unused-allowlist",
    ]
    run([sys.executable, *command], cwd=ROOT)


def test_every_command_has_help() -> None:
    listing = run([sys.executable, "-m", "paracomm", "--help"])
    for command in ("verify", "simulate", "tune", "bench", "train", "doctor"):
        assert re.search(rf"\b{command}\b", listing), listing
        run([sys.executable, "-m", "paracomm", command, "--help"])


@pytest.mark.slow
def test_wheel_in_a_clean_environment(tmp_path: Path) -> None:
    """No torch, no compiler, no source tree: only the wheel and what it names as dependencies. PARACOMM_WHEEL is one
    that is built already."""
    wheel = os.environ.get("PARACOMM_WHEEL")
    if not wheel:
        hidden = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.so", "__pycache__")
        shutil.copytree(ROOT, tmp_path / "sources", ignore=hidden)
        run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(tmp_path / "sources")])
        (wheel,) = map(str, tmp_path.glob("*.whl"))
    run([sys.executable, "-m", "venv", str(tmp_path / "venv")])
    bin_folder = tmp_path / "venv" / "bin"
    run([str(bin_folder / "pip"), "install", "--quiet", wheel])
    bare = {"PATH": str(bin_folder), "HOME": str(tmp_path)}
    installed = run([str(bin_folder / "pip"), "list", "--format=freeze"], env=bare)
    assert not re.search(r"^(torch|cmake|pybind11|ninja)==", installed, re.MULTILINE), installed
    run([str(bin_folder / "python"), "-c", textwrap.dedent(WITHOUT_TORCH)], env=bare, cwd=tmp_path)
    run([str(bin_folder / "paracomm"), "verify", "--worlds", "1-4"], env=bare, cwd=tmp_path)
    assert '"extension"' in run([str(bin_folder / "paracomm"), "doctor", "--json"], env=bare, cwd=tmp_path)
