"""Attention by blocks of keys: what one process computes at once, and what context parallelism puts together.

Shapes: B batch, H heads, G key-value heads (H = G R: R queries share one, G = H without grouping), T queries, S keys,
K head size. Query head h looks at key-value head h // R.

    S = scale q k^T, hidden where a query must not look;  lse = log sum_s exp(S);  P = exp(S - lse);  out = P v

Attention to several blocks of keys is that of each, weighted by exp(lse_block - lse) with lse = log sum exp(lse_block).
Given out and lse over all keys, a block's share of the gradients needs that block alone:

    dv = P^T do;  dP = do v^T;  dS = P (dP - sum_K(do out));  dq = scale dS k;  dk = scale dS^T q

With dropout P is multiplied by keep / (1 - p) in out and dv, and dP by the same; lse, and so a block's weight, stays.
Nothing of size T x S is kept from forward to backward (Dao et al., "FlashAttention", NeurIPS 2022, appendix B).

A block is computed by paracomm.kernels where these run, by torch's fused attention for CPUs where that can, else by
products of matrices. Positions lie on the CPU, whatever the device of q, k and v, so that a GPU is never waited for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paracomm import kernels
from paracomm.errors import Error, InvalidArgument
from paracomm.kernels import derivatives
from paracomm.kernels.attention import HEAD_SIZES
from paracomm.kernels.autocast import as_autocast, autocast_off
from paracomm.kernels.select import transformed
from paracomm.parallel import rng

# Of attention's place in a batch: positions take 20 bits each, rows times heads what is left of 63.
POSITION_BITS = 20

FEW = 8
"""So many new tokens at most are decoded: attention over a cache, divided by keys."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class HeadDropout(NamedTuple):
    """Dropout of attention's weights: this tensor's heads are head_offset.. of heads_total."""

    stream: int
    p: float
    head_offset: int
    heads_total: int


@dataclass(frozen=True)
class Rule:
    """How queries look at keys, for every block of one attention. `place` is needed with dropout only.

    backend: of the kernels, in backward as in forward.
    """

    causal: bool
    scale: float
    dropout: HeadDropout | None = None
    place: rng.Place | None = None
    backend: kernels.Backend = field(default_factory=kernels.current)


Sight = Literal["all", "none", "diagonal", "end", "some"]


def sight(rule: Rule, q_positions_T: Tensor, k_positions_S: Tensor) -> Sight:
    """What queries see of a block of keys; "diagonal": query t sees keys 0..t, "end": keys 0..t + S - T."""
    if not rule.causal:
        return "all"
    if not len(q_positions_T) or not len(k_positions_S) or k_positions_S.min() > q_positions_T.max():
        return "none"
    if k_positions_S.max() <= q_positions_T.min():
        return "all"
    T, S = len(q_positions_T), len(k_positions_S)
    if T <= S and torch.equal(q_positions_T, k_positions_S[S - T :]) and rising(k_positions_S):
        return "diagonal" if T == S else "end"
    return "some"


def rising(positions_T: Tensor) -> bool:
    return bool((positions_T.diff() > 0).all())


