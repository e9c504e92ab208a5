"""Starts the ranks of a contender and talks to them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paracomm.errors import Error

WORKER = Path(__file__).with_name("worker.py")
START_TIMEOUT_S = 90.0


class ContenderError(Error):
    """A contender could not start, died, or did not answer."""


class CaseError(Error):
    """A call failed in the same way on every rank, which leaves the contender fit for the next case."""


@dataclass
class Start:
    """One process to start. A launcher such as mpiexec starts the others itself."""

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def package_path() -> str:
    """The directory that holds the package `paracomm`."""
    return str(Path(__file__).resolve().parents[3])


class Group:
    """The ranks of one contender, each behind its own control socket."""

    def __init__(
        self, name: str, ranks: int, starts: Sequence[Start], worker_args: Sequence[str], worker: Path = WORKER
    ) -> None:
        self.name, self.ranks = name, ranks
        self._folder = tempfile.TemporaryDirectory(prefix="paracomm-bench-")
        path = os.path.join(self._folder.name, "control")
        self._log = open(os.path.join(self._folder.name, "log"), "w+b")  # noqa: SIM115 - lives as long as the group
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(ranks)
        self._connections: list[socket.socket] = []
        self._streams: list[Any] = []
        self.pids: list[int] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for start in starts:
                self._processes.append(
                    subprocess.Popen(
                        [*start.argv, str(worker), path, *worker_args],
                        env=os.environ | {"OMP_NUM_THREADS": "1"} | start.env,
                        stdin=subprocess.DEVNULL,
                        stdout=self._log,
                        stderr=self._log,
                        start_new_session=True,
                    )
                )
            self._accept(time.monotonic() + START_TIMEOUT_S)
        except BaseException:
            self.kill()
            raise

    def _accept(self, deadline: float) -> None:
        """All ranks connect first and say who they are once their library is up, which needs all of them."""
        self._listener.settimeout(0.2)
        while len(self._connections) < self.ranks:
            self._check_alive(deadline)
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                connection.settimeout(START_TIMEOUT_S)
                self._connections.append(connection)
        streams: dict[int, Any] = {}
        pids: dict[int, int] = {}
        for connection in self._connections:
            stream = connection.makefile("rw", encoding="utf-8")
            hello = self._read(stream, "the start")
            if "error" in hello:
                raise ContenderError(f"{self.name} did not start: {hello['error'].strip().splitlines()[-1]}")
            streams[hello["rank"]], pids[hello["rank"]] = stream, hello["pid"]
        self._streams = [streams[rank] for rank in range(self.ranks)]
        self.pids = [pids[rank] for rank in range(self.ranks)]

    def _check_alive(self, deadline: float) -> None:
        dead = [process.returncode for process in self._processes if process.poll() is not None]
        if dead or time.monotonic() > deadline:
            what = (
                f"a process ended with status {dead[0]}" if dead else f"no sign of all ranks in {START_TIMEOUT_S:.0f} s"
            )
            raise ContenderError(f"{self.name} did not start: {what}{self.log_tail()}")

    def _read(self, stream: Any, what: str) -> dict[str, Any]:
        try:
            line = stream.readline()
        except (TimeoutError, OSError) as error:
            raise ContenderError(f"{self.name} did not answer {what}: {error}{self.log_tail()}") from None
        if not line:
            raise ContenderError(f"{self.name} died during {what}{self.log_tail()}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def log_tail(self) -> str:
        self._log.flush()
        text = Path(self._log.name).read_text(errors="replace").strip()
        return "\n  " + "\n  ".join(text.splitlines()[-8:]) if text else ""

    def ask(self, command: dict[str, Any], timeout_s: float = 60.0) -> list[dict[str, Any]]:
        """Every rank's answer. Raises CaseError when all fail, ContenderError when some do or are silent."""
        line = json.dumps(command) + "\n"
        for connection in self._connections:
            connection.settimeout(timeout_s)
        what = f"'{command['do']}' {command.get('collective', '')}".strip()
        try:
            for stream in self._streams:
                stream.write(line)
                stream.flush()
        except OSError:
            raise ContenderError(f"{self.name} died before {what}{self.log_tail()}") from None
        replies = [self._read(stream, what) for stream in self._streams]
        errors = [(rank, reply["error"]) for rank, reply in enumerate(replies) if "error" in reply]
        if errors:
            kind = CaseError if len(errors) == self.ranks else ContenderError
            raise kind(f"{self.name} rank {errors[0][0]}: {errors[0][1]}")
        return replies

    def close(self) -> None:
        """Lets the ranks end in order, and ends those that do not."""
        with contextlib.suppress(OSError, ValueError):
            for stream in self._streams:
                stream.write('{"do": "quit"}\n')
                stream.flush()
        deadline = time.monotonic() + 10
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Ends whatever still runs. A launcher's ranks may have left its process group: they are ended one by one."""
        for pid in self.pids:
            with contextlib.suppress(OSError):
                if self._folder.name in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for resource in (*self._streams, *self._connections, self._listener, self._log):
            with contextlib.suppress(OSError):
                resource.close()
        self._folder.cleanup()


# --- where ranks run ---


@dataclass(frozen=True)
class Place:
    """Which emulated host each rank runs on; without hosts, all ranks run here."""

    ranks: int
    hosts: tuple[int, ...] = ()

    def starts(self, python: str = sys.executable) -> list[Start]:
        """The ranks as torchrun would start them: by environment variables."""
        port = str(free_port())
        starts = []
        for rank in range(self.ranks):
            host = self.hosts[rank] if self.hosts else 0
            local = [r for r in range(self.ranks) if not self.hosts or self.hosts[r] == host]
            env = {
                "RANK": str(rank),
                "WORLD_SIZE": str(self.ranks),
                "LOCAL_RANK": str(local.index(rank)),
                "LOCAL_WORLD_SIZE": str(len(local)),
                "MASTER_ADDR": "10.77.0.1" if self.hosts else "127.0.0.1",
                "MASTER_PORT": port,
                "PYTHONPATH": os.pathsep.join(filter(None, [package_path(), os.environ.get("PYTHONPATH", "")])),
            }
            inside: list[str] = []
            if self.hosts:
                env |= {"GLOO_SOCKET_IFNAME": f"v{host}", "PARACOMM_BENCH_HOST": f"host{host}"}
                inside = ["ip", "netns", "exec", f"pc{host}"]
            starts.append(Start([*inside, python], env))
        return starts
