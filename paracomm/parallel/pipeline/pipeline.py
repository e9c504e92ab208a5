"""Pipeline parallelism: ranks share a model's layers, and microbatches pass through them by a schedule."""

from __future__ import annotations

import json
import numbers
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from paracomm.comm import Communicator
from paracomm.errors import InvalidArgument
from paracomm.parallel import rng
from paracomm.parallel.average import Average
from paracomm.parallel.bucket import COMMUNICATOR, MIB, Bucket, Hook, all_reduce_hook
from paracomm.parallel.clip import global_norm, scale
from paracomm.parallel.data import DataParallel
from paracomm.parallel.mesh import Mesh
from paracomm.parallel.optimizer import Groups, Shards, parameters_of
from paracomm.parallel.pipeline.layer import expect_cut, layers_of
from paracomm.parallel.pipeline.runner import Step
from paracomm.parallel.pipeline.stage import make_stages
from paracomm.parallel.recompute import Mode
from paracomm.parallel.recompute import recompute as make_recompute
from paracomm.parallel.weights import Weights
from paracomm.pipeline import Action, PipelineSchedule, cut_evenly
from paracomm.pipeline.action import FORWARD

FOR_ALL = (numbers.Number, str, torch.dtype, torch.device)
"""What of a batch is no tensor and holds for all of its samples."""
MakeHook = Callable[[], tuple[Any, Hook]]


