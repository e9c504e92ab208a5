"""torch.compile, and calls of ours in the midst of a compiled program: as they are, and never traced.

While a compiled program runs, dynamo looks at every Python frame that starts outside of its graphs, also at those that
torch's C++ starts (DistributedDataParallel's reducer broadcasts while it rebuilds its buckets). Of ours it would make
graphs over fake tensors, which have no memory to send, and constants of what a Work had been when it looked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

_untraced: set[type] = set()


def untraced(kind: type, calls_too: bool = True) -> None:
    """Has dynamo run the methods of `kind` as they are. Does nothing before torch is imported.

    Args:
        calls_too: a compiled function that calls them breaks its graph there, and does not take their code into its
            own. False for a class whose methods torch itself knows how to trace.
    """
    torch = sys.modules.get("torch")
    if torch is None or kind in _untraced:
        return
    _untraced.add(kind)
    dynamo = torch._C._dynamo.eval_frame
    for function in _functions(kind):
        if calls_too:  # as torch.compiler.disable marks them; that imports dynamo, for seconds
            function._torchdynamo_disable = True
            function._torchdynamo_disable_msg = "it communicates"
        if hasattr(dynamo, "set_code_exec_strategy"):  # torch 2.7
            skip = dynamo._FrameAction.SKIP
            dynamo.set_code_exec_strategy(function.__code__, dynamo._FrameExecStrategy(skip, skip))
        elif hasattr(dynamo, "skip_code"):
            dynamo.skip_code(function.__code__)


def _functions(kind: type) -> Iterator[Any]:
    for value in vars(kind).values():
        if isinstance(value, property):
            value = value.fget
        if isinstance(value, FunctionType):
            yield value
