"""Every tensor-parallel style alone against the module that it replaces, in float64, on 1 to 4 ranks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from ranks import Rank, run_ranks
from torch import nn

from paracomm.errors import Error, InvalidArgument
from paracomm.parallel.loss import Head, merged_loss, vocabulary_loss
from paracomm.parallel.mesh import Mesh
from paracomm.parallel.plan import (
    Column,
    Features,
    Heads,
    Inside,
    Positions,
    Row,
    Sequence,
    Vocabulary,
    parallelize,
    whole_sequences,
)
from paracomm.parallel.sequence import Reduction, gather_and_multiply
from paracomm.parallel.shard import gather_parameter, partial_of, shard_of
from paracomm.parallel.tensor import (
    ColumnLinear,
    Region,
    RowLinear,
    copy_to,
    gather_last,
    join,
    reduce_from,
    scatter_sum,
    split,
)

TOLERANCE = 1e-12
B, T, D, V = 2, 12, 10, 53


def close(ours, expected, what):
    assert ours.shape == expected.shape, f"{what}: {list(ours.shape)}, expected {list(expected.shape)}"
    scale = max(1e-300, float(expected.abs().max())) if expected.numel() else 1.0
    error = float((ours - expected).abs().max()) / scale if expected.numel() else 0.0
    assert error <= TOLERANCE, f"{what}: {error:.1e}"


def whole_gradient(parameter, mesh):
    """What a reducer and a gather make of a parameter's gradient."""
    gradient = parameter.grad.contiguous().clone()
    if partial_of(parameter):
        mesh.group(*partial_of(parameter)).all_reduce(gradient)
    return gather_parameter(parameter, mesh, gradient)


