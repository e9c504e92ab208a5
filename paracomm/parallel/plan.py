"""Plans: which module of a plain model is cut in which way. The model itself knows nothing of it.

    plan = {
        "token": Vocabulary(),
        "position": Positions(),
        "blocks.*.attention.q": Column(heads=8, share="qkv"),
        "blocks.*.attention.k": Column(heads=2, share="qkv"),
        "blocks.*.attention.v": Column(heads=2, share="qkv"),
        "blocks.*.attention.core": Heads(8),
        "blocks.*.attention.out": Row(),
        "blocks.*.up": Column(),
        "blocks.*.down": Row(),
        "head": Vocabulary(),
    }
    model = parallelize(model, Mesh(comm, tp=2), plan, sequence=True)

A pattern is a module's qualified name; "*" stands for one part of it, "**" for any number. Of several patterns that fit
the last one counts. Modules that none fits are the same on every rank of tp.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from paracomm.errors import InvalidArgument
from paracomm.parallel import rng
from paracomm.parallel.attention import Attention
from paracomm.parallel.context import ContextAttention
from paracomm.parallel.loss import Head
from paracomm.parallel.mesh import Mesh
from paracomm.parallel.multihead import MultiheadAttention
from paracomm.parallel.shard import Shard, extent, extents, keep_marks, mark, partial_of, shard_of
from paracomm.parallel.tensor import (
    ColumnLinear,
    Region,
    RowLinear,
    SameInput,
    VocabularyEmbedding,
    VocabularyHead,
    join,
    split,
)


@dataclass
class Shards:
    """What is cut so far, so that a tied parameter is one shard used twice, and who shares an input."""

    made: dict[int, tuple[Tensor, nn.Parameter]] = field(default_factory=dict)
    shared: dict[tuple[str, str], SameInput] = field(default_factory=dict)

    def cut(self, parameter: Tensor, shard: Shard, name: str) -> nn.Parameter:
        """This rank's part of `parameter`; raises InvalidArgument if it was cut in another way before."""
        if id(parameter) in self.made:
            _, mine = self.made[id(parameter)]
            if shard_of(mine) != shard:
                raise InvalidArgument(f"plan: '{name}' is tied to a parameter that is cut in another way")
            return mine
        mine = nn.Parameter(shard.take(parameter.detach()), requires_grad=parameter.requires_grad)
        vars(mine).update(vars(parameter))
        mark(mine, shard)
        self.made[id(parameter)] = (parameter, mine)
        return mine


@dataclass(frozen=True)
class Site:
    """Where a style is applied."""

    name: str
    region: Region
    shards: Shards

    def fail(self, module: nn.Module, expected: str) -> InvalidArgument:
        return InvalidArgument(f"plan: '{self.name}' is a {type(module).__name__}, expected {expected}")

    def cut(self, parameter: Tensor, dim: int, pieces: list[tuple[int, int]]) -> nn.Parameter:
        """This rank's pieces (offset, size) of dimension `dim`."""
        size = sum(size for _, size in pieces)
        several = tuple(pieces) if len(pieces) > 1 else ()
        shard = Shard(dim, pieces[0][0], size, parameter.shape[dim], pieces=several)
        return self.shards.cut(parameter, shard, self.name)

    def pieces(self, total: int, heads: tuple[int, ...] | None, parts: int) -> list[tuple[int, int]]:
        """This rank's share of each of the parts of `total` features; whole heads where `heads` says how many."""
        index, ranks = self.region.index, self.region.size
        if heads is None:
            if total % parts:
                raise InvalidArgument(f"plan: '{self.name}' has {total} features, which are not {parts} equal parts")
            width = total // parts
            offset, size = extent(width, ranks, index)
            return [(part * width + offset, size) for part in range(parts)]
        if total % sum(heads):
            raise InvalidArgument(f"plan: '{self.name}' has {total} features, which are not {sum(heads)} equal heads")
        width, first, found = total // sum(heads), 0, []
        for count in heads:
            if count % ranks:
                raise InvalidArgument(f"plan: '{self.name}' has {count} heads, which tp {ranks} does not divide")
            mine = count // ranks
            found.append(((first + index * mine) * width, mine * width))
            first += count
        return found


class Style:
    """How one module is cut: apply() gives what takes its place, or the module itself."""

    def apply(self, module: nn.Module, site: Site) -> nn.Module:
        raise NotImplementedError


