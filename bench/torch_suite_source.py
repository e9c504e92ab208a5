"""The source of PyTorch's distributed tests, changed in memory: another backend in place of Gloo, CPU tensors in place
of a GPU's, and no gates that ask for a GPU or for another backend.

    written                                          run as
    x.cuda(rank), x.to(rank), x.to("cuda")           a copy of the tensor, or the module itself, on the CPU
    device=rank, device="cuda:0", torch.device(rank) the CPU
    device_ids=[rank], output_device=rank            None
    torch.cuda.set_device, synchronize, stream, ...  nothing (`Cuda` below); manual_seed: that of the CPU
    torch.Stream(), torch.Event(), torch.accelerator.current_stream() of torch itself    a `Stream` of the CPU
    new_group(..., backend="nccl")                   a group of the backend that is tested
    @skip_if_no_gpu, @skip_if_lt_x_gpu(2), skips that name BACKEND, requires_nccl_version    no gate
    @skip_if_small_worldsize (fewer than 8 ranks)    no gate where the groups of such tests, ranks 1 and 2, exist

What torch's authors have switched off for everybody (unittest.skip with an issue of theirs) stays so.
"""

from __future__ import annotations

import ast
import os
import re
from functools import partial
from typing import Any

GATE = re.compile(
    r"BACKEND|skip_if_no_gpu|skip_if_lt_x_gpu|require_n_gpus|requires_nccl|skip_if_rocm|require_backend_is_available"
)
CLOSED_TO_GLOO = re.compile(
    r"skip_if_no_gpu|^skip_if_lt_x_gpu|requires_nccl|(?!.*'gloo')BACKEND != '|is_available\(\{'nccl'\}|small_worldsize"
)
SMALL_WORLD = "skip_if_small_worldsize"
UNEVEN_INPUTS = "def test_ddp_uneven_inputs(self):\n            dim = 50\n"


def renamed(text: str, backend: str) -> str:
    """The source with `backend` wherever it says Gloo."""
    text = re.sub(r'(?<!"backend_name"\) == )"gloo"', f'"{backend}"', text)  # that test reads Gloo's own settings
    return re.sub(r"(==|=) dist\.Backend\.GLOO", rf'\1 dist.Backend("{backend}")', text)


def on_cpu(text: str, world_size: int) -> tuple[ast.Module, set[str]]:
    """The source for CPU tensors, and the tests in it that a gate kept from Gloo."""
    # Its convolutions of a million points take a CPU minutes.
    text = text.replace("def test_ddp_uneven_inputs(self):\n            dim = 1000\n", UNEVEN_INPUTS)
    replacer = _OnCpu(small_world=world_size < 3)
    tree: ast.Module = ast.fix_missing_locations(replacer.visit(ast.parse(text)))
    return tree, replacer.opened


def without_streams() -> None:
    """torch, in this process, for parts of it that take for granted that the device has streams (DDP's mixed precision
    and its optimizers in the backward pass)."""
    import torch

    torch.Stream = torch.Event = Stream  # type: ignore[assignment,misc]
    torch.accelerator.current_stream = lambda device=None: Stream()  # type: ignore[assignment,return-value]


def test_names(text: str, classes: set[str]) -> list[str]:
    """The tests in the classes of these names."""
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef) and node.name in classes]
    functions = [node for each in found for node in each.body if isinstance(node, ast.FunctionDef)]
    return [function.name for function in functions if function.name.startswith("test_")]


def names() -> dict[str, Any]:
    """What the changed source refers to, or takes from torch under these names."""
    import torch

    return {
        "_cuda": Cuda(),
        "_moved": moved,
        "_place": place,
        "autocast": partial(torch.amp.autocast, "cpu"),
        "GradScaler": partial(torch.amp.GradScaler, "cpu"),
        "init_multigpu_helper": lambda world_size, backend: {rank: [rank] for rank in range(world_size)},
    }


class _OnCpu(ast.NodeTransformer):
    def __init__(self, small_world: bool) -> None:
        self.small_world = small_world
        self.opened: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        gates = {gate: ast.unparse(gate) for gate in node.decorator_list}
        node.decorator_list = [gate for gate, text in gates.items() if not self._opens(text)]
        if any(self._opens(text) and CLOSED_TO_GLOO.search(text) for text in gates.values()):
            self.opened.add(node.name)
        return self.generic_visit(node)

    def _opens(self, gate: str) -> bool:
        if gate == SMALL_WORLD:
            return not self.small_world
        return GATE.search(gate) is not None

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if ast.unparse(node) == "torch.cuda":
            return ast.Name("_cuda", ast.Load())
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        for keyword in node.keywords:
            if keyword.arg in ("device_ids", "output_device"):
                keyword.value = ast.Constant(None)
            elif keyword.arg == "device":
                keyword.value = _call("_place", keyword.value)
            elif keyword.arg == "backend" and ast.unparse(keyword.value) in ("'nccl'", "dist.Backend.NCCL"):
                keyword.value = ast.Name("BACKEND", ast.Load())
        if isinstance(node.func, ast.Attribute):
            if node.func.attr == "cuda":
                return _call("_moved", node.func.value)
            if node.func.attr == "to" and node.args:
                return ast.Call(ast.Name("_moved", ast.Load()), [node.func.value, *node.args], node.keywords)
            if ast.unparse(node.func) == "torch.device":
                node.args = [_call("_place", node.args[0])]
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        return node if ast.unparse(node.value).endswith("backend_feature") else self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("cpu") if isinstance(node.value, str) and _is_cuda(node.value) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.Constant("cpu") if _starts_cuda(node.values[0]) else self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        return ast.Constant("cpu") if _starts_cuda(node.left) else self.generic_visit(node)


def _call(name: str, argument: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), [argument], [])


def _starts_cuda(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("cuda:")


def _is_cuda(device: Any) -> bool:
    """Of what torch takes as a device."""
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return isinstance(device, str) and re.fullmatch(r"cuda(:\d+)?", device) is not None


def place(device: Any) -> Any:
    """A device, with the CPU in place of a GPU. A number is one of a GPU."""
    return "cpu" if _is_cuda(device) else device


def moved(value: Any, *arguments: Any, **options: Any) -> Any:
    """`value.cuda(...)` or `value.to(...)`. A tensor that comes to a GPU is a copy."""
    import torch

    if arguments and not _is_cuda(arguments[0]):
        return value.to(*arguments, **options)
    if isinstance(value, torch.Tensor):
        return value.to("cpu", *arguments[1:], **options | {"copy": True})
    return value.to("cpu", *arguments[1:], **options)


class Stream:
    """A stream, or an event of one, where all of it is done when a call returns."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass


class Cuda:
    """torch.cuda, where a rank's GPU is the CPU: all of it is done when a call returns."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return int(os.environ["WORLD_SIZE"])

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def set_device(device: Any) -> None:
        pass

    @staticmethod
    def synchronize(device: Any = None) -> None:
        pass

    @staticmethod
    def manual_seed(seed: int) -> None:
        import torch

        torch.manual_seed(seed)

    Stream = Stream

    @staticmethod
    def stream(stream: Any) -> Any:
        return stream
