"""A thread on which hooks finish, and on which hooks that are not ours run one bucket after the other."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from paracomm import background

Function = TypeVar("Function", bound=Callable[..., Any])
LOOK_EVERY_S = 0.1
LONGEST_PAUSE_S = 1e-3


class Lane:
    """A thread that runs functions one after the other and completes a future for each."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Any, list[BaseException]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], Any]) -> Any:
        """A torch Future of what `job` returns; it fails with what the job raises, in C++ and in Python alike.

        torch keeps the text of an exception only: `raised_by` gives the exception.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        raised: list[BaseException] = []

        def outcome_of(outcome: Any) -> Any:
            if raised:
                raise raised[0]
            return outcome.value()

        outcome: torch.futures.Future[Any] = torch.futures.Future()
        # Future.set_exception would reach Python's wait() only: DDP waits in C++ and takes the exception for a tensor.
        result = outcome.then(outcome_of)
        _raised[result] = raised
        self._jobs.put((job, outcome, raised))
        return result

    @torch.no_grad()
    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            with background.busy():
                job, outcome, raised = item
                result = None
                try:
                    result = job()
                except BaseException as error:
                    raised.append(error)
                outcome.set_result(result)
                del job, outcome, raised, result, item  # an idle lane keeps no bucket alive

    def close(self) -> None:
        """Ends the thread after what was submitted."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None


_raised: weakref.WeakKeyDictionary[Any, list[BaseException]] = weakref.WeakKeyDictionary()


def raised_by(future: Any) -> BaseException | None:
    """What the job raised that a lane ran for this future."""
    raised = _raised.get(future) if isinstance(future, torch._C.Future) else None
    return raised[0] if raised else None


def raised_in_backward(future: Any) -> Any:
    """The future. At the end of the backward pass that asked for it, what its job raised is raised: DDP, which waits
    after that and in C++, would make a RuntimeError of it."""
    if isinstance(future, torch._C.Future) and torch._C._current_graph_task_id() != -1:

        def look() -> None:
            try:
                future.wait()
            except RuntimeError:
                if (error := raised_by(future)) is not None:
                    raise error from None
                raise

        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(look)
    return future


class Ranks(Protocol):
    """A communicator or a wire, as what watches over a hook knows it."""

    def check(self) -> None: ...
    def abort(self, why: str) -> None: ...


def wait_while_well(future: Any, ranks: Ranks) -> None:
    """Returns when a lane's future is done. Raises if the ranks fail meanwhile: the job may wait for an engine of
    torch's which does not learn that a rank gave up."""
    done = threading.Event()
    future.then(lambda _: done.set())
    while not done.wait(LOOK_EVERY_S):
        ranks.check()


def poll_while_well(done: Callable[[], bool], ranks: Ranks) -> None:
    """The same for what another engine completes. A callback would run on a thread of that engine, and one that still
    wants the interpreter when this ends takes the process down (seen with Gloo)."""
    pause_s, look_at = 5e-5, time.monotonic() + LOOK_EVERY_S
    while not done():
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        if time.monotonic() >= look_at:
            ranks.check()
            look_at = time.monotonic() + LOOK_EVERY_S


def keeps_order(hook: Function) -> Function:
    """Marks a hook that starts the same operations in the same order on every rank, whenever they finish."""
    hook.keeps_order = True  # type: ignore[attr-defined]
    return hook


def one_at_a_time(hook: Callable[[Any, Any], Any], ranks: Ranks | None = None) -> Callable[[Any, Any], Any]:
    """`hook`, called for a bucket only when its future for the bucket before is done; itself if it keeps order.
    What the hook or its future raises on the thread ends the communication of `ranks`, and theirs ends the waiting.

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
        return lane.submit(lambda: finished(state, bucket))

    def finished(state: Any, bucket: Any) -> Any:
        try:
            future = hook(state, bucket)
            if ranks is not None:
                poll_while_well(future.done, ranks)
            return future.wait()
        except BaseException as error:
            if ranks is not None:
                if isinstance(error, RuntimeError):  # torch has kept the text alone of what a callback raised
                    ranks.check()
                ranks.abort(because_of(error))
            raise

    in_turn.lane = lane  # type: ignore[attr-defined]  # for whoever wants to end it
    return keeps_order(in_turn)


def because_of(error: BaseException) -> str:
    """Why a rank gives up whose hook raised."""
    return f"a gradient hook raised {type(error).__name__}: {error}"
