"""PowerSGD: every gradient matrix M is averaged as a product of two thin ones (Vogels et al., NeurIPS 2019).

    P = M Q           mean of P over the ranks, by all-reduce
    P = orthogonal basis of P
    Q = M^T P         mean of Q over the ranks, by all-reduce
    M ~ P Q^T         on every rank alike; Q is where the next step starts from

    elements a rank sends: 2 (n-1)/n x rank x (rows + columns) instead of 2 (n-1)/n x rows x columns

Vectors, and matrices that would not shrink, are averaged as they are, in the first message. The batched form takes a
whole bucket as one square matrix: fewer and larger products, a coarser approximation.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paracomm.errors import InvalidArgument
from paracomm.hooks.state import Bucket, Finish, HookState, ddp_hook, state_for


@dataclass(frozen=True)
class Matrix:
    """A part of a bucket seen as [rows, columns]; `count` of its elements exist, the rest are zeros."""

    key: str
    low: int
    count: int
    rows: int
    columns: int

    def of(self, flat: Tensor) -> Tensor:
        """The matrix [rows, columns] in `flat`: a view of it, or a padded copy."""
        piece = flat[self.low : self.low + self.count]
        if self.count < self.rows * self.columns:
            piece = torch.nn.functional.pad(piece, (0, self.rows * self.columns - self.count))
        return piece.view(self.rows, self.columns)


class PowerSGDState(HookState):
    """Approximation by matrices of rank `rank`.

    Args:
        batched: each bucket is one square matrix, instead of each parameter one of its own.
        start_step: steps that are averaged exactly before the first approximation.
        least_saving: a matrix is approximated only where that sends so many times fewer elements.
        seed: of the first Q; the same on all ranks.

    With the gradient g and the residual e of each rank, and M = mean(g + e): ||result - M|| <= ||M|| (Frobenius, for
    each matrix), and 0 to rounding where M's rank is at most `rank`. Vectors and small matrices are exact.

    Raises InvalidArgument for a rank below 1 or start_step below 0.
    """

    two_messages = True

    def __init__(
        self,
        where: Any = None,
        *,
        rank: int = 4,
        batched: bool = False,
        start_step: int = 0,
        least_saving: float = 2.0,
        seed: int = 0,
        model: nn.Module | None = None,
        feedback: bool = True,
    ) -> None:
        if rank < 1 or start_step < 0:
            raise InvalidArgument(f"PowerSGDState: rank {rank} and start_step {start_step}, expected from 1 and 0 on")
        self.rank, self.batched, self.start_step, self.least_saving = rank, batched, start_step, least_saving
        self.seed = seed
        self._q: dict[str, Tensor] = {}
        super().__init__(where, model=model, feedback=feedback)

    def matrices(self, bucket: Bucket) -> list[Matrix]:
        """The matrices of a bucket that are worth approximating."""
        found = self._parameters(bucket)
        if self.batched:
            count = bucket.buffer().numel()
            side = math.isqrt(count - 1) + 1 if count else 0
            found = [Matrix("+".join(m.key for m in found), 0, count, side, side)]
        return [m for m in found if (m.rows + m.columns) * self.rank * self.least_saving <= m.count]

    def _parameters(self, bucket: Bucket) -> list[Matrix]:
        """Every parameter, where it lies: our own buckets have gaps between them."""
        names, buffer, found = self.names.of(bucket), bucket.buffer(), []
        for name, parameter, gradient in zip(names, bucket.parameters(), bucket.gradients(), strict=True):
            rows = parameter.shape[0] if parameter.dim() > 1 else parameter.numel()
            columns = parameter.numel() // max(1, rows)
            low = int(gradient.storage_offset() - buffer.storage_offset())
            found.append(Matrix(name, low, parameter.numel(), rows, columns))
        return found

    def start(self, bucket: Bucket) -> Finish:
        buffer = bucket.buffer()
        matrices = [] if self.steps < self.start_step else self.matrices(bucket)
        if not matrices:
            return self.start_exact(bucket)
        if self.memory is None:
            y = buffer.to(torch.float32, copy=True)
        else:
            y = self.memory.flat(bucket)
            y += buffer
        gaps, unused = _between(matrices, y.numel()), _between(self._parameters(bucket), y.numel())
        rest = torch.cat([y[low:high] for low, high in gaps])
        products = [m.of(y) @ self._start_q(m, y.device) for m in matrices]
        first = torch.cat([rest, *(p.flatten() for p in products)])
        work = self.wire.average(first)

        def finish() -> Tensor:
            work.wait()
            parts = first.split([rest.numel(), *(p.numel() for p in products)])
            bases = [_orthogonal(part.view_as(p)) for part, p in zip(parts[1:], products, strict=True)]
            turned = [m.of(y).T @ basis for m, basis in zip(matrices, bases, strict=True)]
            second = torch.cat([q.flatten() for q in turned])
            self.second.average(second).wait()
            result = torch.empty_like(y)
            for (low, high), piece in zip(gaps, parts[0].split([high - low for low, high in gaps]), strict=True):
                result[low:high] = piece
            ends = second.split([q.numel() for q in turned])
            for m, basis, q, flat in zip(matrices, bases, turned, ends, strict=True):
                self._q[m.key] = flat.view_as(q).clone()
                result[m.low : m.low + m.count] = (basis @ self._q[m.key].T).flatten()[: m.count]
            for low, high in unused:  # which a bucket's one matrix takes along, and which has no place in a checkpoint
                result[low:high] = 0.0
            if self.memory is not None:
                y.sub_(result)
                for low, high in gaps + unused:
                    y[low:high] = 0.0
                torch.nan_to_num_(y, 0.0, 0.0, 0.0)  # an overflow must not stay
            return buffer.copy_(result)

        return finish

    def _start_q(self, matrix: Matrix, device: torch.device) -> Tensor:
        """The last step's Q [columns, rank], orthogonalised; at first the same random one on every rank."""
        rank = min(self.rank, matrix.rows, matrix.columns)
        q = self._q.get(matrix.key)
        if q is None or q.shape != (matrix.columns, rank) or not bool(q.isfinite().all()):
            generator = torch.Generator().manual_seed(self.seed + zlib.crc32(matrix.key.encode()))
            q = torch.randn(matrix.columns, rank, generator=generator)
        return _orthogonal(q.to(device))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"q": {key: q.clone() for key, q in self._q.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._q = {key: q.detach().clone().float() for key, q in state["q"].items()}


def _between(matrices: list[Matrix], count: int) -> list[tuple[int, int]]:
    """Where a bucket of `count` elements holds no matrix: (low, high), one more than there are matrices."""
    ends = [0, *(m.low + m.count for m in matrices)]
    return list(zip(ends, [*(m.low for m in matrices), count], strict=True))


def _orthogonal(x: Tensor) -> Tensor:
    """An orthonormal basis, of the shape of x, of a space that holds x's columns. x's NaN is all of the result's."""
    if not bool(x.isfinite().all()):
        return torch.full_like(x, torch.nan)
    return torch.linalg.qr(x).Q


@ddp_hook
def powersgd_hook(state: Any, bucket: Bucket) -> Any:
    """PowerSGD, a matrix a parameter. `state`: a PowerSGDState, a process group (None: the default), a Communicator."""
    return state_for(PowerSGDState, state).run(bucket)


@ddp_hook
def batched_powersgd_hook(state: Any, bucket: Bucket) -> Any:
    """PowerSGD, a matrix a bucket. `state`: as powersgd_hook's; a PowerSGDState decides itself."""
    return state_for(PowerSGDState, state, batched=True).run(bucket)