# --- one block ---
def block_forward(
    rule: Rule,
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    q_positions_T: Tensor,
    k_positions_S: Tensor,
    key_mask_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out_BHTK of q's dtype, lse_BHT, float32 for 16-bit q); a query that sees nothing has 0 and -inf."""
    seen = sight(rule, q_positions_T, k_positions_S)
    with kernels.backend(rule.backend):
        if _kernel_can(seen, q_BHTK):
            options = _kernel_options(rule, seen, q_BHTK, q_positions_T, k_positions_S, key_mask_BS)
            return kernels.attention_forward(q_BHTK, k_BGSK, v_BGSK, **options)
    if _flash_can(rule, seen, q_BHTK, key_mask_BS):
        R = q_BHTK.shape[1] // k_BGSK.shape[1]
        out, lse = _flash(
            q_BHTK, _repeat(k_BGSK, R), _repeat(v_BGSK, R), 0.0, seen == "diagonal", scale=rule.scale
        )  # fmt: skip
        return out, lse
    p_BHTS = _scores(rule, seen, q_BHTK, k_BGSK, q_positions_T, k_positions_S, key_mask_BS)
    lse_BHT = p_BHTS.logsumexp(-1)
    p_BHTS.sub_(finite(lse_BHT).unsqueeze(-1)).exp_()
    if rule.dropout is not None:
        p_BHTS.mul_(_keep(rule, p_BHTS, q_positions_T, k_positions_S))
    out_BHTK = (_grouped(p_BHTS, v_BGSK) @ v_BGSK.to(p_BHTS.dtype)).view(q_BHTK.shape)
    return out_BHTK.to(q_BHTK.dtype), lse_BHT


def block_backward(
    rule: Rule,
    grad_BHTK: Tensor,
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    out_BHTK: Tensor,
    lse_BHT: Tensor,
    q_positions_T: Tensor,
    k_positions_S: Tensor,
    key_mask_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's share (dq_BHTK, dk_BGSK, dv_BGSK), given out and lse over all blocks."""
    seen = sight(rule, q_positions_T, k_positions_S)
    with kernels.backend(rule.backend):
        if _kernel_can(seen, q_BHTK):
            options = _kernel_options(rule, seen, q_BHTK, q_positions_T, k_positions_S, key_mask_BS)
            return kernels.attention_backward(grad_BHTK, q_BHTK, k_BGSK, v_BGSK, out_BHTK, lse_BHT, **options)
    if _flash_can(rule, seen, q_BHTK, key_mask_BS):
        G = k_BGSK.shape[1]
        R = q_BHTK.shape[1] // G
        dq, dk, dv = _flash_backward(
            grad_BHTK, q_BHTK, _repeat(k_BGSK, R), _repeat(v_BGSK, R), out_BHTK, lse_BHT, 0.0, seen == "diagonal",
            scale=rule.scale,
        )  # fmt: skip
        if R > 1:
            dk, dv = (x.unflatten(1, (G, R)).sum(2) for x in (dk, dv))
        return dq, dk, dv
    p_BHTS = _scores(rule, seen, q_BHTK, k_BGSK, q_positions_T, k_positions_S, key_mask_BS)
    p_BHTS.sub_(finite(lse_BHT).unsqueeze(-1)).exp_()
    q, k, v, grad, out = (x.to(p_BHTS.dtype) for x in (q_BHTK, k_BGSK, v_BGSK, grad_BHTK, out_BHTK))
    grad_BGMK = _grouped(grad, v)
    ds_BHTS = (grad_BGMK @ v.mT).view(p_BHTS.shape)
    dropped_BHTS = p_BHTS
    if rule.dropout is not None:
        keep_BHTS = _keep(rule, p_BHTS, q_positions_T, k_positions_S)
        ds_BHTS.mul_(keep_BHTS)
        dropped_BHTS = p_BHTS * keep_BHTS
    dv = _grouped(dropped_BHTS, v).mT @ grad_BGMK
    ds_BHTS.sub_((grad * out).sum(-1, keepdim=True)).mul_(p_BHTS).mul_(rule.scale)
    ds_BGMS = _grouped(ds_BHTS, k)
    dq, dk = (ds_BGMS @ k).view(q.shape), ds_BGMS.mT @ _grouped(q, k)
    return dq.to(q_BHTK.dtype), dk.to(k_BGSK.dtype), dv.to(v_BGSK.dtype)


def finite(lse_BHT: Tensor) -> Tensor:
    """lse to subtract: 0 for a query that sees nothing, whose scores are -inf themselves."""
    return lse_BHT.masked_fill(lse_BHT == -torch.inf, 0.0)


def _kernel_can(seen: Sight, q: Tensor) -> bool:
    """ "none" and "some" are left to products of matrices: they come of positions that no layout gives."""
    return seen in ("all", "diagonal", "end") and _fits(q) and kernels.runs(q)


def _fits(q: Tensor) -> bool:
    return HEAD_SIZES[0] <= q.shape[-1] <= HEAD_SIZES[1]


def _kernel_options(
    rule: Rule, seen: Sight, q: Tensor, q_positions_T: Tensor, k_positions_S: Tensor, key_mask: Tensor | None
) -> dict[str, Any]:
    """As kernels.attention() takes them."""
    options: dict[str, Any] = {"causal": seen in ("diagonal", "end"), "scale": rule.scale, "key_mask": key_mask}
    if rule.dropout is not None:
        rows_B, heads, place = _rows(rule, q), rule.dropout[2:], rule.place
        assert place is not None
        places = (q_positions_T, k_positions_S)
        from_0 = all(torch.equal(positions, torch.arange(len(positions))) for positions in places)
        options["dropout"] = kernels.Dropout(
            place.seed, place.step, rule.dropout.stream, rule.dropout.p, rows_B, heads,
            *(None if from_0 else positions.to(q.device, non_blocking=True) for positions in places),
        )  # fmt: skip
    return options


def _rows(rule: Rule, q: Tensor) -> Tensor:
    """Of the samples, int64 [B], on q's device."""
    assert rule.place is not None
    if len(rule.place.rows) != q.shape[0]:
        raise InvalidArgument(f"attention: {q.shape[0]} sequences, but the Place has {len(rule.place.rows)} rows")
    return rule.place.on(q.device)[0]


def _flash_can(rule: Rule, seen: Sight, q: Tensor, key_mask: Tensor | None) -> bool:
    return rule.dropout is None and key_mask is None and seen in ("all", "diagonal") and q.device.type == "cpu"


def _repeat(x_BGSK: Tensor, R: int) -> Tensor:
    return x_BGSK if R == 1 else x_BGSK.repeat_interleave(R, 1)


def _grouped(x_BHT_: Tensor, k_BGSK: Tensor) -> Tensor:
    """[B, H, T, ...] as [B, G, R T, ...]: the queries of a key-value head below each other."""
    B, G = k_BGSK.shape[:2]
    return x_BHT_.reshape(B, G, -1, x_BHT_.shape[-1])


def _scores(
    rule: Rule, seen: Sight, q_BHTK: Tensor, k_BGSK: Tensor, q_positions_T: Tensor, k_positions_S: Tensor,
    key_mask_BS: Tensor | None,
) -> Tensor:  # fmt: skip
    """scale q k^T [B, H, T, S], at least float32, -inf where hidden."""
    dtype = torch.promote_types(q_BHTK.dtype, torch.float32)
    scores = _grouped(q_BHTK, k_BGSK).to(dtype) @ k_BGSK.to(dtype).mT
    scores_BHTS = scores.mul_(rule.scale).view(*q_BHTK.shape[:3], k_BGSK.shape[2])
    if seen in ("diagonal", "end", "some"):
        hidden_TS = k_positions_S > q_positions_T[:, None]
        scores_BHTS.masked_fill_(hidden_TS.to(scores.device, non_blocking=True), -torch.inf)
    elif seen == "none":
        scores_BHTS.fill_(-torch.inf)
    if key_mask_BS is not None:
        scores_BHTS.masked_fill_(~key_mask_BS[:, None, None, :], -torch.inf)
    return scores_BHTS


def _keep(rule: Rule, like_BHTS: Tensor, q_positions_T: Tensor, k_positions_S: Tensor) -> Tensor:
    """keep / (1 - p), of `like`'s shape and dtype: what dropout multiplies with, a function of the global element."""
    assert rule.dropout is not None and rule.place is not None
    stream, p, head_offset, heads_total = rule.dropout
    device = like_BHTS.device
    heads_H = torch.arange(head_offset, head_offset + like_BHTS.shape[1], device=device)
    lines_BH = _rows(rule, like_BHTS)[:, None] * heads_total + heads_H
    q_positions_T, k_positions_S = (x.to(device, non_blocking=True) for x in (q_positions_T, k_positions_S))
    base_BHT = (lines_BH[:, :, None] << 2 * POSITION_BITS) + (q_positions_T << POSITION_BITS)
    keep_BHTS = rng.keep_mask(stream, base_BHT, k_positions_S, p, rule.place)
    return keep_BHTS.to(like_BHTS.dtype).mul_(1 / (1 - p))


# --- the whole, differentiable ---
class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rule: Rule, q_positions: Tensor, k_positions: Tensor,
        key_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = block_forward(rule, q, k, v, q_positions, k_positions, key_mask)
        ctx.save_for_backward(q, k, v, out, lse, q_positions, k_positions, key_mask)
        ctx.rule = rule
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        with autocast_off(grad):
            return _Attention.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, q_positions, k_positions, key_mask = ctx.saved_tensors
        if derivatives.wanted():
            found = derivatives.pull_back(
                lambda q, k, v: _plain(ctx.rule, q, k, v, q_positions, k_positions, key_mask), (q, k, v), (grad,),
                ctx.needs_input_grad[:3],
            )  # fmt: skip
            return *found, None, None, None, None
        grads = block_backward(ctx.rule, grad, q, k, v, out, lse, q_positions, k_positions, key_mask)
        return (*grads, None, None, None, None)


def _plain(
    rule: Rule, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, q_positions_T: Tensor, k_positions_S: Tensor,
    key_mask_BS: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """block_forward() by operations that torch can differentiate as often as asked."""
    seen = sight(rule, q_positions_T, k_positions_S)
    scores_BHTS = _scores(rule, seen, q_BHTK, k_BGSK, q_positions_T, k_positions_S, key_mask_BS)
    lse_BHT = scores_BHTS.logsumexp(-1)
    p_BHTS = (scores_BHTS - finite(lse_BHT).unsqueeze(-1)).exp()
    if rule.dropout is not None:
        p_BHTS = p_BHTS * _keep(rule, p_BHTS, q_positions_T, k_positions_S)
    out_BHTK = (_grouped(p_BHTS, v_BGSK) @ v_BGSK.to(p_BHTS.dtype)).view(q_BHTK.shape)
    return out_BHTK.to(q_BHTK.dtype), lse_BHT.detach()


def attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    *,
    q_positions: Tensor,
    k_positions: Tensor,
    causal: bool,
    scale: float | None = None,
    dropout: HeadDropout | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out_BHTK of q's dtype, lse_BHT without a gradient).

    Args:
        q_positions, k_positions: int64 [T] and [S], on the CPU; with `causal` a query sees keys up to its own position.
        scale: None: 1 / sqrt(K).
        dropout: of the weights; masks follow from the current Place, which `rng.at(place)` sets.
        key_mask: bool [B, S], False for a key that nobody sees. A query that sees none has an out of 0.

    Under autocast q, k and v are cast to its dtype. Raises InvalidArgument for shapes that do not fit, and Error for
    dropout outside of a Place.
    """
    q_BHTK, k_BGSK, v_BGSK = as_autocast(q_BHTK, k_BGSK, v_BGSK)
    check_shapes(q_BHTK, k_BGSK, v_BGSK, q_positions, k_positions, key_mask)
    scale = q_BHTK.shape[-1] ** -0.5 if scale is None else scale
    rule = Rule(causal, scale, dropout, None if dropout is None else rng.current())
    with autocast_off(q_BHTK):
        if transformed():
            return _plain(rule, q_BHTK, k_BGSK, v_BGSK, q_positions, k_positions, key_mask)
        out, lse = _Attention.apply(q_BHTK, k_BGSK, v_BGSK, rule, q_positions, k_positions, key_mask)
        return out, lse


def check_shapes(
    q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor, k_positions: Tensor, key_mask: Tensor | None
) -> None:
    """Raises InvalidArgument where attention() cannot take these."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise InvalidArgument(
            f"attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, expected q [B, H, T, K] and k, v "
            "[B, G, S, K]"
        )
    if q.shape[1] % k.shape[1]:
        raise InvalidArgument(f"attention: {q.shape[1]} heads are not a multiple of {k.shape[1]} key-value heads")
    if q_positions.shape != q.shape[2:3] or k_positions.shape != k.shape[2:3]:
        raise InvalidArgument(
            f"attention: positions {list(q_positions.shape)} and {list(k_positions.shape)} of {q.shape[2]} queries and "
            f"{k.shape[2]} keys"
        )
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (k.shape[0], k.shape[2])):
        raise InvalidArgument(
            f"attention: key_mask {list(key_mask.shape)} of {key_mask.dtype}, expected bool {[k.shape[0], k.shape[2]]}"
        )


class Attention(nn.Module):
    """softmax(q k^T / sqrt(K)) v with dropout of the weights: the core that models use. It has no parameters.

    Attributes that a plan may set:
        stream: of its dropout's random numbers (see rng.name_streams).
        head_part: (offset, total) of this rank's query heads; None: it has all.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise InvalidArgument(f"Attention: dropout p is {p}, expected 0 <= p < 1")
        self.p = p
        self.stream: int | None = None
        self.head_part: tuple[int, int] | None = None

    def forward(
        self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, *, causal: bool = True, key_mask: Tensor | None = None
    ) -> Tensor:
        """out_BHTK. q's positions are the current Place's, or 0..T-1 outside of one; so are k's where S = T, otherwise
        they are 0..S-1. `key_mask`: bool [B, S], see attention()."""
        T, S = q_BHTK.shape[2], k_BGSK.shape[2]
        q_positions = rng.positions(T)
        k_positions = q_positions if S == T else torch.arange(S)
        dropout = self.head_dropout(q_BHTK.shape[1])
        plain = dropout is None and key_mask is None and T > 0 and S > 0
        few = causal and T <= FEW and T < S and not torch.is_grad_enabled() and _fits(q_BHTK)
        if plain and few and torch.equal(q_positions, k_positions[S - T :]):
            return kernels.decode(q_BHTK, k_BGSK, v_BGSK, need_lse=False)[0]
        place = rng.placed()
        in_order = not causal or (S == T and (place is None or place.rises))
        if plain and in_order and not kernels.runs(q_BHTK):
            # The same kernel without a Function of ours around it: 0.1 to 0.2 ms less a layer, forward and backward.
            grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
            return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, is_causal=causal, enable_gqa=grouped)
        out, _ = attention(
            q_BHTK, k_BGSK, v_BGSK, q_positions=q_positions, k_positions=k_positions, causal=causal, dropout=dropout,
            key_mask=key_mask,
        )  # fmt: skip
        return out

    def head_dropout(self, heads: int) -> HeadDropout | None:
        """What to drop of a tensor of `heads` heads; None where nothing is dropped now."""
        if not self.training or self.p == 0.0:
            return None
        if self.stream is None:
            raise Error("Attention: its dropout has no stream; call rng.name_streams(model) once the model is built")
        offset, total = self.head_part or (0, heads)
        return HeadDropout(self.stream, self.p, offset, total)

    def extra_repr(self) -> str:
        return f"p={self.p}"
