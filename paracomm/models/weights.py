"""Decoders as folders of safetensors and a config.json with GPT-2's or Llama's names, which transformers reads as well.

ours                          GPT-2 (transformer.)           Llama (model.)
token.weight                  wte.weight                     embed_tokens.weight
position.weight               wpe.weight                     -
blocks.N.attention_norm       h.N.ln_1                       layers.N.input_layernorm
blocks.N.attention.qkv        h.N.attn.c_attn, transposed    layers.N.self_attn.{q,k,v}_proj
blocks.N.attention.out        h.N.attn.c_proj, transposed    layers.N.self_attn.o_proj
blocks.N.mlp_norm             h.N.ln_2                       layers.N.post_attention_layernorm
blocks.N.mlp.gate             -                              layers.N.mlp.gate_proj
blocks.N.mlp.up               h.N.mlp.c_fc, transposed       layers.N.mlp.up_proj
blocks.N.mlp.down             h.N.mlp.c_proj, transposed     layers.N.mlp.down_proj
norm                          ln_f                           norm
head.weight, if not tied      -                              lm_head.weight (without "model.")
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from paracomm.errors import Error, InvalidArgument
from paracomm.models.decoder import Decoder
from paracomm.models.layers import DecoderConfig
from paracomm.parallel.mesh import Mesh
from paracomm.parallel.shard import gather_parameter

Family = Literal["gpt2", "llama"]
PREFIX = {"gpt2": "transformer.", "llama": "model."}
TABLES = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Constants that some files hold beside the weights."""


@dataclass(frozen=True)
class Entry:
    """One tensor of ours: theirs, of so many rows each, one below the other; `transposed`: each lies the other way."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...] = ()
    transposed: bool = False

    def split(self, ours: Tensor) -> dict[str, Tensor]:
        parts = ours.split(self.rows) if self.rows else (ours,)
        return {
            name: (part.t() if self.transposed else part).contiguous()
            for name, part in zip(self.theirs, parts, strict=True)
        }

    def join(self, theirs: Mapping[str, Tensor]) -> Tensor:
        parts = [theirs[name].t() if self.transposed else theirs[name] for name in self.theirs]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def family_of(config: DecoderConfig) -> Family:
    """Whose architecture it is; raises InvalidArgument where it is neither's."""
    shape = (config.positions, config.norm, config.mlp)
    if shape == ("learned", "layer", "gelu") and config.tied and config.key_value_heads == config.heads:
        return "gpt2"
    if shape == ("rotary", "rms", "swiglu") and not config.bias:
        return "llama"
    raise InvalidArgument(
        "weights: the model is neither GPT-2's (learned, layer, gelu, tied, kv_heads = heads) nor Llama's (rotary, "
        f"rms, swiglu, no bias): it has {', '.join(shape)}, tied={config.tied}, kv_heads={config.key_value_heads}, "
        f"bias={config.bias}"
    )


def export_decoder(folder: Path, model: Decoder, mesh: Mesh | None = None) -> None:
    """Writes model.safetensors and config.json; the biases that a model without them lacks in GPT-2 are zeros.

    Collective over the mesh, whose rank 0 writes. Parameters that ZeRO has sharded must be gathered meanwhile (`with
    parallel.gathered():`). Raises InvalidArgument as family_of.
    """
    family = family_of(model.config)
    whole: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        whole[name] = parameter.detach() if mesh is None else gather_parameter(parameter, mesh)
    tensors: dict[str, Tensor] = {}
    for entry in entries(model.config):
        if entry.ours not in whole:
            weight = whole[entry.ours.removesuffix("bias") + "weight"]
            whole[entry.ours] = weight.new_zeros(weight.shape[0])
        tensors |= entry.split(whole[entry.ours])
    if mesh is None or mesh.comm.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(_described(model.config, family), indent=1) + "\n")


