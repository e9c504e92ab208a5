"""How tensor parallelism cuts a block of layers.Block."""

from __future__ import annotations

from paracomm.models.layers import DecoderConfig
from paracomm.parallel.plan import Column, Heads, Row, Style


def block_plan(block: str, config: DecoderConfig, *, cross: bool = False) -> dict[str, Style]:
    """Patterns below the pattern `block`."""
    plan = attention_plan(f"{block}.attention", config, query="source")
    if cross:
        plan |= attention_plan(f"{block}.cross", config, query="query")
    if config.mlp == "swiglu":
        plan[f"{block}.mlp.gate"] = Column(share="hidden")
    return plan | {f"{block}.mlp.up": Column(share="hidden"), f"{block}.mlp.down": Row()}


def attention_plan(attention: str, config: DecoderConfig, *, query: str) -> dict[str, Style]:
    """Keys and values have one input, "source"; queries have the input `query`."""
    return {
        f"{attention}.q": Column(heads=config.heads, share=query),
        f"{attention}.k": Column(heads=config.key_value_heads, share="source"),
        f"{attention}.v": Column(heads=config.key_value_heads, share="source"),
        f"{attention}.core": Heads(config.heads),
        f"{attention}.out": Row(),
    }
