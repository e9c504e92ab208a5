"""The decoder and the encoder-decoder: what they compute on one process, and on ranks as on one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import Rank, run_ranks
from torch import Tensor, nn

from paracomm.errors import InvalidArgument
from paracomm.models import Decoder, DecoderConfig, Seq2Seq, Seq2SeqConfig, generate
from paracomm.models.layers import Rotary
from paracomm.parallel import rng
from paracomm.parallel.mesh import Mesh
from paracomm.parallel.plan import parallelize
from paracomm.parallel.shard import gather_parameter

GPT = DecoderConfig(width=16, depth=2, heads=4, context=12, vocabulary=37)
LLAMA = replace(GPT, kv_heads=2, positions="rotary", norm="rms", mlp="swiglu", tied=False)
SEQ2SEQ = Seq2SeqConfig(width=16, depth=2, heads=4, context=12, vocabulary=37, encoder_depth=1)
ROTARY_SEQ2SEQ = replace(SEQ2SEQ, kv_heads=2, positions="rotary", norm="rms", mlp="swiglu", tied=False, bias=True)
DECODERS = pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
SEQ2SEQS = pytest.mark.parametrize("config", [SEQ2SEQ, ROTARY_SEQ2SEQ], ids=["learned", "rotary"])
ALL = pytest.mark.parametrize(
    "config", [GPT, LLAMA, SEQ2SEQ, ROTARY_SEQ2SEQ], ids=["gpt", "llama", "learned", "rotary"]
)

B, T, S = 3, 12, 8


def tokens(seed: int, length: int = T) -> Tensor:
    return torch.randint(0, 37, (B, length), generator=torch.Generator().manual_seed(seed))


def source() -> dict[str, Tensor]:
    """Of a Seq2Seq: the second sample is padded."""
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, 5:] = False
    return {"source_BS": tokens(8, S), "source_mask": mask}


def targets() -> Tensor:
    y = tokens(9)
    y[0, 3:7] = -100
    return y


def build(config: DecoderConfig, dropout: float = 0.0) -> Decoder | Seq2Seq:
    config = replace(config, dropout=dropout)
    model = Seq2Seq(config, seed=5) if isinstance(config, Seq2SeqConfig) else Decoder(config, seed=5)
    return model.double()


def call(model: nn.Module, x: Tensor, y: Tensor | None = None) -> Any:
    extra = source() if isinstance(model, Seq2Seq) else {}
    return model(tokens_BT=x, targets_BT=y, **extra)


def place() -> rng.Place:
    return rng.Place(3, 1, torch.arange(B) + 4, torch.arange(T), torch.arange(S))


# --- one process ---
@ALL
def test_no_token_sees_the_future(config):
    model, x = build(config), tokens(0)
    changed = x.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 37
    a, b = call(model, x), call(model, changed)
    assert a.shape == (B, T, 37) and torch.equal(a[:, :7], b[:, :7])
    assert all(not torch.allclose(a[:, t], b[:, t]) for t in range(7, T))


@ALL
def test_the_loss_is_a_sum_over_what_counts(config):
    model, x, y = build(config), tokens(0), targets()
    total, count = call(model, x, y)
    each = F.cross_entropy(call(model, x).flatten(0, 1), y.clamp_min(0).flatten(), reduction="none")
    torch.testing.assert_close(total, each[(y != -100).flatten()].sum())
    assert count.item() == B * T - 4
    total.backward()
    assert all(parameter.grad.abs().max() > 0 for name, parameter in model.named_parameters())


@SEQ2SEQS
def test_padding_is_not_seen(config):
    model, x, given = build(config), tokens(0), source()
    expected = model(tokens_BT=x, **given)
    given["source_BS"][1, 5:] = 0
    assert torch.equal(model(tokens_BT=x, **given), expected)
    given["source_BS"][1, 4] = (given["source_BS"][1, 4] + 1) % 37
    assert not torch.allclose(model(tokens_BT=x, **given)[1], expected[1])
    short = model(given["source_BS"][1:2, :5], x[1:2])
    torch.testing.assert_close(short, model(tokens_BT=x, **given)[1:2])


@ALL
def test_positions_are_those_of_the_place(config):
    """Half a sequence at its place gives what the whole gives there, where nothing else is looked at."""
    model = build(config)
    x = tokens(0).clone()
    with rng.at(replace(place(), positions=torch.tensor([3]))):
        late = call(model, x[:, :1])
    early = call(model, x[:, :1])
    if config.positions == "learned":
        assert not torch.allclose(late, early)
    order = torch.tensor([4, 0, 3, 1, 2])
    with rng.at(replace(place(), positions=order)):
        mixed = call(model, x[:, order])
    torch.testing.assert_close(mixed, call(model, x[:, :5])[:, order])


def test_rotary_scores_depend_on_the_distance_alone():
    rotary = Rotary(context=64, head_width=8, base=100.0)
    q, k = torch.rand(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(m: int, n: int) -> Tensor:
        turned = []
        for x, position in ((q, m), (k, n)):
            with rng.at(replace(place(), positions=torch.tensor([position]))):
                turned.append(rotary(x))
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(60, 55))
    assert not torch.allclose(score(9, 4), score(9, 5))


@ALL
def test_initial_weights_are_normal_numbers_of_their_names(config):
    model = build(config)
    kind = "decoder" if isinstance(model, Seq2Seq) else "blocks"
    weight = model.get_parameter(f"{kind}.1.mlp.down.weight")
    residuals = 6 if isinstance(model, Seq2Seq) else 4
    assert torch.equal(
        weight, rng.normal(5, f"{kind}.1.mlp.down.weight", weight.shape, 0.02 / residuals**0.5, torch.float32).double()
    )
    assert (model.head.weight is model.token.weight) == config.tied


@ALL
def test_generation_with_a_cache_is_generation_without(config):
    model, x = build(config), tokens(0, 3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)  # logits that differ
    extra = source() if isinstance(model, Seq2Seq) else {}
    found = generate(model, x, 12, temperature=0, **extra)
    assert model.training and torch.equal(found[:, :3], x)
    model.eval()
    with torch.no_grad():
        for end in range(3, 15):
            start = 0 if end <= 12 else end - 6 - (end - 13)  # begun again with 6 tokens when 12 were full
            assert torch.equal(call(model, found[:, start:end])[:, -1].argmax(-1), found[:, end])
    assert torch.equal(generate(model, x, 9, seed=3, **extra), generate(model, x, 9, seed=3, **extra))
    assert not torch.equal(generate(model, x, 9, seed=3, **extra), generate(model, x, 9, seed=4, **extra))


def test_what_does_not_fit_is_named():
    with pytest.raises(InvalidArgument, match="13 positions, but the context is 12"):
        build(GPT)(tokens(0, 13))
    with pytest.raises(InvalidArgument, match="13 positions"):
        build(SEQ2SEQ)(tokens(0, 13), tokens(0))
    with pytest.raises(InvalidArgument, match="expected"):
        generate(build(GPT), tokens(0, 0), 3)
    with pytest.raises(InvalidArgument, match="source_BS"):
        generate(build(SEQ2SEQ), tokens(0), 3)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"depth": 0}, "depth is 0"), ({"width": 10}, "width 10"), ({"kv_heads": 3}, "kv_heads 3"),
        ({"norm": "batch"}, "norm is 'batch'"), ({"dropout": 1.0}, "dropout"), ({"hidden": 0}, "hidden_width"),
        ({"width": 12, "positions": "rotary"}, "cannot rotate"), ({"encoder_depth": 0}, "encoder_depth"),
    ]  # fmt: skip
    for change, named in wrong:
        with pytest.raises(InvalidArgument, match=named):
            replace(SEQ2SEQ, **change)


# --- ranks ---
def source_of(config: DecoderConfig) -> dict[str, Tensor]:
    return source() if isinstance(config, Seq2SeqConfig) else {}


def on_ranks(rank: Rank, config: DecoderConfig, sequence: bool) -> dict[str, Tensor]:
    comm = rank.connect()
    mesh = Mesh(comm, tp=rank.world_size)
    model = parallelize(build(config, dropout=0.2), mesh, sequence=sequence)
    with rng.at(place()):
        total, _ = call(model, tokens(0), targets())
    total.backward()
    results = {"loss": total.detach()}
    for name, parameter in model.named_parameters():
        gradient = gather_parameter(parameter, mesh, parameter.grad)
        if "tp" in getattr(parameter, "partial", ()):
            gradient = comm.all_reduce(gradient.clone())
        results[name] = gradient
    results["text"] = generate(model, tokens(0, 3), 11, temperature=0, **source_of(config))
    mesh.close()
    comm.close()
    return results


@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "sp"])
@ALL
def test_two_ranks_are_one_process(config, sequence):
    model = build(config, dropout=0.2)
    with rng.at(place()):
        total, _ = call(model, tokens(0), targets())
    total.backward()
    text = generate(model, tokens(0, 3), 11, temperature=0, **source_of(config))
    for found in run_ranks(2, on_ranks, config, sequence):
        torch.testing.assert_close(found.pop("loss"), total.detach(), rtol=1e-12, atol=0)
        assert torch.equal(found.pop("text"), text)
        assert found.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            scale = parameter.grad.abs().max()
            assert (found[name] - parameter.grad).abs().max() <= 1e-12 * scale, name


def written_under_context_parallelism(rank: Rank, config: DecoderConfig) -> Tensor:
    with rank.connect() as comm, Mesh(comm, cp=rank.world_size) as mesh:
        model = parallelize(build(config), mesh)
        return generate(model, tokens(0, 3), 11, temperature=0, **source_of(config))


@ALL
def test_context_parallel_ranks_write_whole_sequences(config):
    text = generate(build(config), tokens(0, 3), 11, temperature=0, **source_of(config))
    assert all(torch.equal(found, text) for found in run_ranks(2, written_under_context_parallelism, config))


@DECODERS
def test_heads_that_do_not_divide_are_named(config):
    def on_rank(rank: Rank) -> None:
        with pytest.raises(InvalidArgument, match=r"heads, which tp 3 does not divide"):
            parallelize(build(config), Mesh(rank.connect(), tp=3))

    run_ranks(3, on_rank)


@ALL
def test_second_derivatives_and_torch_func(config: DecoderConfig) -> None:
    """Of the loss with dropout, in every parameter: a Hessian times a vector by differences; torch.func as autograd."""
    model, x, y = build(config, dropout=0.2), tokens(8), targets()
    names, parameters = zip(*model.named_parameters(), strict=True)
    generator = torch.Generator().manual_seed(2)
    along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def loss(values: dict[str, Tensor]) -> Tensor:
        with rng.at(rng.Place(3, 1, torch.arange(B), torch.arange(T))):
            extra = source() if isinstance(model, Seq2Seq) else {}
            total, _ = torch.func.functional_call(model, values, (), {"tokens_BT": x, "targets_BT": y, **extra})
        return total

    def slopes(step: float, create_graph: bool = False) -> tuple[Tensor, ...]:
        moved = [
            (p + step * d).detach().requires_grad_() if step else p for p, d in zip(parameters, along, strict=True)
        ]
        return torch.autograd.grad(loss(dict(zip(names, moved, strict=True))), moved, create_graph=create_graph)

    firsts = slopes(0.0, create_graph=True)
    found = torch.autograd.grad(firsts, parameters, along)
    step = 1e-6
    for name, ours, ahead, back in zip(names, found, slopes(step), slopes(-step), strict=True):
        expected = (ahead - back) / (2 * step)
        assert (ours - expected).norm() <= 1e-5 * max(1.0, float(expected.norm())), name
    by_func = torch.func.grad(loss)({name: p.detach() for name, p in zip(names, parameters, strict=True)})
    for name, first in zip(names, firsts, strict=True):
        torch.testing.assert_close(by_func[name], first.detach(), rtol=1e-10, atol=1e-10)
