"""The products of an MLP with bias, activation, gate and residual in one kernel, or by their eager twins.

Shapes: x [..., K], weights [N, K] as torch.nn.Linear has them, y [..., N]. Inputs are float32, float16 or bfloat16, all
of one dtype; products add in float32. The gradient of x of a gated unit is one kernel of two products, which are added
before they are rounded; the gradient of x of a linear and those of weights are one plain product each, where there is
nothing to fuse: torch.matmul, that is cuBLAS. Bits are the same from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paracomm.errors import InvalidArgument
from paracomm.kernels import derivatives, reference, select
from paracomm.kernels.arguments import expect_tensors
from paracomm.kernels.autocast import autocast_dtype, autocast_off, cast, widest


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """activation(x weight^T + bias) + residual, of x's dtype.

    Args:
        bias: [N]. residual: [..., N].
        activation: one of reference.ACTIVATIONS: "gelu" (exact), "gelu_tanh", "relu", "silu"; None: none.

    Under autocast the product is in its dtype, and a residual of another one is added as torch promotes.

    Raises InvalidArgument for shapes and dtypes that do not fit, and for an unknown activation.
    """
    expect_tensors("linear", {"x": x, "weight": weight}, {"bias": bias, "residual": residual})
    if (lower := autocast_dtype(x)) is not None:
        x, weight, bias = cast(lower, x, weight, bias)
        with autocast_off(x):
            if residual is None or residual.dtype == x.dtype:
                return linear(x, weight, bias, activation, residual)
            _check_residual(x, weight, residual)
            return linear(x, weight, bias, activation) + residual
    _check("linear", x, activation, weights=(weight,), biases=(bias,))
    if residual is not None:
        _check_residual(x, weight, residual)
        if residual.dtype != x.dtype:
            raise InvalidArgument(f"linear: residual is {residual.dtype}, expected {x.dtype} as x")
    if not select.runs(x):
        return reference.linear(x, weight, bias, activation, residual)
    rows = None if residual is None else _rows(residual)
    keep = activation is not None and _differentiates(x, weight, bias)
    y, _ = _linear_op(_rows(x), weight, bias, activation or "none", rows, keep)
    return y.view(*x.shape[:-1], weight.shape[0])


def glu(
    x: Tensor, w_gate: Tensor, w_up: Tensor, bias_gate: Tensor | None = None, bias_up: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:  # fmt: skip
    """activation(x w_gate^T + bias_gate) * (x w_up^T + bias_up): "silu" is SwiGLU, "gelu" GeGLU (Shazeer, 2020).

    Both biases or none. Raises InvalidArgument as linear(); under autocast in its dtype.
    """
    expect_tensors("glu", {"x": x, "w_gate": w_gate, "w_up": w_up}, {"bias_gate": bias_gate, "bias_up": bias_up})
    if (lower := autocast_dtype(x)) is not None:
        x, w_gate, w_up, bias_gate, bias_up = cast(lower, x, w_gate, w_up, bias_gate, bias_up)
        with autocast_off(x):
            return glu(x, w_gate, w_up, bias_gate, bias_up, activation)
    _check("glu", x, activation, weights=(w_gate, w_up), biases=(bias_gate, bias_up))
    if w_gate.shape != w_up.shape or (bias_gate is None) != (bias_up is None):
        raise InvalidArgument(
            f"glu: weights {list(w_gate.shape)} and {list(w_up.shape)}, expected as large; biases: both or none"
        )
    if not select.runs(x):
        return reference.glu(x, w_gate, w_up, bias_gate, bias_up, activation)
    keep = _differentiates(x, w_gate, w_up, bias_gate, bias_up)
    y, _, _ = _glu_op(_rows(x), w_gate, w_up, bias_gate, bias_up, activation, keep)
    return y.view(*x.shape[:-1], w_gate.shape[0])


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """activation(gate) * up, elementwise: between products of which each rank has columns. As glu(), but under
    autocast of the wider dtype."""
    expect_tensors("gated", {"gate": gate, "up": up})
    _known("gated", activation)
    if autocast_dtype(gate) is not None:
        with autocast_off(gate):
            if gate.dtype != up.dtype and gate.shape == up.shape:
                wide = widest(gate, up)
                return activate(gate, activation).to(wide) * up.to(wide)
            return gated(gate, up, activation)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise InvalidArgument(
            f"gated: gate {list(gate.shape)} of {gate.dtype}, up {list(up.shape)} of {up.dtype}, expected alike"
        )
    if not select.runs(gate):
        return reference.gated(gate, up, activation)
    return _gated_op(gate.contiguous(), up.contiguous(), activation)


def activate(x: Tensor, activation: str) -> Tensor:
    """activation(x), elementwise; its gradient keeps x only."""
    expect_tensors("activate", {"x": x})
    _known("activate", activation)
    if not select.runs(x):
        return reference.ACTIVATIONS[activation](x)
    return _active_op(x.contiguous(), activation)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])  # not -1, which no features leave open


def _known(name: str, activation: str | None) -> None:
    if activation not in reference.ACTIVATIONS:
        raise InvalidArgument(
            f"{name}: activation is {activation!r}, expected one of {', '.join(reference.ACTIVATIONS)}"
        )


def _check_residual(x: Tensor, weight: Tensor, residual: Tensor) -> None:
    if residual.shape != (*x.shape[:-1], weight.shape[0]):
        raise InvalidArgument(
            f"linear: residual {list(residual.shape)} of {residual.dtype}, expected "
            f"{[*x.shape[:-1], weight.shape[0]]} of {x.dtype}"
        )


def _check(
    name: str, x: Tensor, activation: str | None, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]
) -> None:
    if activation is not None or name != "linear":
        _known(name, activation)
    for weight, bias in zip(weights, biases, strict=True):
        if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.dtype != x.dtype:
            raise InvalidArgument(
                f"{name}: x {list(x.shape)} of {x.dtype}, weight {list(weight.shape)} of {weight.dtype}, expected "
                "[..., K] and [N, K] of one dtype"
            )
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
            raise InvalidArgument(
                f"{name}: bias {list(bias.shape)} of {bias.dtype}, expected {[weight.shape[0]]} of {x.dtype}"
            )


def _differentiates(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


# --- linear ---
@torch.library.custom_op("paracomm::linear", mutates_args=())
def _linear_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    """(y, what came before the activation or [0])."""
    if select.runs(x):
        from paracomm.kernels.mlp_launch import launch_linear

        return launch_linear(x, weight, bias, activation, residual, keep)
    z = torch.nn.functional.linear(x, weight, bias)
    y = z if activation == "none" else reference.ACTIVATIONS[activation](z)
    if residual is not None:
        y = y + residual
    return y, z.clone() if keep else z.new_empty(0)


@_linear_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if keep else x.new_empty(0)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.activation, residual, _ = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.has_bias, ctx.has_residual, ctx.backend = bias is not None, residual is not None, select.current()
    ctx.mark_non_differentiable(output[1])


def _linear_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, z = ctx.saved_tensors
    need_x, need_w, need_b = ctx.needs_input_grad[:3]
    dresidual = grad if ctx.has_residual else None
    with select.backend(ctx.backend), autocast_off(x):
        if derivatives.wanted():
            name = None if ctx.activation == "none" else ctx.activation
            dx, dweight, dbias = derivatives.pull_back(
                lambda x, w, b: reference.linear(x, w, b, name, None), (x, weight, bias), (grad,),
                (need_x, need_w, need_b),
            )  # fmt: skip
            return dx, dweight, dbias, None, dresidual, None
        dz = grad
        if ctx.activation != "none" and (need_x or need_w or need_b):
            dz = _active_backward_op(grad.contiguous(), z, ctx.activation)
        return (
            dz @ weight if need_x else None,
            dz.t() @ x if need_w else None,
            dz.sum(0) if ctx.has_bias and need_b else None,
            None,
            dresidual,
            None,
        )


_linear_op.register_autograd(_linear_backward, setup_context=_save_linear)


# --- glu ---
@torch.library.custom_op("paracomm::glu", mutates_args=())
def _glu_op(
    x: Tensor, w_gate: Tensor, w_up: Tensor, bias_gate: Tensor | None, bias_up: Tensor | None, activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, gate, up); the last two [0] unless they are kept."""
    if select.runs(x):
        from paracomm.kernels.mlp_launch import launch_glu

        return launch_glu(x, w_gate, w_up, bias_gate, bias_up, activation, keep)
    gate, up = torch.nn.functional.linear(x, w_gate, bias_gate), torch.nn.functional.linear(x, w_up, bias_up)
    y = reference.gated(gate, up, activation)
    return (y, gate, up) if keep else (y, x.new_empty(0), x.new_empty(0))