def import_decoder(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The whole model of a folder; cut it by a plan afterwards.

    Raises InvalidArgument for an architecture that is neither GPT-2's nor Llama's, Error for files that cannot be read
    or lack a tensor.
    """
    try:
        said = json.loads((folder / "config.json").read_text())
        found: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            found |= load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise Error(f"weights: '{folder}' cannot be read: {error}") from error
    try:
        config = _config(said)
    except KeyError as error:
        raise Error(f"weights: '{folder}/config.json' has no field {error}") from error
    model = Decoder(config).to(dtype)
    prefix = PREFIX[family_of(config)]
    if not any(name.startswith(prefix) for name in found):
        found = {prefix + name: tensor for name, tensor in found.items()}  # a file of the bare model
    parameters = dict(model.named_parameters())
    for entry in entries(config):
        if missing := [name for name in entry.theirs if name not in found]:
            raise Error(f"weights: '{folder}' has no tensor {', '.join(missing)}")
        whole = entry.join(found)
        parameter = parameters[entry.ours]
        if whole.shape != parameter.shape:
            raise Error(f"weights: {entry.theirs} give {list(whole.shape)}, expected {list(parameter.shape)}")
        with torch.no_grad():
            parameter.copy_(whole)
    used = {name for entry in entries(config) for name in entry.theirs}
    extra = [name for name in found if name not in used and not name.endswith(TABLES) and "lm_head" not in name]
    if extra:
        raise Error(f"weights: '{folder}' has tensors that this architecture does not: {', '.join(extra[:4])}")
    return model


def entries(config: DecoderConfig) -> Iterator[Entry]:
    """What a file holds, in the order of the model."""
    gpt2 = family_of(config) == "gpt2"
    prefix = PREFIX[family_of(config)]
    yield Entry("token.weight", (prefix + ("wte.weight" if gpt2 else "embed_tokens.weight"),))
    if gpt2:
        yield Entry("position.weight", (prefix + "wpe.weight",))
    for index in range(config.depth):
        block = _gpt2_block if gpt2 else _llama_block
        yield from block(f"blocks.{index}.", prefix + ("h" if gpt2 else "layers") + f".{index}.", config)
    yield Entry("norm.weight", (prefix + ("ln_f.weight" if gpt2 else "norm.weight"),))
    if gpt2:
        yield Entry("norm.bias", (prefix + "ln_f.bias",))
    if not config.tied:
        yield Entry("head.weight", ("lm_head.weight",))


def _gpt2_block(ours: str, theirs: str, config: DecoderConfig) -> Iterator[Entry]:
    for name, other in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
        yield Entry(f"{ours}{name}.weight", (f"{theirs}{other}.weight",))
        yield Entry(f"{ours}{name}.bias", (f"{theirs}{other}.bias",))
    layers = {"attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc"}
    for name, other in (layers | {"mlp.down": "mlp.c_proj"}).items():
        yield Entry(f"{ours}{name}.weight", (f"{theirs}{other}.weight",), transposed=True)
        yield Entry(f"{ours}{name}.bias", (f"{theirs}{other}.bias",))


def _llama_block(ours: str, theirs: str, config: DecoderConfig) -> Iterator[Entry]:
    narrow = config.key_value_heads * config.head_width
    qkv = tuple(f"{theirs}self_attn.{name}_proj.weight" for name in "qkv")
    yield Entry(f"{ours}attention_norm.weight", (f"{theirs}input_layernorm.weight",))
    yield Entry(f"{ours}attention.qkv.weight", qkv, (config.width, narrow, narrow))
    yield Entry(f"{ours}attention.out.weight", (f"{theirs}self_attn.o_proj.weight",))
    yield Entry(f"{ours}mlp_norm.weight", (f"{theirs}post_attention_layernorm.weight",))
    for name in ("gate", "up", "down"):
        yield Entry(f"{ours}mlp.{name}.weight", (f"{theirs}mlp.{name}_proj.weight",))


# --- config.json ---
def _described(config: DecoderConfig, family: Family) -> dict[str, Any]:
    if family == "gpt2":
        drops = dict.fromkeys(("attn_pdrop", "resid_pdrop"), config.dropout)
        return {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": config.vocabulary,
            "n_positions": config.context, "n_embd": config.width, "n_layer": config.depth, "n_head": config.heads,
            "n_inner": config.hidden_width, "activation_function": "gelu_new", "embd_pdrop": 0.0,
            "layer_norm_epsilon": config.epsilon, "tie_word_embeddings": True, **drops,
        }  # fmt: skip
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context, "hidden_size": config.width, "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads, "num_key_value_heads": config.key_value_heads,
        "intermediate_size": config.hidden_width, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "rms_norm_eps": config.epsilon, "rope_theta": config.rotary_base, "tie_word_embeddings": config.tied,
        "attention_dropout": config.dropout,
    }  # fmt: skip


def _config(said: Mapping[str, Any]) -> DecoderConfig:
    """Raises InvalidArgument for another architecture, KeyError for a field that is missing."""
    if said["model_type"] == "gpt2":
        _expect(said, activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=(True,))
        _expect(said, scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,))
        return DecoderConfig(
            vocabulary=said["vocab_size"], context=said["n_positions"], width=said["n_embd"], depth=said["n_layer"],
            heads=said["n_head"], hidden=said.get("n_inner"), dropout=said.get("resid_pdrop", 0.1), bias=True,
            epsilon=said.get("layer_norm_epsilon", 1e-5),
        )  # fmt: skip
    if said["model_type"] != "llama":
        raise InvalidArgument(f"weights: a model of type '{said['model_type']}', expected gpt2 or llama")
    _expect(said, hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,))
    _expect(said, head_dim=(None, said["hidden_size"] // said["num_attention_heads"]))
    rotary = said.get("rope_parameters") or said.get("rope_scaling") or {}
    _expect({"rope_type": rotary.get("rope_type", "default")}, rope_type=("default",))
    return DecoderConfig(
        vocabulary=said["vocab_size"], context=said["max_position_embeddings"], width=said["hidden_size"],
        depth=said["num_hidden_layers"], heads=said["num_attention_heads"], hidden=said["intermediate_size"],
        kv_heads=said.get("num_key_value_heads"), dropout=said.get("attention_dropout", 0.0), positions="rotary",
        norm="rms", mlp="swiglu", tied=said.get("tie_word_embeddings", False), epsilon=said.get("rms_norm_eps", 1e-6),
        rotary_base=rotary.get("rope_theta") or said.get("rope_theta", 10000.0),
    )  # fmt: skip


def _expect(said: Mapping[str, Any], **fields: tuple[Any, ...]) -> None:
    for name, expected in fields.items():
        if said.get(name, expected[0]) not in expected:
            raise InvalidArgument(f"weights: config.json has {name} = {said[name]!r}, expected one of {expected}")
