"""What one rank does for all, or each for itself, ends the same way on every rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from paracomm import errors
from paracomm.errors import Error

Exchange = Callable[[bytes], list[bytes]]


def outcomes(exchange: Exchange, job: Callable[[], Any] | None) -> list[Any]:
    """Runs `job` (None: nothing) and returns what each rank's gave, in rank order. Collective.

    What a job gives travels as JSON: a tuple comes back as a list.

    Raises, on every rank, what the first rank failed with: the same type if it is one of paracomm's, otherwise Error.
    """
    cause: Exception | None = None
    try:
        said = {"value": None if job is None else job()}
        blob = json.dumps(said).encode()
    except Exception as error:
        cause = error
        blob = json.dumps({"kind": _kind(error), "text": _text(error)}).encode()
    answers = [json.loads(answer) for answer in exchange(blob)]
    for rank, answer in enumerate(answers):
        if "value" not in answer:
            raise getattr(errors, answer["kind"])(f"rank {rank}: {answer['text']}") from cause
    return [answer["value"] for answer in answers]


def read_for_all(rank: int, exchange: Exchange, read: Callable[[], Any]) -> Any:
    """What `read` gives on rank 0, on every rank; raises as outcomes()."""
    return outcomes(exchange, read if rank == 0 else None)[0]


def _kind(error: Exception) -> str:
    known = type(error).__name__
    return known if isinstance(error, Error) and getattr(errors, known, None) is type(error) else Error.__name__


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, Error) else f"{type(error).__name__}: {error}"
