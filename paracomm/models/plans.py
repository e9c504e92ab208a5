"""How tensor parallelism cuts a block of layers.Block."""

from __future__ import annotations

from paracomm.models.layers import DecoderConfig
from paracomm.parallel.plan import Column, Heads, Row, Style


def block_plan(block: str, config: DecoderConfig, *, cross: bool = False) -> dict[str, Style]:
    """Patterns below the pattern `block`."""
    H, G = config.heads, config.key_value_heads
    plan: dict[str, Style] = {
        f"{block}.attention.qkv": Column(parts=3, heads=(H, G, G)),
        f"{block}.attention.core": Heads(H),
        f"{block}.attention.out": Row(),
        f"{block}.mlp.up": Column(share="hidden"),
        f"{block}.mlp.down": Row(),
    }
    if config.mlp == "swiglu":
        plan[f"{block}.mlp.gate"] = Column(share="hidden")
    if cross:
        plan[f"{block}.cross.q"] = Column(heads=H)
        plan[f"{block}.cross.kv"] = Column(parts=2, heads=(G, G))
        plan[f"{block}.cross.core"] = Heads(H)
        plan[f"{block}.cross.out"] = Row()
    return plan
