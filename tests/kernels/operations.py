"""Every differentiable operation with inputs for each of its options: what tests of all operations walk over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from paracomm import kernels
from paracomm.kernels import reference_cross_entropy as twin

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """An operation of floating-point tensors, whose shapes these are; all its other arguments are fixed."""

    name: str
    function: Function
    shapes: tuple[tuple[int, ...], ...]
    batched: tuple[int, ...] = (0,)
    """Inputs that torch.vmap may map over while the others stay."""

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for shape in self.shapes
        ]

    def __str__(self) -> str:
        return self.name


def _norms() -> list[Case]:
    x, d = (2, 3, 5), (5,)
    return [
        case
        for kind in ("rms", "layer")
        for case in (
            Case(f"{kind}", lambda x, w, kind=kind: kernels.add_norm(x, None, w, kind=kind)[0], (x, d)),
            Case(f"{kind} bias", lambda x, w, b, kind=kind: kernels.add_norm(x, None, w, b, kind=kind)[0], (x, d, d)),
            Case(f"add {kind}", lambda x, r, w, kind=kind: kernels.add_norm(x, r, w, kind=kind), (x, x, d), (0, 1)),
            Case(f"add {kind} bias", lambda x, r, *wb, kind=kind: kernels.add_norm(x, r, *wb, kind=kind), (x, x, d, d)),
        )
    ]  # fmt: skip


def _mlps() -> list[Case]:
    x, w, b, y = (2, 3, 4), (5, 4), (5,), (2, 3, 5)
    found = [
        Case("linear", kernels.linear, (x, w)),
        Case("linear bias residual", lambda x, w, b, r: kernels.linear(x, w, b, None, r), (x, w, b, y), (0, 3)),
    ]
    for name in ("gelu", "gelu_tanh", "relu", "silu"):
        found += [
            Case(f"linear {name}", lambda x, w, b, r, a=name: kernels.linear(x, w, b, a, r), (x, w, b, y)),
            Case(f"glu {name}", lambda x, g, u, a=name: kernels.glu(x, g, u, activation=a), (x, w, w)),
            Case(f"glu {name} bias", lambda x, g, u, b, c, a=name: kernels.glu(x, g, u, b, c, a), (x, w, w, b, b)),
            Case(f"gated {name}", lambda g, u, a=name: kernels.gated(g, u, a), (y, y), (0, 1)),
            Case(f"activate {name}", lambda x, a=name: kernels.activate(x, a), (y,)),
        ]
    return found


def _heads() -> list[Case]:
    q, k = (2, 4, 3, 4), (2, 2, 5, 4)
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    drop = kernels.Dropout(3, 1, 2, 0.3, torch.arange(2), (0, 4))
    options: dict[str, dict] = {
        "attention": {},
        "attention causal": {"causal": True},
        "attention window softcap": {"window": 2, "softcap": 2.0, "scale": 0.7},
        "attention mask": {"key_mask": mask},
        "attention dropout": {"dropout": drop},
    }
    found = [
        Case(name, lambda q, k, v, o=o: kernels.attention(q, k, v, **o)[0], (q, k, k)) for name, o in options.items()
    ]
    blind = (2, 4, 7, 4)
    found.append(Case("attention blind", lambda q, k, v: kernels.attention(q, k, v, causal=True)[0], (blind, k, k)))
    edges = {
        "cu_q": torch.tensor([0, 2, 2, 5], dtype=torch.int32), "cu_k": torch.tensor([0, 1, 3, 7], dtype=torch.int32),
        "max_q": 3, "max_k": 4,
    }  # fmt: skip
    packed = ((1, 4, 7, 4), (1, 2, 8, 4), (1, 2, 8, 4))
    found.append(
        Case("attention packed", lambda q, k, v: kernels.attention(q, k, v, causal=True, **edges)[0], packed, ())
    )
    lengths = torch.tensor([4, 1], dtype=torch.int32)
    for name, o in {"decode": {}, "decode softcap": {"softcap": 2.0}, "decode window": {"window": 2}}.items():
        found.append(Case(name, lambda q, k, v, o=o: kernels.decode(q, k, v, lengths, **o)[0], (q, k, k)))
    whole: dict = {"need_lse": False}
    found.append(Case("decode out", lambda q, k, v: kernels.decode(q, k, v, lengths, **whole)[0], (q, k, k)))
    angles = torch.outer(torch.arange(3.0), torch.tensor([1.0, 0.1])).repeat(1, 2)
    found.append(
        Case("rotary", lambda x: kernels.rotary(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype)), ((2, 2, 3, 4),))
    )
    found.append(Case("rotary tables", kernels.rotary, ((2, 2, 3, 4), (3, 4), (3, 4))))
    return found


TARGETS = torch.tensor([3, -100, 0, 6, 2, -100])


def _heads_of_models() -> list[Case]:
    x, w, b = (6, 4), (7, 4), (7,)

    def chunked(x: Tensor, w: Tensor, b: Tensor | None, softcap: float | None) -> Tensor:
        return twin._Chunked.apply(x, w, b, TARGETS, TARGETS != -100, softcap, 4)

    def head(x: Tensor, w: Tensor, b: Tensor | None = None, softcap: float | None = None) -> Tensor:
        return kernels.linear_cross_entropy(x, w, b, TARGETS, softcap=softcap)[0]

    def part(x: Tensor, w: Tensor, b: Tensor | None = None, softcap: float | None = None) -> tuple[Tensor, ...]:
        return kernels.partial_cross_entropy(x, w, b, TARGETS - 2, softcap=softcap)

    return [
        Case("head", head, (x, w)),
        Case("head bias softcap", lambda x, w, b: head(x, w, b, 2.0), (x, w, b)),
        Case("head chunked", lambda x, w: chunked(x, w, None, None), (x, w), ()),
        Case("head chunked bias softcap", lambda x, w, b: chunked(x, w, b, 2.0), (x, w, b), ()),
        Case("part", part, (x, w)),
        Case("part bias softcap", lambda x, w, b: part(x, w, b, 2.0), (x, w, b)),
    ]


CASES = [*_norms(), *_mlps(), *_heads(), *_heads_of_models()]
