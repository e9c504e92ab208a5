"""A thread on which hooks finish, and on which hooks that are not ours run one bucket after the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


class Lane:
    """A thread that runs functions one after the other and completes a future for each."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], Any]) -> Any:
        """A torch Future of what `job` returns; it fails with what the job raises, in C++ and in Python alike."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        outcome: torch.futures.Future[Any] = torch.futures.Future()
        # Future.set_exception would reach Python's wait() only: DDP waits in C++ and takes the exception for a tensor.
        result = outcome.then(_raise_or_return)
        self._jobs.put((job, outcome))
        return result

    @torch.no_grad()
    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, outcome = item
            try:
                result = job()
            except BaseException as error:
                result = _Raised(error)
            outcome.set_result(result)
            del job, outcome, result, item  # an idle lane keeps no bucket alive

    def close(self) -> None:
        """Ends the thread after what was submitted."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _raise_or_return(outcome: Any) -> Any:
    result = outcome.value()
    if isinstance(result, _Raised):
        raise result.error
    return result


def keeps_order(hook: Function) -> Function:
    """Marks a hook that starts the same operations in the same order on every rank, whenever they finish."""
    hook.keeps_order = True  # type: ignore[attr-defined]
    return hook


def one_at_a_time(hook: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`hook`, called for a bucket only when its future for the bucket before is done; itself if it keeps order.

    A hook that sends a second message once the first arrived, as torch's PowerSGD and quantisation do, starts it at
    another moment on every rank. With several buckets under way the ranks then start different operations next to each
    other, and on engines that match operations by their order (Gloo, ours) they mix up each other's data.
    """
    if getattr(getattr(hook, "func", hook), "keeps_order", False):
        return hook
    lane = Lane("paracomm hooks in order")

    def in_turn(state: Any, bucket: Any) -> Any:
        if bucket.buffer().device.type != "cpu":  # there the stream keeps the order
            return hook(state, bucket)
        return lane.submit(lambda: hook(state, bucket).wait())

    in_turn.lane = lane  # type: ignore[attr-defined]  # for whoever wants to end it
    return keeps_order(in_turn)