class Pipeline(nn.Module):
    """The stages of `model` that this rank has, each a DataParallel over the mesh's dp and cp.

        schedule = paracomm.pipeline.build("1f1b", ranks=mesh.size("pp"), microbatches=8)
        pipeline = Pipeline(model, mesh, schedule, zero=1)
        optimizer = pipeline.optimizer(torch.optim.AdamW, lr=1e-3)
        for tokens, targets in batches:
            optimizer.zero_grad()
            loss = pipeline.forward_backward({"tokens": tokens, "targets": targets}, divisor=targets.numel())
            pipeline.finish()
            pipeline.clip_(1.0)
            optimizer.step()

    Whatever the schedule, gradients are the same bits, where stages are cut alike.

    Args:
        model: with a method layers() (ours have one), or an nn.Sequential or nn.ModuleList; the same on every rank. Of
            what other ranks compute the memory is given back.
        schedule: over as many ranks as the mesh's pp has.
        first: the first layer of each stage; None: as many layers in each.
        loss: of a list of modules, loss(output, target).
        make_hook: () -> (state, hook), called for each stage of this rank; None: gradients are averaged as they are.
        recompute: "none", "selective" or "full". Where a schedule has backward in two parts, "full" keeps a stage's
            inputs and runs the whole stage again; elsewhere each block by itself.

    See DataParallel for the other arguments. Raises InvalidArgument for a schedule of another number of ranks, a cut
    that is none, and for what layers_of() and make_stages() refuse.
    """

    def __init__(
        self, model: nn.Module, mesh: Mesh, schedule: PipelineSchedule, *, first: Sequence[int] | None = None,
        loss: Callable[[Any, Tensor], Tensor] | None = None, bucket_bytes: int = 25 * MIB,
        first_bucket_bytes: int = MIB, make_hook: MakeHook | None = None, zero: int = 0, overlap: bool = True,
        average: bool = True, precision: str | None = None, recompute: Mode = "none",
    ) -> None:  # fmt: skip
        super().__init__()
        self.mesh, self.schedule, self.zero = mesh, schedule, zero
        self.comm = _groups(mesh).group("pp")
        if schedule.world_size != self.comm.world_size:
            raise InvalidArgument(
                f"pipeline: the schedule {schedule.name} is for {schedule.world_size} ranks, the mesh has pp "
                f"{self.comm.world_size}"
            )
        self._stagewise = recompute == "full" and bool(schedule.split)
        if not self._stagewise:
            make_recompute(model, recompute)
        layers = layers_of(model, loss)
        self.first = cut_evenly(len(layers), schedule.stages) if first is None else list(first)
        expect_cut(self.first, len(layers), schedule.stages)
        self._taken = {name for layer in layers for name in layer.names}
        self._broadcast_ties(model)
        whole = dict(model.named_parameters())
        stages = make_stages(model, layers, self.first, schedule.stages_of(self.comm.rank))
        options: dict[str, Any] = {
            "bucket_bytes": bucket_bytes, "first_bucket_bytes": first_bucket_bytes, "zero": zero, "overlap": overlap,
            "average": average, "precision": precision,
        }  # fmt: skip
        self._part: dict[int, DataParallel] = {}
        for stage in stages:
            state, hook = (COMMUNICATOR, all_reduce_hook) if make_hook is None else make_hook()
            self._part[stage.index] = DataParallel(stage, mesh, hook=hook, state=state, **options)
        self.stages = nn.ModuleList(self._part.values())
        self._originals = self._find_originals(whole)
        self._names = {stage.index: stage.names for stage in stages}
        self._ties = _Ties(self.comm, [part.reducer.buckets for part in self._part.values()])
        self.results: list[tuple[Any, ...]] = []
        """What the last stage gave for each microbatch of the last call, on its rank; none elsewhere."""

    def _broadcast_ties(self, model: nn.Module) -> None:
        """What the model has in two places starts alike in both, whoever made it."""
        uses: dict[nn.Parameter, int] = {}
        for _, parameter in model.named_parameters(remove_duplicate=False):
            uses[parameter] = uses.get(parameter, 0) + 1
        for parameter in (parameter for parameter, count in uses.items() if count > 1):
            self.comm.broadcast(parameter.detach(), root=0)

    def _find_originals(self, whole: Mapping[str, nn.Parameter]) -> list[tuple[nn.Parameter, list[nn.Parameter]]]:
        """Each parameter that the model had, and those of this rank that stand for it: itself, copies of a tied one."""
        here = [parameter for _, parameter in self.named_stage_parameters()]
        copies: dict[str, list[nn.Parameter]] = {}
        for parameter in here:
            if hasattr(parameter, "copy_of"):
                copies.setdefault(parameter.copy_of, []).append(parameter)
        ids = {id(parameter) for parameter in here}
        return [
            (parameter, [parameter] * (id(parameter) in ids) + copies.get(name, []))
            for name, parameter in whole.items()
        ]

    # --- steps ---
    def forward_backward(self, batch: Mapping[str, Any], *, divisor: Any = 1, more: bool = False) -> Tensor:
        """Passes the microbatches of `batch` through the stages, forward and backward; gradients accumulate.

        Returns the sum of the microbatches' losses, each divided by `divisor`, on the rank of the last stage and 0 on
        the others, float64: add it up over pp. Call finish() afterwards. Where samples have to be known (dropout), call
        it inside rng.at(Place) of this rank's whole batch.

        Args:
            batch: entries [B, ...] of this rank's samples, the same on all ranks of pp; B is a multiple of the
                microbatches, which take the samples in order. Numbers, texts, None and tensors without dimensions are
                given to each microbatch.
            more: another call follows before finish().

        Raises InvalidArgument for another B, for an entry that no layer takes or that is of another kind, and what a
        layer or the communication raises: on every rank of pp.
        """

        def accumulate(stage: int, last: bool, run: Callable[[], None]) -> None:
            with ExitStack() as stack:
                if more or not last:
                    stack.enter_context(self._part[stage].no_sync())
                run()

        step = self._run(batch, self.schedule.ranks[self.comm.rank], divisor, accumulate)
        return torch.stack(step.losses).sum() if step.losses else torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def forward(self, batch: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """What the last stage gives for each microbatch, without gradients; an empty list on other ranks."""
        actions = [action for action in self.schedule.ranks[self.comm.rank] if action.kind == FORWARD]
        return self._run(batch, actions, 1, None).results

    def _run(self, batch: Mapping[str, Any], actions: Sequence[Action], divisor: Any, accumulate: Any) -> Step:
        batches, places = _microbatches(batch, self.schedule.microbatches, self._taken)
        options = {} if accumulate is None else {"accumulate": accumulate}
        step = Step(
            self.schedule, self.comm, self._part, self._names, batches, places, divisor=divisor,
            recomputes=self._stagewise, **options,
        )  # fmt: skip
        try:
            step.run(actions)
        except BaseException as error:
            self.comm.abort(f"the pipeline's step raised {type(error).__name__}: {error}")
            raise
        self.results = step.results
        return step

    def finish(self) -> None:
        """Waits for the reductions, and adds up what tied weights have in their stages."""
        for part in self._part.values():
            part.finish()
        self._ties.add_up()

    # --- what DataParallel has, over all stages of this rank ---
    @property
    def parts(self) -> list[DataParallel]:
        """The stages of this rank, in rising order."""
        return list(self._part.values())

    @property
    def buckets(self) -> list[Bucket]:
        return [bucket for part in self._part.values() for bucket in part.reducer.buckets]

    @property
    def blocked_s(self) -> float:
        """Seconds spent blocked on reductions, since the start."""
        return sum(part.blocked_s for part in self._part.values())

    def named_stage_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the model, parameter) of this rank's stages, copies of tied ones under names of their own."""
        for part in self._part.values():
            yield from part.module.named_parameters()

    def everywhere(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the ranks of pp have under each name, on all of them. Collective over pp; names are disjoint."""
        described = [[name, str(x.dtype).removeprefix("torch."), list(x.shape)] for name, x in tensors.items()]
        found: dict[str, Tensor] = {}
        for rank, blob in enumerate(self.comm.exchange(json.dumps(described).encode())):
            for name, dtype, shape in json.loads(blob):
                mine = rank == self.comm.rank
                x = tensors[name].detach().clone() if mine else torch.empty(shape, dtype=getattr(torch, dtype))
                found[name] = x.contiguous()
                self.comm.broadcast(found[name], root=rank)
        return found

    def optimizer(
        self,
        kind: type[torch.optim.Optimizer],
        groups: Groups = None,
        *,
        elementwise: bool = False,
        **options: Any,
    ) -> torch.optim.Optimizer:
        """As DataParallel.optimizer(), over what this rank owns of its stages.

        Groups may have been made of the model's parameters before it was wrapped.
        """
        named = [(name, parameter) for name, parameter in self.named_stage_parameters() if parameter.requires_grad]
        mine = {id(parameter): theirs for parameter, theirs in self._originals}
        mine |= {
            id(parameter): [parameter] for _, parameter in self.named_stage_parameters() if id(parameter) not in mine
        }
        return Shards(
            kind, self._weights, _groups_here(groups, mine), named, self._publish, options, self._settle,
            self.mesh.comm, elementwise,
        ).optimizer  # fmt: skip

    def average(self, decay: float | None = 0.999) -> Average:
        """As DataParallel.average(), over the stages of this rank."""
        return Average(self._weights, self._settle, self._publish, decay)

    @property
    def _weights(self) -> list[Weights]:
        return [each for part in self._part.values() for each in part.weights]

    def _settle(self) -> None:
        for part in self._part.values():
            part.settle()

    def _publish(self) -> None:
        for part in self._part.values():
            part.publish()

    def clip_(self, max_norm: float) -> float:
        """As DataParallel.clip_(): the norm over the whole mesh, a tied weight counted once."""
        norm = global_norm(self.buckets, self.mesh.comm, lambda axis: self.mesh.index(axis) == 0)
        scale(self.buckets, norm, max_norm)
        return norm

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Every parameter of this rank's stages is whole inside, under ZeRO 3 as well. Collective."""
        with ExitStack() as stack:
            for part in self._part.values():
                stack.enter_context(part.gathered())
            yield

    def bytes_held(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
        """As DataParallel.bytes_held()."""
        found = {"parameters": 0, "gradients": 0, "optimizer": 0}
        for index, part in enumerate(self._part.values()):
            for kind, held in part.bytes_held(None if index else optimizer).items():
                found[kind] += held
        return found


class _Ties:
    """Weights that several stages have: the sum of their gradients, in all of them. Each has a bucket of its own."""

    def __init__(self, comm: Communicator, buckets: Sequence[Sequence[Bucket]]) -> None:
        self._mine: dict[str, list[Bucket]] = {}
        for bucket in (bucket for part in buckets for bucket in part):
            name = getattr(bucket.members[0], "tied", None)
            if name is not None:
                self._mine.setdefault(name, []).append(bucket)
        everyones = [blob.decode().split("\n") for blob in comm.exchange("\n".join(self._mine).encode())]
        self._comms: dict[str, Communicator | None] = {}
        for name in sorted({name for names in everyones for name in names if name}):
            holders = [rank for rank, names in enumerate(everyones) if name in names]
            if len(holders) > 1:
                self._comms[name] = comm.split(0 if comm.rank in holders else None)

    @torch.no_grad()
    def add_up(self) -> None:
        for name in sorted(self._mine):
            gradients = [cast("Tensor", bucket.gradient) for bucket in self._mine[name]]
            total = gradients[0]
            for gradient in gradients[1:]:
                total.add_(gradient)
            comm = self._comms.get(name)
            if comm is not None:
                comm.all_reduce(total, algorithm="ordered")
            for gradient in gradients[1:]:
                gradient.copy_(total)


def _groups(mesh: Mesh) -> Mesh:
    """Makes the groups that some stages ask for and others may not: that is collective over the whole mesh."""
    for axes in (("pp",), ("dp", "cp"), ("dp", "cp", "tp"), ("tp",), ("cp",)):
        mesh.group(*axes)
    return mesh


def _microbatches(
    batch: Mapping[str, Any], count: int, taken: Collection[str]
) -> tuple[list[dict[str, Any]], list[rng.Place | None]]:
    """The entries of each microbatch: rows of tensors, and what is for all samples as it is.

    Raises InvalidArgument for an entry that no layer takes, one that is neither, and rows that do not divide.
    """
    tensors: dict[str, Tensor] = {}
    for name, x in batch.items():
        if name not in taken:
            known = ", ".join(sorted(taken)) or "none"
            raise InvalidArgument(f"pipeline: no layer takes the batch's '{name}', they take {known}")
        if isinstance(x, Tensor) and x.dim():
            tensors[name] = x
        elif x is not None and not isinstance(x, (Tensor, *FOR_ALL)):
            raise InvalidArgument(
                f"pipeline: the batch's '{name}' is a {type(x).__name__}, expected a tensor [B, ...], which is cut "
                "into microbatches, or a number, a text or None, which each of them is given"
            )
    rows = {name: len(x) for name, x in tensors.items()}
    if len(set(rows.values())) != 1 or next(iter(rows.values())) % count:
        said = ", ".join(f"'{name}' {size}" for name, size in rows.items()) or "none"
        raise InvalidArgument(
            f"pipeline: {count} microbatches of entries with rows {said}; expected one number of rows, a multiple of "
            f"{count}"
        )
    size = next(iter(rows.values())) // count
    place = rng.placed()
    batches, places = [], []
    for part in (slice(m * size, (m + 1) * size) for m in range(count)):
        batches.append({name: tensors[name][part] if name in tensors else x for name, x in batch.items()})
        places.append(None if place is None else replace(place, rows=place.rows[part]))
    return batches, places


def _groups_here(groups: Groups, originals: Mapping[int, Sequence[nn.Parameter]]) -> Groups:
    """Groups of this rank's parameters, made of groups of the model's: other ranks' are left out.

    Raises InvalidArgument for a parameter that the model did not have when it was wrapped.
    """
    if groups is None or callable(groups):
        return groups
    listed: list[Any] = list(groups)
    if listed and not isinstance(listed[0], Mapping):  # parameters, as torch takes them too: one group
        listed = [{"params": listed}]
    found: list[Mapping[str, Any]] = []
    for index, group in enumerate(listed):
        mine: list[nn.Parameter] = []
        for parameter in parameters_of(group, index):
            if id(parameter) not in originals:
                raise InvalidArgument(
                    f"pipeline: group {index} of the optimizer has a parameter {list(parameter.shape)} that the model "
                    "did not have when Pipeline took it (tensor parallelism replaces modules); make the groups after "
                    "wrapping, or give a rule(name, parameter)"
                )
            mine += originals[id(parameter)]
        found.append({**group, "params": list(dict.fromkeys(mine))})
    return found
