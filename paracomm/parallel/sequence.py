"""Multiplications that a collective follows or precedes, cut into pieces so that both go on at once.

A tensor-parallel layer is a column product, whose output lies on the ranks by columns, then a row product, whose
outputs are to be summed (Shoeybi et al., "Megatron-LM", 2019). Around them activations are whole on every rank, or,
with sequence parallelism, sharded over the positions T (Korthikanti et al., "Reducing Activation Recomputation", 2022):

    activations   column, forward      column, backward         row, forward             row, backward
    whole         -                    dx: all_reduce           y: all_reduce            -
    sharded       x: all_gather        dx: reduce_scatter       y: reduce_scatter        dy: all_gather

Bytes per rank and layer are equal: an all_reduce is a reduce_scatter and an all_gather. Each of the four is cut into
pieces, here three, by rows:

    the wire      | gather 0 | gather 1   | gather 2   |             |           | sum 0    | sum 1    | sum 2 |
    the cores                | multiply 0 | multiply 1 | multiply 2  |  multiply 0 | multiply 1 | multiply 2 |

Everything here is a matrix of rows x features. With sharded activations rows are in the order (t, b), so that a rank's
positions are one block of rows, and a piece is the same rows of every rank's block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from paracomm.comm import Communicator
from paracomm.parallel.shard import extent

PIECE_BYTES = 1 << 20
MOST_PIECES = 4
Rows = Sequence[slice]


def pieces_of(nbytes: int, rows: int, chunks: int | None) -> int:
    """Into how many pieces `nbytes` on the wire, or `rows` of a rank, are cut; `chunks` None: by size."""
    wanted = min(MOST_PIECES, nbytes // PIECE_BYTES) if chunks is None else chunks
    return max(1, min(wanted, rows))


def gather_and_multiply(
    group: Communicator, x: Tensor, matrices: Sequence[Tensor], biases: Sequence[Tensor | None], chunks: int | None
) -> tuple[Tensor, list[Tensor]]:
    """Every rank's x [n, K] as one X [N, K], and X @ matrix [K, O] + bias [O] for each, [N, O]."""
    x = x.contiguous()
    X = x.new_empty(group.world_size * x.shape[0], x.shape[1])
    products = [x.new_empty(X.shape[0], matrix.shape[1]) for matrix in matrices]
    for rows in _gathered(group, x, X, chunks):
        for product, matrix, bias in zip(products, matrices, biases, strict=True):
            for r in rows:
                _multiply(X[r], matrix, bias, product[r])
    return X, products


def _gathered(group: Communicator, x: Tensor, X: Tensor, chunks: int | None) -> Iterator[Rows]:
    """Fills X piece by piece; yields the rows that have come."""
    n, ranks = x.shape[0], group.world_size
    count = pieces_of(X.nbytes, n, chunks)
    if count == 1:
        group.all_gather(x, out=X)
        yield [slice(0, X.shape[0])]
        return
    cuts = [extent(n, count, piece) for piece in range(count)]
    works = [group.all_gather(x[offset : offset + size], async_op=True) for offset, size in cuts]
    for (offset, size), work in zip(cuts, works, strict=True):
        X.view(ranks, n, -1)[:, offset : offset + size] = work.wait()
        yield [slice(r * n + offset, r * n + offset + size) for r in range(ranks)]


class Reduction:
    """The sum over terms of X [N, K] @ matrix [K, O], then over the ranks: started; wait() gives it.

    It is [N, O] on every rank or, scattered, this rank's block of rows [N / ranks, O].
    """

    def __init__(
        self, group: Communicator, terms: Sequence[tuple[Tensor, Tensor]], scatter: bool, chunks: int | None
    ) -> None:
        first, matrix = terms[0]
        N, ranks = first.shape[0], group.world_size
        n = N // ranks if scatter else N
        self._result = first.new_empty(n, matrix.shape[1])
        self._works: list[Any] = []
        count = pieces_of(N * matrix.shape[1] * first.element_size(), n, chunks)
        for offset, size in (extent(n, count, piece) for piece in range(count)):
            mine = self._result[offset : offset + size]
            if not scatter:
                _sum_of_products(terms, slice(offset, offset + size), mine)
                self._works.append(group.all_reduce(mine, async_op=True))
                continue
            everyones = first.new_empty(ranks, size, matrix.shape[1])
            if count == 1:
                _sum_of_products(terms, slice(0, N), everyones.view(N, -1))
            else:
                for r in range(ranks):
                    _sum_of_products(terms, slice(r * n + offset, r * n + offset + size), everyones[r])
            self._works.append(group.reduce_scatter(everyones.view(ranks * size, -1), out=mine, async_op=True))

    def wait(self) -> Tensor:
        """The sum; errors of the communication are raised here."""
        for work in self._works:
            work.wait()
        return self._result


def _sum_of_products(terms: Sequence[tuple[Tensor, Tensor]], rows: slice, out: Tensor) -> None:
    (first, matrix), *others = terms
    torch.mm(first[rows], matrix, out=out)
    for x, matrix in others:
        out.addmm_(x[rows], matrix)


def _multiply(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, matrix, out=out)
    else:
        torch.addmm(bias, x, matrix, out=out)
