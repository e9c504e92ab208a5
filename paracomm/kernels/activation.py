"""Activations and their derivatives, for kernels, in float32. NAME is one of reference.ACTIVATIONS, or "none"."""

from __future__ import annotations

import triton
import triton.language as tl

# sqrt(2 / pi), 1 / sqrt(2), 1 / sqrt(2 pi); the cubic term of GELU's tanh form (Hendrycks and Gimpel, 2016).
ROOT_2_PI = tl.constexpr(0.7978845608028654)
ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)
CUBIC = tl.constexpr(0.044715)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """Within a few ulp for every x: a series near 0, where 1 - exp would cancel."""
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - t) / (1.0 + t)
    y = x * x
    series = 0.021869488536 - y * 0.0088632355
    series = 1.0 + y * (-0.3333333333333 + y * (0.13333333333 + y * (-0.053968253968 + y * series)))
    return tl.where(tl.abs(x) < 0.3, x * series, tl.where(x < 0, -far, far))


@triton.jit
def activated(x, NAME: tl.constexpr):
    if NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * ROOT_HALF))
    elif NAME == "gelu_tanh":
        x = 0.5 * x * (1.0 + tanh((x + x * x * x * CUBIC) * ROOT_2_PI))
    elif NAME == "silu":
        x = x * tl.sigmoid(x)
    elif NAME == "relu":
        x = tl.where(x <= 0.0, 0.0, x)  # NaN stays
    else:
        tl.static_assert(NAME == "none", "unknown activation")
    return x


@triton.jit
def slope(x, NAME: tl.constexpr):
    """The derivative at x."""
    if NAME == "gelu":
        d = 0.5 * (1.0 + tl.erf(x * ROOT_HALF)) + x * tl.exp2(x * x * (-0.5 * LOG2E)) * DENSITY
    elif NAME == "gelu_tanh":
        t = tanh((x + x * x * x * CUBIC) * ROOT_2_PI)
        d = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * (1.0 + x * x * (3.0 * CUBIC)) * ROOT_2_PI
    elif NAME == "silu":
        s = tl.sigmoid(x)
        d = s * (1.0 + x * (1.0 - s))
    elif NAME == "relu":
        d = tl.where(x <= 0.0, 0.0, 1.0)
    else:
        tl.static_assert(NAME == "none", "unknown activation")
        d = tl.full(x.shape, 1.0, tl.float32)
    return d
