"""The sum of sparse tensors, as DistributedDataParallel needs it for embeddings with sparse=True."""

from __future__ import annotations

from typing import Any

import torch

from paracomm.comm import Communicator
from paracomm.errors import InvalidArgument


def all_reduce(comm: Communicator, tensor: torch.Tensor, op: str, timeout_s: float | None) -> None:
    """Sums COO tensors of one shape: their entries are gathered, and each rank adds them up in the same order."""
    if tensor.layout != torch.sparse_coo or op != "sum":
        raise InvalidArgument(f"all_reduce: {op} of a tensor of layout {tensor.layout} is not supported, COO sums are")
    with torch.no_grad():
        own = tensor.detach().coalesce()
        indices, values = own.indices(), own.values()
        entries = comm.all_gather(torch.tensor([indices.shape[1]]), timeout_s=timeout_s).ravel().tolist()
        # One row an entry, so that rows of all ranks follow each other.
        everybodys = _gather(comm, indices.t().contiguous(), entries, timeout_s)
        sums = _gather(comm, values.contiguous(), entries, timeout_s)
        total = torch.sparse_coo_tensor(everybodys.t(), sums, tensor.shape).coalesce()
        tensor.copy_(total)


def _gather(comm: Communicator, rows: torch.Tensor, counts: list[int], timeout_s: float | None) -> Any:
    out = rows.new_empty((sum(counts), *rows.shape[1:]))
    comm.all_gather_v(rows, out=out, rows=counts, timeout_s=timeout_s)
    return out
