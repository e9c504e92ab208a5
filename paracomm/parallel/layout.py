"""How a run is spread over its ranks, as one value: what can be combined, and a model made of it.

layout = Layout(tp=2, zero=2, recompute="full")
layout.check(world_size=comm.world_size, heads=8, vocabulary=257, length=1024)
mesh = layout.mesh(comm)
model = layout.spread(model, mesh)                  # a DataParallel
optimizer = model.optimizer(torch.optim.AdamW, lr=1e-3)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from torch import nn

from paracomm.comm import Communicator
from paracomm.errors import InvalidArgument
from paracomm.hooks import HOOKS, make_hook
from paracomm.parallel.bucket import MIB
from paracomm.parallel.context import Method
from paracomm.parallel.data import PRECISIONS, DataParallel
from paracomm.parallel.mesh import Mesh, product
from paracomm.parallel.pipeline import Pipeline
from paracomm.parallel.plan import Plan, parallelize
from paracomm.parallel.recompute import Mode, recompute
from paracomm.pipeline import SCHEDULES, PipelineSchedule, build

PRECISION_NAMES = [name for name in PRECISIONS if name is not None]


@dataclass(frozen=True)
class Layout:
    """What each rank holds and sends. The numbers of a run do not depend on it, but for `hook` and `precision`.

    dp: ranks that share the rows of a batch; None: what the other axes leave.
    cp: ranks that share the positions of a sequence. cp_method: "ring" or "ulysses" attention over them.
    tp: ranks that share a layer. sequence: they share the positions between its products too.
    zero: the stage of ZeRO: what dp and cp ranks share, that they would all hold (0 to 3).
    hook: how gradients travel, a name of paracomm.hooks.HOOKS; None: as they are.
    recompute: what backward computes again, "none", "selective" or "full".
    precision: "bfloat16", with float32 weights in the optimizer; None: the model's own.
    pp: ranks that share the layers. schedule: who computes when, a name of paracomm.pipeline.SCHEDULES.
    microbatches: of this rank's samples that pass through them in one go; None: twice as many as ranks.
    """

    dp: int | None = None
    cp: int = 1
    tp: int = 1
    zero: int = 0
    sequence: bool = False
    cp_method: Method = "ring"
    hook: str | None = None
    recompute: Mode = "none"
    precision: str | None = None
    pp: int = 1
    schedule: str = "1f1b"
    microbatches: int | None = None

    def check(
        self,
        *,
        world_size: int | None = None,
        heads: int | None = None,
        kv_heads: int | None = None,
        vocabulary: int | None = None,
        length: int | None = None,
        layers: int | None = None,
        rows: int | None = None,
    ) -> None:
        """Raises InvalidArgument, with the reason, where the layout cannot work.

        What is not known yet is not looked at: `heads`, `kv_heads` (None: as many), `vocabulary` and `layers` of the
        model, `length` of its sequences, `rows` of a rank's batch, `world_size` of the job.
        """
        for reason in self.refusals(
            world_size=world_size, heads=heads, kv_heads=kv_heads, vocabulary=vocabulary, length=length, layers=layers,
            rows=rows,
        ):  # fmt: skip
            raise InvalidArgument(f"layout: {reason}")

    def refusals(
        self,
        *,
        world_size: int | None = None,
        heads: int | None = None,
        kv_heads: int | None = None,
        vocabulary: int | None = None,
        length: int | None = None,
        layers: int | None = None,
        rows: int | None = None,
    ) -> Iterator[str]:
        """The reasons why check() would raise; none if the layout works."""
        values = list(self._wrong_values())
        yield from values
        if values:
            return
        yield from self._wrong_pairs()
        yield from self._wrong_pipeline(layers, rows)
        yield from self._wrong_model(heads, heads if kv_heads is None else kv_heads, vocabulary)
        if length is not None:
            yield from self._wrong_length(length)
        if world_size is not None:
            yield from self._wrong_world(world_size)

    def _wrong_values(self) -> Iterator[str]:
        for axis in Mesh.AXES:
            size = getattr(self, axis)
            if not (axis == "dp" and size is None) and (isinstance(size, bool) or size < 1):
                yield f"{axis} is {size!r}, expected a number of ranks, at least 1"
        choices = {
            "zero": (0, 1, 2, 3),
            "cp_method": get_args(Method),
            "hook": (None, *HOOKS),
            "recompute": get_args(Mode),
            "precision": (None, *PRECISION_NAMES),
            "schedule": tuple(SCHEDULES),
        }
        for name, expected in choices.items():
            if getattr(self, name) not in expected:
                wanted = ", ".join(str(each) for each in expected if each is not None)
                yield f"{name} is {getattr(self, name)!r}, expected one of {wanted}"
        if self.microbatches is not None and self.microbatches < 1:
            yield f"microbatches is {self.microbatches}, expected at least 1"

    def _wrong_pairs(self) -> Iterator[str]:
        if self.hook is not None and self.zero > 1:
            yield (
                f"hook {self.hook} with zero {self.zero}: a hook averages whole buckets on every rank, and under ZeRO "
                f"{self.zero} a rank receives its own block only; use zero 0 or 1"
            )
        if self.hook == "local_sgd":
            yield (
                "hook local_sgd averages models between steps, which differ meanwhile: call its state's average() in "
                "a loop of your own"
            )
        if self.sequence and self.tp == 1:
            yield "sequence with tp 1: sequence parallelism shares positions between the ranks of tp; use tp 2 or more"
        if self.cp_method == "ulysses" and self.cp == 1:
            yield "cp_method ulysses with cp 1: it exchanges heads between the ranks of cp; use cp 2 or more"

    def _wrong_pipeline(self, layers: int | None, rows: int | None) -> Iterator[str]:
        if self.pp == 1:
            if self.schedule != Layout.schedule or self.microbatches is not None:
                yield "a schedule or microbatches with pp 1: they are a pipeline's; use pp 2 or more, or accumulate"
            return
        try:
            stages = self.pipeline_schedule().stages
        except InvalidArgument as error:
            yield str(error).removeprefix("pipeline: ")
            return
        if layers is not None and stages > layers:
            yield f"schedule {self.schedule} with pp {self.pp} has {stages} stages, more than the {layers} layers"
        if rows is not None and rows % self.microbatch_count:
            yield f"{self.microbatch_count} microbatches do not divide the {rows} samples of a rank"

    @property
    def microbatch_count(self) -> int:
        """Of one pass through the pipeline; 1 where there is none."""
        return (1 if self.pp == 1 else 2 * self.pp) if self.microbatches is None else self.microbatches

    def pipeline_schedule(self) -> PipelineSchedule:
        """What the ranks of pp run. Raises InvalidArgument where the schedule cannot have these numbers."""
        return build(self.schedule, ranks=self.pp, microbatches=self.microbatch_count)

    def _wrong_model(self, heads: int | None, kv_heads: int | None, vocabulary: int | None) -> Iterator[str]:
        for count, what in ((heads, "heads"), (kv_heads, "key-value heads")):
            if count is None:
                continue
            if count % self.tp:
                yield f"tp {self.tp} does not divide the {count} {what}, which are cut between its ranks"
            elif self.cp_method == "ulysses" and count // self.tp % self.cp:
                yield (
                    f"cp {self.cp} does not divide the {count // self.tp} {what} of a rank of tp, which ulysses "
                    "exchanges; use cp_method ring"
                )
        if vocabulary is not None and vocabulary < self.tp:
            yield f"tp {self.tp} is more than the vocabulary of {vocabulary}, which is cut between its ranks"

    def _wrong_length(self, length: int) -> Iterator[str]:
        if self.cp > 1 and length % (2 * self.cp):
            yield (
                f"sequences of {length} positions with cp {self.cp}: each rank takes two of {2 * self.cp} equal "
                f"chunks; expected a multiple of {2 * self.cp}"
            )
        elif self.sequence and length // self.cp % self.tp:
            yield (
                f"sequence with tp {self.tp}: it does not divide the {length // self.cp} positions of a rank of cp "
                f"{self.cp}"
            )

    def _wrong_world(self, world_size: int) -> Iterator[str]:
        sizes = {"cp": self.cp, "tp": self.tp}
        rest = self.pp * self.cp * self.tp
        if self.dp is None and world_size % rest:
            yield f"{product(pp=self.pp, **sizes)} = {rest} does not divide the {world_size} ranks of the job"
        if self.dp is not None and self.dp * rest != world_size:
            whole = product(pp=self.pp, dp=self.dp, **sizes)
            yield f"{whole} = {self.dp * rest} ranks, but the job has {world_size}"

    def mesh(self, comm: Communicator) -> Mesh:
        """The ranks of `comm` on the axes. Raises InvalidArgument where the sizes do not multiply to their number."""
        self.check(world_size=comm.world_size)
        return Mesh(comm, dp=self.dp, cp=self.cp, tp=self.tp, pp=self.pp)

    def spread(
        self,
        model: nn.Module,
        mesh: Mesh,
        plan: Plan | None = None,
        *,
        bucket_bytes: int = 25 * MIB,
        first_bucket_bytes: int = MIB,
        first: Sequence[int] | None = None,
    ) -> DataParallel | Pipeline:
        """`model`, which is changed, on the ranks of mesh(). Collective; every rank gives the same model.

        The order counts: a plan replaces modules, blocks recompute what it made of them, and DataParallel, or Pipeline
        where pp is more than 1, takes its parameters. Raises InvalidArgument as check(), and where the plan does not
        fit the model.

        Args:
            first: the first layer of each stage; None: as many layers in each.
        """
        self.check(world_size=mesh.comm.world_size)
        model = parallelize(model, mesh, plan, sequence=self.sequence, context=self.cp_method)
        options: dict[str, Any] = {
            "bucket_bytes": bucket_bytes, "first_bucket_bytes": first_bucket_bytes, "zero": self.zero,
            "precision": self.precision,
        }  # fmt: skip
        if self.pp > 1:
            return Pipeline(
                model, mesh, self.pipeline_schedule(), first=first, recompute=self.recompute,
                make_hook=None if self.hook is None else partial(self._make_hook, mesh), **options,
            )  # fmt: skip
        recompute(model, self.recompute)
        if self.hook is not None:
            options["state"], options["hook"] = self._make_hook(mesh)
        return DataParallel(model, mesh, **options)

    def _make_hook(self, mesh: Mesh) -> tuple[Any, Any]:
        assert self.hook is not None
        return make_hook(self.hook, mesh.group("dp", "cp"))

    def __str__(self) -> str:
        """What is not the default, as "dp 2, tp 2, zero 3"."""
        default = Layout()
        changed = [name for name in vars(self) if getattr(self, name) != getattr(default, name)]
        return ", ".join(name if getattr(self, name) is True else f"{name} {getattr(self, name)}" for name in changed)