def compare(mesh, plain, plan, inputs, call=None, **options):
    """Outputs, input gradients, weights and weight gradients of a parallelised copy of `plain` against its own."""
    call = call or (lambda model, *xs: model(*xs))
    parallel = parallelize(copy.deepcopy(plain), mesh, plan, **options)
    results = []
    for model in (plain, parallel):
        model.zero_grad()
        xs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        y = call(model, *xs)
        (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)).sum().backward()
        results.append((y.detach(), [x.grad for x in xs]))
    (expected, expected_dxs), (y, dxs) = results
    close(y, expected, "output")
    for index, (dx, expected_dx) in enumerate(zip(dxs, expected_dxs, strict=True)):
        if expected_dx is not None:
            close(dx, expected_dx, f"gradient of input {index}")
    named = dict(parallel.named_parameters())
    assert list(named) == [name for name, _ in plain.named_parameters()]
    for name, theirs in plain.named_parameters():
        assert torch.equal(gather_parameter(named[name], mesh), theirs), name
        assert (named[name].grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            close(whole_gradient(named[name], mesh), theirs.grad, f"gradient of {name}")
    return parallel


def double(module, seed=0, std=1.0):
    torch.manual_seed(seed)
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def mesh_of(rank: Rank, tp: int | None = None) -> Mesh:
    return Mesh(rank.connect(), tp=tp or rank.world_size)


def activations(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Mlp(nn.Module):
    def __init__(self, hidden, bias):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.up, self.gate = nn.Linear(D, hidden, bias=bias), nn.Linear(D, hidden, bias=bias)
        self.down = nn.Linear(hidden, D, bias=bias)

    def forward(self, x):
        x = self.norm(x)
        return x.tanh() + self.down(F.silu(self.gate(x)) * self.up(x))


def mlp_plan(sequence, share=None):
    plan = {"up": Column(share=share), "gate": Column(share=share), "down": Row()}
    return plan | ({"": Sequence()} if sequence else {})


def check_mlp(rank: Rank) -> None:
    mesh = mesh_of(rank)
    for hidden, bias in ((16, True), (13, False), (2, True)):
        mlp = double(Mlp(hidden, bias))
        for chunks in (None, 3, 50):
            compare(mesh, mlp, mlp_plan(False), [activations(B, T, D)], chunks=chunks)
            compare(mesh, mlp, mlp_plan(False, "x"), [activations(3, 5, 1, D)], chunks=chunks)
            compare(mesh, mlp, mlp_plan(True), [activations(B, T, D)], sequence=True, chunks=chunks)
            compare(mesh, mlp, mlp_plan(True, "x"), [activations(1, T, D)], sequence=True, chunks=chunks)


@pytest.mark.parametrize("tp", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_column_and_row(tp) -> None:
    run_ranks(tp, check_mlp)


def check_frozen(rank: Rank) -> None:
    mesh = mesh_of(rank)
    for frozen in ("up.weight", "up.bias", "gate", "down", "down.bias", "norm", ""):
        for sequence in (False, True):
            mlp = double(Mlp(9, True))
            for name, parameter in mlp.named_parameters():
                parameter.requires_grad_(not name.startswith(frozen))
            parallel = compare(mesh, mlp, mlp_plan(sequence, "x"), [activations(B, T, D)], sequence=sequence)
            for (name, ours), theirs in zip(parallel.named_parameters(), mlp.parameters(), strict=True):
                assert ours.requires_grad == theirs.requires_grad, name


def test_frozen_parameters() -> None:
    run_ranks(2, check_frozen)


class Fused(nn.Module):
    """Attention's shape with a fused projection: q, k and v of heads, then out."""

    def __init__(self, heads, size, bias=True):
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv = nn.Linear(D, sum(heads) * size, bias=bias)
        self.out = nn.Linear(heads[0] * size, D, bias=bias)

    def forward(self, x):
        y = self.qkv(x)
        share = y.shape[-1] / (sum(self.heads) * self.size)
        q, k, v = y.split([round(h * self.size * share) for h in self.heads], -1)
        q, k, v = (p.unflatten(-1, (-1, self.size)).transpose(1, 2) for p in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


def check_fused(rank: Rank) -> None:
    mesh = mesh_of(rank)
    for heads, style in (((12, 12, 12), Column(parts=3, heads=12)), ((24, 12, 12), Column(heads=(24, 12, 12)))):
        for sequence in (False, True):
            plan = {"qkv": style, "out": Row()} | ({"": Sequence()} if sequence else {})
            compare(mesh, double(Fused(heads, 3)), plan, [activations(B, T, D)], sequence=sequence)
    gates = nn.Sequential(nn.Linear(D, 2 * 7), nn.GLU(), nn.Linear(7, D))
    compare(mesh, double(gates), {"0": Column(parts=2), "2": Row()}, [activations(B, D)])


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_fused_projections(tp) -> None:
    run_ranks(tp, check_fused)


class Language(nn.Module):
    """An embedding, positions, a norm and a head, which may be tied."""

    def __init__(self, vocabulary, tied, bias):
        super().__init__()
        self.token = nn.Embedding(vocabulary, D, padding_idx=vocabulary - 1)
        self.position = nn.Embedding(T, D)
        self.norm = nn.LayerNorm(D)
        weight = self.token.weight if tied else nn.Parameter(torch.empty(vocabulary, D))
        self.head = Head(weight, nn.Parameter(torch.empty(vocabulary)) if bias else None)

    def hidden(self, tokens):
        return self.norm(self.token(tokens) + self.position(torch.arange(tokens.shape[1])))

    def forward(self, tokens):
        return self.head(self.hidden(tokens))


LANGUAGE = {"token": Vocabulary(), "position": Positions(), "head": Vocabulary()}


def language_loss(model, tokens):
    targets = tokens.roll(-1, 1)
    targets[:, ::3] = -100
    total, count = model.head.loss(model.hidden(tokens), targets)
    assert int(count) == int((targets != -100).sum())
    return total.view(1) * 2 + 1


def check_language(rank: Rank) -> None:
    mesh = mesh_of(rank)
    for vocabulary, tied, bias in ((53, True, False), (50, False, True), (rank.world_size, True, False)):
        model = double(Language(vocabulary, tied, bias))
        tokens = torch.randint(vocabulary, (B, T), generator=torch.Generator().manual_seed(2))
        for sequence in (False, True):
            for call in (None, language_loss):
                parallel = compare(mesh, model, LANGUAGE, [tokens], call, sequence=sequence)
                assert (parallel.head.weight is parallel.token.weight) == tied
                assert (partial_of(parallel.norm.weight) == ("tp",)) == (sequence and rank.world_size > 1)
                assert (shard_of(parallel.token.weight) is None) == (rank.world_size == 1)


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_vocabulary(tp) -> None:
    run_ranks(tp, check_language)


def check_loss_in_low_precision(rank: Rank) -> None:
    """Both in bfloat16: sums are float32, so that they agree far better than bfloat16 rounds."""
    mesh = mesh_of(rank)
    logits = (activations(64, V) * 50).bfloat16()
    targets = torch.arange(64) % V
    expected = F.cross_entropy(logits.float(), targets, reduction="sum")
    first, size = (0, 27) if rank.rank == 0 else (27, 26)
    mine = logits[:, first : first + size].clone().requires_grad_()
    total, _ = vocabulary_loss(mine, targets, mesh.group("tp"), first)
    assert total.dtype == torch.float32 and abs(total / expected - 1) < 1e-6
    total.backward()
    assert mine.grad.dtype == torch.bfloat16
    everyone = mesh.comm.all_gather(total.detach().view(1))
    assert (everyone == everyone[0]).all()
    nothing, count = vocabulary_loss(mine, torch.full((64,), -100), mesh.group("tp"), first)
    assert nothing == 0 and count == 0
    with pytest.raises(InvalidArgument, match="expected"):
        vocabulary_loss(mine, targets[:3], mesh.group("tp"), first)


def test_loss_in_low_precision() -> None:
    run_ranks(2, check_loss_in_low_precision)


def check_pieces(rank: Rank) -> None:
    """One piece or many: the same sums, and the same rows in the same places."""
    comm = rank.connect()
    x = activations(12, 5) + rank.rank
    matrices = [activations(5, 7), activations(5, 3)]
    one = gather_and_multiply(comm, x, matrices, [activations(7), None], 1)
    assert torch.equal(one[0], torch.cat([activations(12, 5) + r for r in range(rank.world_size)]))
    terms = [(activations(12, 5) * (rank.rank + 1), matrix) for matrix in (activations(5, 7), activations(5, 7) * 2)]
    for chunks in (2, 5, 12, 100):
        many = gather_and_multiply(comm, x, matrices, [activations(7), None], chunks)
        assert torch.equal(many[0], one[0])
        for y, expected in zip(many[1], one[1], strict=True):
            close(y, expected, f"{chunks} pieces")
        for scatter in (False, True):
            expected = Reduction(comm, terms, scatter, 1).wait()
            close(Reduction(comm, terms, scatter, chunks).wait(), expected, f"{chunks} pieces, scatter {scatter}")


def test_pieces() -> None:
    run_ranks(3, check_pieces)


def check_collectives(rank: Rank) -> None:
    mesh = mesh_of(rank)
    region = Region(mesh.group("tp"), sequence=True)
    n, r, own = region.size, region.index, region.own(T)
    whole, part = (B, T, D), (B, T // region.size, D)
    # function: shape of x; y of every rank's x; dx of every rank's dy. What follows a whole y is the same everywhere.
    cases = {
        copy_to: (whole, lambda xs: xs[r], lambda dys: dys.sum(0)),
        reduce_from: (whole, lambda xs: xs.sum(0), lambda dys: dys[0]),
        scatter_sum: (whole, lambda xs: xs.sum(0)[:, own], lambda dys: torch.cat(list(dys), 1)),
        split: (whole, lambda xs: xs[r][:, own], lambda dys: torch.cat(list(dys), 1)),
        join: (part, lambda xs: torch.cat(list(xs), 1), lambda dys: dys[0][:, own]),
    }
    for function, (shape, forward, backward) in cases.items():
        x = (activations(*shape) + r).requires_grad_()
        y = function(x, region)
        close(y, forward(mesh.comm.all_gather(x.detach())), function.__name__)
        dy = activations(*y.shape) * (1 + (r if function in (copy_to, scatter_sum, split) else 0))
        y.backward(dy)
        close(x.grad, backward(mesh.comm.all_gather(dy)), f"backward of {function.__name__}")
    sizes = [4, 3, 3][:n] if n > 1 else [10]
    x = torch.full((B, sizes[r]), float(r), dtype=torch.float64, requires_grad=True)
    y = gather_last(x, region, sizes)
    assert y[0].tolist() == [float(q) for q in range(n) for _ in range(sizes[q])]
    (y * torch.arange(y.shape[1])).sum().backward()
    assert x.grad[0].tolist() == [float(sum(sizes[:r]) + i) for i in range(sizes[r])]


@pytest.mark.parametrize("tp", [2, 3])
def test_collectives(tp) -> None:
    run_ranks(tp, check_collectives)


def check_second_derivatives(rank: Rank) -> None:
    """Of a gradient's norm, as on one process; where they are not supported, an Error at once and on every rank."""
    mesh = mesh_of(rank)
    region = Region(mesh.group("tp"))
    n, r = region.size, region.index
    scales = torch.linspace(0.5, 1.5, n, dtype=torch.float64)
    sizes = [4, 3, 3] if n == 3 else [4, 6]

    def parts(x):
        first = sum(sizes[:r])
        return (
            reduce_from((copy_to(x, region) * scales[r]).sin(), region)
            + join(split(x, region).cos(), region)
            + join(scatter_sum((copy_to(x, region) * scales[r]).cos(), region) ** 2, region)
            + gather_last(copy_to(x, region)[..., first : first + sizes[r]] ** 3, region, sizes)
        )

    def whole(x):
        return sum((x * a).sin() for a in scales) + x.cos() + sum((x * a).cos() for a in scales) ** 2 + x**3

    plain = double(Mlp(6, True), std=0.5)
    parallel = parallelize(copy.deepcopy(plain), mesh, mlp_plan(False, "x"))

    def penalty(function):
        x = activations(B, T, D).requires_grad_()
        y = function(x)
        (first,) = torch.autograd.grad((y * torch.linspace(-1, 1, D, dtype=y.dtype)).sum(), x, create_graph=True)
        first.square().sum().backward()
        return x.grad

    close(penalty(parts), penalty(whole), "collectives")
    close(penalty(parallel), penalty(plain), "columns and rows")
    named = dict(parallel.named_parameters())
    for name, theirs in plain.named_parameters():
        if theirs.grad is not None:
            close(whole_gradient(named[name], mesh), theirs.grad, f"gradient of {name}")

    sequence = parallelize(copy.deepcopy(plain), mesh, mlp_plan(True), sequence=True)
    x = activations(B, T, D).requires_grad_()
    with pytest.raises(Error, match=r"RowLinear with sequence parallelism: its gradient .* create_graph=True"):
        torch.autograd.grad(sequence(x).sum(), x, create_graph=True)
    logits = activations(4, 5).requires_grad_()
    loss, _ = vocabulary_loss(logits, torch.tensor([0, 3, 5 * n - 1, -100]), region.group, 5 * r)
    with pytest.raises(Error, match=r"vocabulary_loss: .* create_graph=True"):
        torch.autograd.grad(loss, logits, create_graph=True)
    lse, logit = (activations(2, 4) + r).requires_grad_()
    loss, _ = merged_loss(lse, logit, torch.tensor([0, 3, 1, -100]), region.group)
    with pytest.raises(Error, match=r"merged_loss: .* create_graph=True"):
        torch.autograd.grad(loss, lse, create_graph=True)


def check_autocast(rank: Rank) -> None:
    """Dtypes and, within bfloat16's rounding, gradients as of the plain modules; backward outside and inside."""
    mesh = mesh_of(rank)
    plain = double(Mlp(6, True), std=0.3).float()
    for sequence, inside in ((False, False), (True, False), (False, True)):
        parallel = parallelize(copy.deepcopy(plain), mesh, mlp_plan(sequence), sequence=sequence)
        found = []
        for model in (plain, parallel):
            model.zero_grad()
            x = activations(B, T, D).float().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = model.down(F.silu(model.gate(x)) * model.up(x)) if not sequence else model(x)
                if inside:
                    y.float().square().sum().backward()
            if not inside:
                y.float().square().sum().backward()
            found.append((y.detach(), x.grad, model.up.weight.grad))
        for ours, theirs in zip(*([*each[:2]] for each in found), strict=True):
            assert ours.dtype == theirs.dtype
            assert float((ours - theirs).norm()) <= 0.05 * float(ours.norm())
        assert found[0][2].dtype == found[1][2].dtype == torch.float32


def test_autocast() -> None:
    run_ranks(2, check_autocast)


@pytest.mark.parametrize("tp", [2, 3])
def test_second_derivatives(tp) -> None:
    run_ranks(tp, check_second_derivatives)


def check_beside_data_parallel(rank: Rank) -> None:
    """tp is innermost: each of two groups works by itself."""
    mesh = mesh_of(rank, tp=2)
    compare(mesh, double(Mlp(12, True)), mlp_plan(True, "x"), [activations(B, T, D)], sequence=True)
    mesh.close()


def test_beside_data_parallel() -> None:
    run_ranks(4, check_beside_data_parallel)


def check_whole_sequences(rank: Rank) -> None:
    """Generation's lengths, which do not divide, also in a model that trains with sharded sequences."""
    mesh = mesh_of(rank)
    plain = double(Language(V, True, False))
    parallel = parallelize(copy.deepcopy(plain), mesh, LANGUAGE, sequence=True)
    for length in (1, 7):
        tokens = torch.arange(length).expand(B, -1)
        with whole_sequences(parallel):
            close(parallel(tokens), plain(tokens).detach(), "logits")
    assert parallel.head.region.sequence


def test_whole_sequences() -> None:
    run_ranks(3, check_whole_sequences)


def check_in_place(rank: Rank) -> None:
    mesh = mesh_of(rank)
    for share in (None, "x"):
        for sequence in (False, True):
            layers = nn.Sequential(nn.Linear(D, 8), nn.ReLU(inplace=True), nn.Linear(8, D))
            plan = {"0": Column(share=share), "2": Row()} | ({"": Sequence()} if sequence else {})
            compare(mesh, double(layers), plan, [activations(B, T, D)], sequence=sequence)


def test_activations_in_place() -> None:
    run_ranks(2, check_in_place)


def check_embedding_in_place(rank: Rank) -> None:
    mesh = mesh_of(rank)
    for sequence in (False, True):
        model = parallelize(double(nn.Embedding(V, D)), mesh, {"": Vocabulary()}, sequence=sequence)
        x = model(torch.arange(T).expand(B, -1))
        x += 1
        x.sum().backward()


def test_embeddings_in_place() -> None:
    run_ranks(2, check_embedding_in_place)


def check_unused_and_reused(rank: Rank) -> None:
    """Shared columns of which one is not used, or whose module is called twice."""
    mesh = mesh_of(rank)
    plan = mlp_plan(False, "x")
    mlp = double(Mlp(8, True))
    x = activations(B, T, D)

    def without_gate(model, x):
        return model.down(model.up(x)) + model.down(model.up(x * 2))

    parallel = parallelize(copy.deepcopy(mlp), mesh, plan)
    expected, ours = without_gate(mlp, x), without_gate(parallel, x)
    close(ours, expected, "output")
    expected.sum().backward()
    ours.sum().backward()
    assert parallel.gate.weight.grad is None
    close(gather_parameter(parallel.up.weight, mesh, parallel.up.weight.grad), mlp.up.weight.grad, "gradient of up")
    close(parallel.down(parallel.up(x) * parallel.gate(x * 3)), mlp.down(mlp.up(x) * mlp.gate(x * 3)), "two inputs")


def test_unused_and_reused() -> None:
    run_ranks(2, check_unused_and_reused)


class Refused:
    """Plans that must be refused, and why; on two ranks."""

    CASES = (
        (lambda: nn.Linear(4, 6), {"": Column(heads=3)}, {}, "3 heads, which tp 2 does not divide"),
        (lambda: nn.Linear(4, 6), {"": Column(heads=(4, 2, 1))}, {}, "not 7 equal heads"),
        (lambda: nn.Linear(4, 7), {"": Column(parts=2)}, {}, "not 2 equal parts"),
        (lambda: nn.LayerNorm(4), {"": Column()}, {}, "is a LayerNorm, expected an nn.Linear"),
        (lambda: nn.LayerNorm(4), {"": Row()}, {}, "is a LayerNorm, expected an nn.Linear"),
        (lambda: nn.LayerNorm(4), {"": Vocabulary()}, {}, "is a LayerNorm, expected an nn.Embedding"),
        (lambda: nn.LayerNorm(4), {"": Heads(2)}, {}, "is a LayerNorm, expected an nn.MultiheadAttention"),
        (lambda: nn.LayerNorm(4), {"": Features(2)}, {}, "is a LayerNorm, expected a Dropout"),
        (lambda: nn.Embedding(1, 4), {"": Vocabulary()}, {}, "a vocabulary of 1, less than tp 2"),
        (lambda: nn.Embedding(8, 4, max_norm=1.0), {"": Vocabulary()}, {}, "no max_norm"),
        (lambda: nn.Linear(4, 6), {"up": Column()}, {}, "'up' fits no module of Linear"),
        (lambda: Language(V, True, False), {"token": Vocabulary()}, {}, "'head.weight' is tied"),
        (lambda: nn.Linear(4, 6), None, {}, "no plan"),
        (lambda: nn.Linear(4, 6), {"": Column()}, {"chunks": 0}, "chunks is 0"),
    )


def check_refused(rank: Rank) -> None:
    mesh = mesh_of(rank)
    for make, plan, options, why in Refused.CASES:
        with pytest.raises(InvalidArgument, match=why):
            parallelize(make(), mesh, plan, **options)
    model = parallelize(double(Language(V, True, False)), mesh, LANGUAGE, sequence=True)
    with pytest.raises(InvalidArgument, match="7 positions do not divide by the 2 ranks"):
        model(torch.zeros(1, 7, dtype=torch.int64))
    for token in (-1, V):
        tokens = torch.full((B, T), token)
        with pytest.raises(InvalidArgument, match=f"a token of {token}..{token}, but the vocabulary has {V}"):
            model(tokens)
        with pytest.raises(InvalidArgument, match=f"a target of {token}..{token}"):
            model.head.loss(model.hidden(tokens * 0), tokens)


def test_refused() -> None:
    run_ranks(2, check_refused)


def check_patterns(rank: Rank) -> None:
    mesh = mesh_of(rank)
    stack = nn.Sequential(*(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.LayerNorm(4)) for _ in range(2)))
    model = parallelize(stack, mesh, {"**.0": Column(), "*.1": Row(), "*.2": Inside()})
    for block in model:
        assert isinstance(block[0], ColumnLinear) and isinstance(block[1], RowLinear)
        assert partial_of(block[2].weight) == ("tp",)


def test_patterns() -> None:
    run_ranks(2, check_patterns)