@dataclass(frozen=True)
class Column(Style):
    """An nn.Linear by output features: its output stays on its rank, for a Row or a core that has Heads.

    Args:
        parts: equal parts of a fused projection, each of which is cut by itself.
        heads: cuts between heads: how many each part has, or one number for each part, as (8, 2, 2).
        share: modules of one parent with the same `share` are always called with the same input, which is then
            gathered, and its gradient summed, once for all of them.
    """

    parts: int = 1
    heads: int | tuple[int, ...] | None = None
    share: str | None = None

    def apply(self, module: nn.Module, site: Site) -> nn.Module:
        if not isinstance(module, nn.Linear):
            raise site.fail(module, "an nn.Linear for Column")
        heads = (self.heads,) * self.parts if isinstance(self.heads, int) else self.heads
        pieces = site.pieces(module.out_features, heads, self.parts)
        if site.region.size == 1:
            return module
        weight = site.cut(module.weight, 0, pieces)
        bias = None if module.bias is None else site.cut(module.bias, 0, pieces)
        parent = site.name.rpartition(".")[0]
        key = (parent, self.share) if self.share else (site.name, "")
        return ColumnLinear(site.region, weight, bias, site.shards.shared.setdefault(key, SameInput()))


@dataclass(frozen=True)
class Row(Style):
    """An nn.Linear by input features, which come from a Column or a core that has Heads: its output is the sum."""

    def apply(self, module: nn.Module, site: Site) -> nn.Module:
        if not isinstance(module, nn.Linear):
            raise site.fail(module, "an nn.Linear for Row")
        if site.region.size == 1:
            return module
        weight = site.cut(module.weight, 1, site.pieces(module.in_features, None, 1))
        return RowLinear(site.region, weight, module.bias)


@dataclass(frozen=True)
class Vocabulary(Style):
    """An nn.Embedding by rows, or a Head or nn.Linear that gives logits; of any number of rows from tp on."""

    def apply(self, module: nn.Module, site: Site) -> nn.Module:
        if not isinstance(module, (nn.Embedding, nn.Linear, Head)):
            raise site.fail(module, "an nn.Embedding, nn.Linear or Head for Vocabulary")
        ranks, V = site.region.size, module.weight.shape[0]
        if ranks > V:
            raise InvalidArgument(f"plan: '{site.name}' has a vocabulary of {V}, less than tp {ranks}")
        if ranks == 1:
            return module
        pieces = site.pieces(V, None, 1)
        weight = site.cut(module.weight, 0, pieces)
        if isinstance(module, nn.Embedding):
            if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
                raise site.fail(module, "no max_norm, scale_grad_by_freq or sparse for Vocabulary")
            return VocabularyEmbedding(site.region, weight, pieces[0][0], V, module.padding_idx)
        bias = None if module.bias is None else site.cut(module.bias, 0, pieces)
        return VocabularyHead(site.region, weight, bias, pieces[0][0], extents(V, ranks))


@dataclass(frozen=True)
class Heads(Style):
    """An nn.MultiheadAttention as a whole; or an attention core that is called with this rank's of `total` heads."""

    total: int | None = None

    def apply(self, module: nn.Module, site: Site) -> nn.Module:
        if isinstance(module, nn.MultiheadAttention):
            return _split_multihead(module, site)
        if not isinstance(module, Attention) or self.total is None:
            raise site.fail(module, "an nn.MultiheadAttention, or an Attention with a number of heads, for Heads")
        ((offset, _),) = site.pieces(self.total, (self.total,), 1)
        module.head_part = (offset, self.total)
        return module


@dataclass(frozen=True)
class Features(Style):
    """A Dropout between a Column and a Row: it has this rank's of `total` features."""

    total: int

    def apply(self, module: nn.Module, site: Site) -> nn.Module:
        if not isinstance(module, (nn.Dropout, rng.Dropout)):
            raise site.fail(module, "a Dropout for Features")
        module = rng.Dropout(module.p) if isinstance(module, nn.Dropout) else module
        module.feature_part = (extent(self.total, site.region.size, site.region.index)[0], self.total)
        return module


