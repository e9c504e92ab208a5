"""The ranks of a run as a box with named axes, and a communicator for each of its lines and planes.

    pp  pipeline parallel: each has its own layers                   (outermost: it sends the least)
    dp  data parallel: each sees its own rows of the batch
    cp  context parallel: each sees its own positions of a sequence
    tp  tensor parallel: each holds its own columns, rows and heads  (innermost: neighbours, one host)

With pp=1, dp=2, cp=1, tp=2, ranks 0 1 | 2 3: group("tp") of rank 2 is [2, 3], group("dp") is [0, 2].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from paracomm.comm import Communicator, connect
from paracomm.errors import InvalidArgument
from paracomm.parallel.shard import extent

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def product(**sizes: int) -> str:
    """ "dp 2 x cp 1 x tp 2"; a pipeline is named where there is one."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if axis != "pp" or size > 1)


class Mesh:
    """All ranks of `comm` on the axes pp, dp, cp and tp, of which the last one runs fastest.

    Args:
        dp: its size; None: what the others leave.

    Attributes:
        comm: the communicator of all ranks.
        coordinates: this rank's index on each axis.

    Raises InvalidArgument if the sizes do not multiply to the number of ranks.
    """

    AXES: ClassVar[tuple[str, ...]] = ("pp", "dp", "cp", "tp")

    def __init__(self, comm: Communicator, *, dp: int | None = None, cp: int = 1, tp: int = 1, pp: int = 1) -> None:
        world_size = comm.world_size
        given = {"pp": pp, "dp": dp, "cp": cp, "tp": tp}
        for axis, size in given.items():
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise InvalidArgument(f"Mesh: {axis} is {size!r}, expected a number of ranks, at least 1")
        rest = pp * cp * tp
        if dp is None:
            if world_size % rest:
                raise InvalidArgument(
                    f"Mesh: {product(pp=pp, cp=cp, tp=tp)} = {rest} does not divide the {world_size} ranks of the "
                    "communicator"
                )
            dp = world_size // rest
        if dp * rest != world_size:
            raise InvalidArgument(
                f"Mesh: {product(pp=pp, dp=dp, cp=cp, tp=tp)} = {dp * rest} ranks, but the communicator has "
                f"{world_size}"
            )
        self._build(comm, torch.arange(world_size).view(pp, dp, cp, tp))

    def _build(self, comm: Communicator, ranks: Tensor) -> None:
        self.comm = comm
        self._sizes = dict(zip(self.AXES, ranks.shape, strict=True))
        self._groups: dict[tuple[str, ...], Communicator] = {}
        where = (ranks == comm.rank).nonzero()[0].tolist()
        self.coordinates: dict[str, int] = dict(zip(self.AXES, where, strict=True))
        self._in_rank_order = bool((ranks.flatten() == torch.arange(ranks.numel())).all())

    @classmethod
    def from_device_mesh(cls, device_mesh: DeviceMesh, comm: Communicator) -> Mesh:
        """The same mesh as torch's, whose dimensions are named "pp", "dp", "cp" or "tp", in any order.

        `comm`'s ranks are those of torch's world. Raises InvalidArgument for dimensions without a name or with another
        one, and for a mesh that does not hold every rank once.
        """
        names = tuple(device_mesh.mesh_dim_names or ())
        ranks = device_mesh.mesh.cpu()
        if len(names) != ranks.dim() or len(set(names)) != len(names) or not set(names) <= set(cls.AXES):
            raise InvalidArgument(f"Mesh: the DeviceMesh names its dimensions {names}, expected some of {cls.AXES}")
        if sorted(ranks.flatten().tolist()) != list(range(comm.world_size)):
            raise InvalidArgument(
                f"Mesh: the DeviceMesh of shape {tuple(ranks.shape)} does not hold each of the {comm.world_size} ranks "
                "of the communicator once"
            )
        ours = [axis for axis in cls.AXES if axis in names]
        ranks = ranks.permute([names.index(axis) for axis in ours])
        sizes = dict(zip(ours, ranks.shape, strict=True))
        mesh = cls.__new__(cls)
        mesh._build(comm, ranks.reshape([sizes.get(axis, 1) for axis in cls.AXES]))
        return mesh

    def _check(self, axes: Sequence[str]) -> None:
        if len(set(axes)) != len(axes) or not set(axes) <= set(self.AXES):
            raise InvalidArgument(f"Mesh: axes {tuple(axes)}, expected some of {self.AXES}, each at most once")

    def size(self, *axes: str) -> int:
        """Ranks in a group over `axes`; of no axis, 1."""
        self._check(axes)
        return math.prod(self._sizes[axis] for axis in axes)

    def index(self, *axes: str) -> int:
        """This rank's place in its group over `axes`, of which the last one runs fastest."""
        self._check(axes)
        index = 0
        for axis in axes:
            index = index * self._sizes[axis] + self.coordinates[axis]
        return index

    def group(self, *axes: str) -> Communicator:
        """The communicator of the ranks that differ from this one on `axes` only, in the order of index(*axes).

        The first call for some axes is collective over the whole mesh; later ones give the same communicator. A group
        of one is a communicator of one rank.
        """
        self._check(axes)
        key = tuple(axis for axis in axes if self._sizes[axis] > 1)
        if key not in self._groups:
            self._groups[key] = self._split(key)
            self._groups[key].name = self._groups[key].name or "+".join(key)
        return self._groups[key]

    def _split(self, axes: tuple[str, ...]) -> Communicator:
        if not axes:
            return connect(0, 1, lambda blob: [blob], transport="local", timeout_s=self.comm.timeout_s)
        others = tuple(axis for axis in self.AXES if axis not in axes)
        inside = tuple(axis for axis in self.AXES if axis in axes)
        if self.size(*others) == 1 and inside == axes and self._in_rank_order:
            return self.comm
        group = self.comm.split(self.index(*others), self.index(*axes))
        assert group is not None
        return group

    def shard_rows(self, x: Any) -> Any:
        """This dp rank's rows of `x` [B, ...], the same on every rank; the first B % dp ranks have one more."""
        offset, size = extent(x.shape[0], self._sizes["dp"], self.coordinates["dp"])
        return x[offset : offset + size]

    def shard(self, x_BT: Tensor) -> Tensor:
        """This rank's part of a global batch [B, T, ...]: rows over dp, positions over cp."""
        rows = self.shard_rows(x_BT)
        if self._sizes["cp"] == 1:
            return rows
        from paracomm.parallel.context import context_positions

        positions = context_positions(x_BT.shape[1], self._sizes["cp"], self.coordinates["cp"])
        return rows[:, positions]

    def close(self) -> None:
        """Closes the groups that it made; `comm` stays open."""
        for group in self._groups.values():
            if group is not self.comm:
                group.close()
        self._groups = {}

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Mesh({product(**self._sizes)}, rank {self.comm.rank} at {self.coordinates})"
