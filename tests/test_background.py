"""A thread of ours that is still inside torch when the main thread ends must not take the process down."""

import subprocess
import sys

import pytest

# The main thread goes on when the future is complete, before its callbacks have been run and released.
SLOW = """
import time

class Callback:
    def __call__(self, future):
        pass

    def __del__(self):
        for _ in range(200):
            time.sleep(0.002)

class Part:
    def wait(self, timeout_s):
        time.sleep(0.2)

    def done(self):
        return False
"""
LANE = """
from paracomm.hooks.lane import Lane

future = Lane("test").submit(lambda: Part().wait(None))
"""
PUBLISHER = """
from paracomm.backend.work import Work

future = Work([Part()], []).get_future()
"""


@pytest.mark.parametrize("start", [LANE, PUBLISHER], ids=["lane", "publisher"])
def test_thread_inside_torch_at_the_end(start: str) -> None:
    pytest.importorskip("torch", reason="the threads are those of hooks and of the backend")
    program = f"{SLOW}{start}future.then(Callback())\nfuture.wait()\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
