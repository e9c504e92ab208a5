"""`paracomm doctor`: what was built, what this machine offers, and what limits it sets."""

import importlib.metadata
import json as json_module
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from paracomm.cli.network import route_to
from paracomm.errors import InvalidArgument
from paracomm.version import __version__

Section = dict[str, Any]

# What the reduction loops use, then what could speed them up further.
CPU_FEATURES = (
    "avx2",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_bf16",
    "avx512_fp16",
    "asimd",
    "sve",
)
PACKAGES = ("numpy", "torch", "mpi4py", "triton", "tensorboard", "safetensors", "cupy")


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show what was built, which transports, interface, CPU features and limits this machine has."""
    report = examine()
    if json:
        print(json_module.dumps(report, indent=2))
    else:
        print_tables(report)


def examine() -> dict[str, Section]:
    """The whole report: sections of named findings, of types that JSON has. None means: not there or not known."""
    return {
        "build": build_section(),
        "network": network_section(),
        "cpu": cpu_section(),
        "limits": limits_section(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "mpi": mpi_section(),
    }


def build_section() -> Section:
    section: Section = {"paracomm": __version__, "python": platform.python_version(), "platform": platform.platform()}
    try:
        from paracomm.build_info import build_info
        from paracomm.comm import device
    except ImportError as error:
        # Schedules, verify and simulate go on without the extension; a person who asks is told why the rest does not.
        return section | {"extension": None, "why": f"{type(error).__name__}: {error}"}
    try:
        arrays = device.MODES[device.mode() or ""]
    except InvalidArgument as error:
        arrays = f"every communicator refuses this: {error}"
    return section | build_info() | {"devices": arrays}


def network_section() -> Section:
    master = os.environ.get("MASTER_ADDR")
    address, interface = route_to(master)
    return {
        "hostname": platform.node(),
        "master": master,
        "interface": interface,
        "address": address,
        "loopback_only": address is None or address.startswith("127.") or address == "::1",
    }


def cpu_section() -> Section:
    info = read_text("/proc/cpuinfo") or ""
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    return {
        "machine": platform.machine(),
        "model": model[1] if model else None,
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "features": [name for name in CPU_FEATURES if name in present],
        "caches": caches(),
    }


def limits_section() -> Section:
    memory = re.search(r"^MemTotal:\s*(\d+) kB", read_text("/proc/meminfo") or "", re.MULTILINE)
    section: Section = {
        "memory_bytes": int(memory[1]) * 1024 if memory else None,
        "cgroup_memory_bytes": cgroup_memory(),
        "cgroup_cpus": cgroup_cpus(),
        "open_files": soft_limit(resource.RLIMIT_NOFILE),
        "locked_memory_bytes": soft_limit(resource.RLIMIT_MEMLOCK),
        "threads_per_rank": os.environ.get("OMP_NUM_THREADS"),
    }
    try:
        shm = os.statvfs("/dev/shm")
        section["dev_shm_bytes"] = shm.f_blocks * shm.f_frsize
    except OSError:
        section["dev_shm_bytes"] = None
    section["note"] = "shared memory comes from memfd: /dev/shm is not used, and its size is no limit"
    return section


def mpi_section() -> Section:
    """The launchers on PATH and in .peers/*, which `paracomm bench --vs` compares with."""
    section: Section = {}
    launchers = {"PATH": shutil.which("mpirun")}
    launchers |= {path.parts[-3]: str(path) for path in sorted(Path(".peers").glob("*/bin/mpirun"))}
    for name, launcher in launchers.items():
        section[name] = launcher and f"{launcher} ({version_of(launcher)})"
    return section


def version_of(launcher: str) -> str:
    # Intel's launcher is a script that looks for its own parts on PATH.
    environment = os.environ | {"PATH": f"{Path(launcher).parent.resolve()}:{os.environ.get('PATH', '')}"}
    try:
        done = subprocess.run(
            [launcher, "--version"], capture_output=True, text=True, errors="replace", timeout=10, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    version = re.search(r"\d+(\.\d+)+", done.stdout)
    return version[0] if version and done.returncode == 0 else f"does not run: {done.stderr.strip()[:200]}"


def installed_version(package: str) -> str | None:
    """From the metadata, because importing torch to learn its version takes seconds."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (read_text(index / name) for name in ("level", "type", "size"))
        if level and kind and size and kind.strip() != "Instruction":
            found[f"L{level.strip()}"] = size.strip()
    return found


def cgroup_memory() -> int | None:
    for path in cgroup_files("memory.max", "memory/memory.limit_in_bytes"):
        # Version 1 writes "no limit" as a number near 2**63.
        if (text := read_text(path)) and text.strip().isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


def cgroup_cpus() -> float | None:
    for path in cgroup_files("cpu.max", "cpu/cpu.cfs_quota_us"):
        words = (read_text(path) or "").split()
        if len(words) == 2 and words[0].isdigit():
            return int(words[0]) / int(words[1])
        if len(words) == 1 and words[0].isdigit():
            period = read_text(path.with_name("cpu.cfs_period_us"))
            return int(words[0]) / int(period) if period else None
    return None


def cgroup_files(version2: str, version1: str) -> list[Path]:
    own = re.search(r"^0::/(.*)$", read_text("/proc/self/cgroup") or "", re.MULTILINE)
    root = Path("/sys/fs/cgroup")
    return [root / (own[1] if own else "") / version2, root / version2, root / version1]


def soft_limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def read_text(path: str | Path) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def print_tables(report: dict[str, Section]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for title, section in report.items():
        table.add_row(Text(title, style="bold cyan"), "")
        for name, value in section.items():
            table.add_row(f"  {name}", Text(shown(name, value)))
    console.print(table)


def shown(name: str, value: Any) -> str:
    """A finding for people: "3.9 GiB", "no limit", "-"."""
    if value is None:
        return "no limit" if name.startswith(("cgroup", "locked", "open")) else "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes"):
        return f"{value / 2**30:.1f} GiB" if value >= 1 << 30 else f"{value / 2**20:.1f} MiB"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value)
