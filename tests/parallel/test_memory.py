"""The formula of docs/memory.md, held to the storages that are alive at rest and at the peak of a step."""

from __future__ import annotations

import gc

import pytest
import torch
from ranks import Rank, run_ranks

from paracomm.models.gpt import GPT, GPTConfig, next_byte_loss
from paracomm.parallel import DataParallel

CONFIG = GPTConfig(width=64, depth=6, heads=2, context=16)
BUCKET_BYTES = 100_000


def alive() -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors that Python knows, by address; those that torch.compile left of others have none."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    tensors = [each for each in gc.get_objects() if type(each) in kinds and not each.is_sparse]
    return {s.data_ptr(): s for s in (tensor.untyped_storage() for tensor in tensors)}


def measure(rank: Rank, zero: int, precision: str | None):
    comm = rank.connect()
    before = alive()  # of the process that this one was forked from; holding on to them keeps their addresses taken
    parallel = DataParallel(
        GPT(CONFIG), comm, zero=zero, precision=precision, bucket_bytes=BUCKET_BYTES, first_bucket_bytes=BUCKET_BYTES
    )
    optimizer = parallel.optimizer(torch.optim.AdamW, lr=1e-3)
    peak: dict[str, int] = {}

    def note(*_) -> None:
        found = parallel.bytes_held(optimizer)
        for kind, held in (found | {"all": sum(found.values())}).items():
            peak[kind] = max(peak.get(kind, 0), held)

    for parameter in parallel.module.parameters():
        parameter.register_post_accumulate_grad_hook(note)
    for module in parallel.module.modules():
        module.register_forward_pre_hook(note)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randint(0, 256, (1, 17), generator=torch.Generator().manual_seed(comm.rank))
        next_byte_loss(parallel(x[:, :-1]).float(), x[:, 1:]).backward()
        parallel.finish()
        parallel.clip_(1.0)
        optimizer.step()
        note()
    held = sum(parallel.bytes_held(optimizer).values())
    del x
    sizes = [p.numel() for p in parallel.module.parameters()]
    units = [sum(p.numel() for p in block.parameters()) for block in parallel.module.blocks]
    largest = max(sum(p.numel() for p in bucket.members) for bucket in parallel.reducer.buckets)
    known = sum(storage.nbytes() for address, storage in alive().items() if address not in before)
    return peak, held, known, (sum(sizes), max(units), sum(sizes) - sum(units), largest)


def formula(zero, n, mixed, elements, unit, root, bucket):
    """docs/memory.md, with AdamW."""
    w, m, s = (2, 4, 8) if mixed else (4, 4, 8)
    share = 1 if zero == 0 else 1 / n
    masters = mixed * m * elements * share
    parameters = w * elements + masters if zero < 3 else m * elements / n + w * (root + 2 * unit)
    gradients = w * elements + masters if zero < 2 else m * elements / n + 3 * w * bucket + w * root * (zero == 3)
    return {"parameters": parameters, "gradients": gradients, "optimizer": s * elements * share}


@pytest.mark.parametrize("precision", [None, pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_rank_holds_what_the_formula_says(zero, precision):
    for peak, held, known, sizes in run_ranks(4, measure, zero, precision):
        expected = formula(zero, 4, precision is not None, *sizes)
        expected["all"] = sum(expected.values())
        found = {kind: peak[kind] / expected[kind] for kind in expected}
        # Three buckets of unequal sizes are less than three of the largest.
        allowed = dict.fromkeys(expected, 0.05) | {"gradients": 0.1}
        assert all(abs(found[kind] - 1) < allowed[kind] for kind in expected), (zero, precision, found)
        assert 0.95 < held / known < 1.0001, "Python knows tensors that bytes_held() does not"
        assert held <= peak["all"]
