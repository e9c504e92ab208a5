"""Folders of safetensors: names and layouts of GPT-2 and Llama, from one process and from ranks."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from ranks import Rank, run_ranks
from safetensors.torch import load_file, save_file
from torch import nn

from paracomm.errors import Error, InvalidArgument
from paracomm.models import Decoder, DecoderConfig
from paracomm.models.weights import export_decoder, import_decoder
from paracomm.parallel.mesh import Mesh
from paracomm.parallel.plan import parallelize

GPT2 = DecoderConfig(width=24, depth=2, heads=4, context=12, vocabulary=37, bias=True)
LLAMA = DecoderConfig(
    width=24, depth=2, heads=6, kv_heads=2, context=12, vocabulary=37, hidden=40, positions="rotary", norm="rms",
    mlp="swiglu", tied=False, rotary_base=500.0, epsilon=1e-6,
)  # fmt: skip
FAMILIES = pytest.mark.parametrize("config", [GPT2, LLAMA, replace(LLAMA, tied=True)], ids=["gpt2", "llama", "tied"])
TOKENS = torch.randint(0, 37, (3, 12), generator=torch.Generator().manual_seed(0))


def random_decoder(config: DecoderConfig) -> Decoder:
    """Norms and biases too are random, so that a mistaken name shows."""
    torch.manual_seed(1)
    model = Decoder(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    return model


@FAMILIES
def test_a_round_trip_changes_nothing(config, tmp_path):
    model = random_decoder(config)
    export_decoder(tmp_path, model)
    found = import_decoder(tmp_path)
    ours, theirs = model.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(model(TOKENS), found(TOKENS))


@FAMILIES
def test_transformers_reads_it_and_agrees(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_decoder(config)
    export_decoder(tmp_path, model)
    theirs, said = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    torch.testing.assert_close(theirs.eval()(TOKENS).logits, model(TOKENS), rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(import_decoder(tmp_path / "theirs")(TOKENS), model(TOKENS))


def test_names_are_gpt2s(tmp_path):
    model = random_decoder(GPT2)
    export_decoder(tmp_path, model)
    found = load_file(tmp_path / "model.safetensors")
    block = ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")
    block += tuple(f"{name}.{kind}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
                   for kind in ("weight", "bias"))  # fmt: skip
    names = {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"} | {f"h.{i}.{n}" for i in range(2) for n in block}
    assert found.keys() == {f"transformer.{name}" for name in names}
    assert found["transformer.h.1.attn.c_attn.weight"].shape == (24, 72)
    assert torch.equal(found["transformer.h.1.mlp.c_fc.weight"].t(), model.blocks[1].mlp.up.weight)


def test_names_are_llamas(tmp_path):
    export_decoder(tmp_path, model := random_decoder(LLAMA))
    found = load_file(tmp_path / "model.safetensors")
    block = {"input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    block |= {f"self_attn.{name}_proj" for name in "qkvo"}
    names = {"model.embed_tokens", "model.norm", "lm_head"} | {f"model.layers.{i}.{n}" for i in range(2) for n in block}
    assert found.keys() == {f"{name}.weight" for name in names}
    assert torch.equal(found["model.layers.0.self_attn.k_proj.weight"], model.blocks[0].attention.qkv.weight[24:32])


def test_a_model_without_biases_becomes_a_gpt2_with_zeros(tmp_path):
    model = random_decoder(replace(GPT2, bias=False))
    export_decoder(tmp_path, model)
    found = import_decoder(tmp_path)
    assert not found.blocks[0].mlp.up.bias.any()
    torch.testing.assert_close(found(TOKENS), model(TOKENS))


def test_files_of_the_bare_model_with_masks_and_in_parts_are_read(tmp_path):
    model = random_decoder(GPT2)
    export_decoder(tmp_path, model)
    whole = {name.removeprefix("transformer."): x for name, x in load_file(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    first = {name: x for name, x in whole.items() if name.startswith("h.0")} | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    save_file(first, tmp_path / "model-00001-of-00002.safetensors")
    save_file(
        {name: x for name, x in whole.items() if name not in first}, tmp_path / "model-00002-of-00002.safetensors"
    )
    assert torch.equal(import_decoder(tmp_path)(TOKENS), model(TOKENS))


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(InvalidArgument, match="neither GPT-2's"):
        export_decoder(tmp_path, Decoder(replace(GPT2, positions="rotary")))
    with pytest.raises(Error, match="cannot be read"):
        import_decoder(tmp_path)
    export_decoder(tmp_path, random_decoder(LLAMA))
    tensors = load_file(tmp_path / "model.safetensors")
    for change, named in (({"model.norm.weight": None}, "has no tensor model.norm.weight"),
                          ({"model.norm.bias": torch.zeros(24)}, "model.norm.bias"),
                          ({"model.norm.weight": torch.zeros(25)}, r"\[25\], expected \[24\]")):  # fmt: skip
        changed = {name: x for name, x in (tensors | change).items() if x is not None}
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(Error, match=named):
            import_decoder(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    said = json.loads((tmp_path / "config.json").read_text())
    wrong = {"bert": {"model_type": "bert"}, "hidden_act": {"hidden_act": "gelu"}}
    wrong["rope_type"] = {"rope_scaling": {"rope_type": "yarn"}}
    for named, change in wrong.items():
        (tmp_path / "config.json").write_text(json.dumps(said | change))
        with pytest.raises(InvalidArgument, match=named):
            import_decoder(tmp_path)


def export_from_ranks(rank: Rank, config: DecoderConfig, folder: str) -> None:
    comm = rank.connect()
    mesh = Mesh(comm, tp=2)
    export_decoder(folder, parallelize(random_decoder(config), mesh), mesh)
    comm.barrier()
    mesh.close()
    comm.close()


@pytest.mark.parametrize("config", [replace(GPT2, bias=False), GPT2, LLAMA], ids=["plain", "gpt2", "llama"])
def test_ranks_export_what_one_process_does(config, tmp_path):
    export_decoder(tmp_path / "one", random_decoder(config))
    run_ranks(2, export_from_ranks, config, tmp_path / "two")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