@_glu_op.register_fake
def _(
    x: Tensor, w_gate: Tensor, w_up: Tensor, bias_gate: Tensor | None, bias_up: Tensor | None, activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y = x.new_empty(x.shape[0], w_gate.shape[0])
    return y, *(torch.empty_like(y) if keep else x.new_empty(0) for _ in range(2))  # type: ignore[return-value]


def _save_glu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.activation, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.has_bias, ctx.backend = tensors[3] is not None, select.current()
    ctx.mark_non_differentiable(*output[1:])


def _glu_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *inputs, gate, up = ctx.saved_tensors
    x, w_gate, w_up = inputs[:3]
    needed = ctx.needs_input_grad
    with select.backend(ctx.backend), autocast_off(x):
        if derivatives.wanted():
            found = derivatives.pull_back(
                lambda x, g, u, b, c: reference.glu(x, g, u, b, c, ctx.activation), inputs, (grad,), needed[:5]
            )
            return *found, None, None
        dgate, dup = _gated_backward_op(grad.contiguous(), gate, up, ctx.activation)
        return (
            _sum_op(dgate, w_gate, dup, w_up) if needed[0] else None,
            dgate.t() @ x if needed[1] else None,
            dup.t() @ x if needed[2] else None,
            dgate.sum(0) if ctx.has_bias and needed[3] else None,
            dup.sum(0) if ctx.has_bias and needed[4] else None,
            None,
            None,
        )


_glu_op.register_autograd(_glu_backward, setup_context=_save_glu)


@torch.library.custom_op("paracomm::sum_of_products", mutates_args=())
def _sum_op(a: Tensor, v: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """a [M, K] v [K, N] + b [M, K] w [K, N], rounded once."""
    if select.runs(a):
        from paracomm.kernels.mlp_launch import launch_sum

        return launch_sum(a, v, b, w)
    return torch.addmm(b @ w, a, v)


@_sum_op.register_fake
def _(a: Tensor, v: Tensor, b: Tensor, w: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], v.shape[1])


# --- elementwise ---
@torch.library.custom_op("paracomm::gated", mutates_args=())
def _gated_op(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if select.runs(gate):
        from paracomm.kernels.mlp_launch import launch_gated

        return launch_gated(gate, up, activation)
    return reference.gated(gate, up, activation)


@_gated_op.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty_like(gate)


@torch.library.custom_op("paracomm::gated_backward", mutates_args=())
def _gated_backward_op(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if select.runs(gate):
        from paracomm.kernels.mlp_launch import launch_gated_backward

        return launch_gated_backward(grad, gate, up, activation)
    return reference.ACTIVATION_GRADIENTS[activation](grad * up, gate), grad * reference.ACTIVATIONS[activation](gate)


@_gated_backward_op.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)
    ctx.backend = select.current()


def _differentiate_gated(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with select.backend(ctx.backend):
        if derivatives.wanted():
            found = derivatives.pull_back(
                lambda gate, up: reference.gated(gate, up, ctx.activation), ctx.saved_tensors, (grad,),
                ctx.needs_input_grad[:2],
            )  # fmt: skip
            return *found, None
        return *_gated_backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.activation), None


_gated_op.register_autograd(_differentiate_gated, setup_context=_save_gated)


@torch.library.custom_op("paracomm::activate", mutates_args=())
def _active_op(x: Tensor, activation: str) -> Tensor:
    if select.runs(x):
        from paracomm.kernels.mlp_launch import launch_active

        return launch_active(x, activation)
    return reference.ACTIVATIONS[activation](x)


@_active_op.register_fake
def _(x: Tensor, activation: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("paracomm::activate_backward", mutates_args=())
def _active_backward_op(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    if select.runs(x):
        from paracomm.kernels.mlp_launch import launch_active_backward

        return launch_active_backward(grad, x, activation)
    return reference.ACTIVATION_GRADIENTS[activation](grad, x)


@_active_backward_op.register_fake
def _(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    return torch.empty_like(x)


def _save_active(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.activation = inputs
    ctx.save_for_backward(x)
    ctx.backend = select.current()


def _differentiate_active(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with select.backend(ctx.backend):
        if derivatives.wanted():
            return derivatives.pull_back(
                reference.ACTIVATIONS[ctx.activation], ctx.saved_tensors, (grad,), ctx.needs_input_grad[:1]
            )[0], None
        return _active_backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.activation), None


_active_op.register_autograd(_differentiate_active, setup_context=_save_active)