@dataclass(frozen=True)
class Positions(Style):
    """What yields something for every position, [T, D] or [B, T, D], to be added to activations that may be sharded."""

    def apply(self, module: nn.Module, site: Site) -> nn.Module:
        region = site.region

        def own(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            return output[..., region.own(output.shape[-2]), :] if region.sequence else output

        if region.sequence:
            module.register_forward_hook(own)
        return module


@dataclass(frozen=True)
class Sequence(Style):
    """A module inside of which activations are sharded with sequence=True, and outside of which they are whole.

    Its first `inputs` positional arguments, [B, T, D], are cut; what it returns is gathered. A plan with one or more of
    these has no sequence parallelism elsewhere; a plan without has it everywhere from Vocabulary to Vocabulary.
    """

    inputs: int = 1

    def apply(self, module: nn.Module, site: Site) -> nn.Module:
        region = site.region

        def enter(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not region.sequence:
                return None
            if len(inputs) < self.inputs:
                raise InvalidArgument(f"'{site.name}': {len(inputs)} positional arguments, expected {self.inputs}")
            return (*(split(x, region) for x in inputs[: self.inputs]), *inputs[self.inputs :])

        def leave(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            return join(output, region) if region.sequence else output

        if region.sequence:
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
        return module


@dataclass(frozen=True)
class Inside(Style):
    """A module with whole parameters that works on this rank's heads or features: its gradients are parts of a sum."""

    def apply(self, module: nn.Module, site: Site) -> nn.Module:
        if site.region.size > 1:
            for parameter in module.parameters():
                mark(parameter, partial=("tp",))
        return module


def _split_multihead(module: nn.MultiheadAttention, site: Site) -> nn.Module:
    if module.bias_k is not None or module.add_zero_attn:
        raise site.fail(module, "no add_bias_kv and add_zero_attn for Heads")
    if not module.batch_first and (site.region.sequence or module.dropout > 0.0):
        raise site.fail(module, "batch_first=True with sequence parallelism or dropout, for Heads")
    heads, E = module.num_heads, module.embed_dim
    one, three = site.pieces(E, (heads,), 1), site.pieces(3 * E, (heads,) * 3, 3)
    cuts = {"in_proj_weight": three, "q_proj_weight": one, "k_proj_weight": one, "v_proj_weight": one,
            "in_proj_bias": three}  # fmt: skip
    alone = site.region.size == 1
    parameters = {
        name: parameter if alone else site.cut(parameter, 0, pieces)
        for name, pieces in cuts.items()
        if (parameter := getattr(module, name)) is not None
    }
    out: nn.Module = module.out_proj
    if not alone:
        out = RowLinear(site.region, site.cut(module.out_proj.weight, 1, one), module.out_proj.bias)
    ((offset, size),) = one
    place = (offset // module.head_dim, size // module.head_dim, heads)
    return MultiheadAttention(site.region, module, parameters, out, place)


# --- plans ---
Plan = Mapping[str, Style]


def parallelize(
    model: nn.Module, mesh: Mesh, plan: Plan | None = None, *, sequence: bool = False, chunks: int | None = None,
    context: Literal["ring", "ulysses"] = "ring",
) -> nn.Module:  # fmt: skip
    """`model`, cut over tp as the plan says, with context parallel attention where the mesh has a cp. Collective.

    The model is changed; every rank gives the same one, with whole parameters of equal values, before its optimizer is
    made. Every nn.Dropout that drops anything becomes an rng.Dropout, whatever the mesh, so that layouts agree.

    Args:
        plan: None: what model.plan() gives, or torch's Transformer layers in it as transformer_plan() has them.
        sequence: shards activations in T between tp's layers; tp must divide T.
        chunks: pieces of a collective that goes on with a multiplication; None: by size.
        context: how attention goes over cp.

    Returns the model, or what took its place. Raises InvalidArgument where the plan does not fit: a pattern that no
    module has, a module of another kind, heads that tp does not divide, a tied parameter that is cut only once.
    """
    if plan is None:
        own: Any = getattr(model, "plan", None)
        plan = own() if callable(own) else transformer_plan(model)
    group = mesh.group("tp")
    inner = Region(group, sequence=sequence, chunks=chunks)
    outer = Region(group, chunks=chunks)
    chosen = _match(model, plan)
    roots = [name for name, style in chosen.items() if isinstance(style, Sequence)] or [""]

    def region_of(name: str) -> Region:
        return inner if any(not root or name == root or name.startswith(root + ".") for root in roots) else outer

    shards = Shards()
    model = _replace_all(model, chosen, region_of, shards)
    _expect_all_tied(model, shards)
    for name, parameter in model.named_parameters():
        if region_of(name).sequence and shard_of(parameter) is None and not partial_of(parameter):
            mark(parameter, partial=("tp",))
    model = _replace_dropouts(model, region_of)
    if any(
        getattr(module, "stream", 0) is None or isinstance(module, MultiheadAttention) for module in model.modules()
    ):
        rng.name_streams(model)
    if mesh.size("cp") > 1:
        _replace_cores(model, mesh, context)
    keep_marks(model)
    return model


@contextmanager
def whole_sequences(model: nn.Module) -> Iterator[None]:
    """Inside, every rank has whole sequences, of any length, under sequence and context parallelism too, as generation
    needs them. Without gradients."""
    regions = {id(region): region for module in model.modules() if isinstance(region := _region(module), Region)}
    cores = [module for module in model.modules() if isinstance(module, ContextAttention)]
    with ExitStack() as stack:
        for region in regions.values():
            stack.enter_context(region.whole())
        for core in cores:
            core.whole = True
            stack.callback(setattr, core, "whole", False)
        yield


def transformer_plan(model: nn.Module) -> dict[str, Style]:
    """A plan for every nn.TransformerEncoderLayer and nn.TransformerDecoderLayer of a model.

    Sequence parallelism goes over an nn.TransformerEncoder or nn.TransformerDecoder as a whole, else layer by layer.
    Raises InvalidArgument if there is none.
    """
    plan: dict[str, Style] = {}
    covered: list[str] = []
    for name, module in model.named_modules():
        stack = isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder))
        layer = isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        if not stack and not layer:
            continue
        if not any(not root or name.startswith(root + ".") for root in covered):
            covered.append(name)
            decodes = isinstance(module, (nn.TransformerDecoder, nn.TransformerDecoderLayer))
            plan[name] = Sequence(2 if decodes else 1)
        if layer:
            prefix = f"{name}." if name else ""
            plan[prefix + "self_attn"] = Heads()
            if isinstance(module, nn.TransformerDecoderLayer):
                plan[prefix + "multihead_attn"] = Heads()
            plan[prefix + "linear1"] = Column()
            plan[prefix + "dropout"] = Features(module.linear1.out_features)
            plan[prefix + "linear2"] = Row()
    if not plan:
        raise InvalidArgument(f"parallelize: {type(model).__name__} has no plan() and no Transformer layer of torch's")
    return plan


def _match(model: nn.Module, plan: Plan) -> dict[str, Style]:
    """{name: style} in the order of the model; a module with several names is there under each."""
    patterns = [(pattern, re.compile(_regex(pattern)), style) for pattern, style in plan.items()]
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern, regex, _ in patterns:
        if not any(regex.fullmatch(name) for name in names):
            raise InvalidArgument(f"plan: '{pattern}' fits no module of {type(model).__name__}")
    chosen = {}
    for name in names:
        fitting = [style for _, regex, style in patterns if regex.fullmatch(name)]
        if fitting:
            chosen[name] = fitting[-1]
    return chosen


def _regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*\*", ".+").replace(r"\*", r"[^.]+")


def _replace_all(model: nn.Module, chosen: Mapping[str, Style], region_of: Any, shards: Shards) -> nn.Module:
    made: dict[int, nn.Module] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, style in chosen.items():
        module = modules[name]
        if id(module) not in made:
            made[id(module)] = replacement = style.apply(module, Site(name, region_of(name), shards))
            if replacement is not module:
                replacement.train(module.training)
        model = _put(model, name, made[id(module)])
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The model with `module` at `name`, where "" is the model itself."""
    if not name:
        return module
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
    return model


def _expect_all_tied(model: nn.Module, shards: Shards) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in shards.made:
            raise InvalidArgument(f"plan: '{name}' is tied to a parameter that is cut elsewhere, and needs a style too")


def _replace_dropouts(model: nn.Module, region_of: Any) -> nn.Module:
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is nn.Dropout and module.p > 0.0:
            model = _put(model, name, rng.Dropout(module.p).train(module.training))
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    for name, module in model.named_modules():
        region = region_of(name)
        if region.sequence and hasattr(module, "sequence_part") and getattr(module, "feature_part", None) is None:
            module.sequence_part = (region.index, region.size)
    return model


def _replace_cores(model: nn.Module, mesh: Mesh, method: Literal["ring", "ulysses"]) -> None:
    group = mesh.group("cp")
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Attention):
            _put(model, name, ContextAttention(module, group, method))


def _region(module: nn.Module) -> Any:
    return vars(module).get("region")
