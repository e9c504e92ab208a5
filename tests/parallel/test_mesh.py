"""The mesh: coordinates, groups and shards of a batch, by 1 to 8 ranks, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ranks import Rank, run_ranks

from paracomm.errors import InvalidArgument
from paracomm.parallel.mesh import Mesh
from paracomm.parallel.shard import Shard, extent, extents, gather_parameter, mark


def stand_in(world_size, rank=0):
    return SimpleNamespace(rank=rank, world_size=world_size, timeout_s=1.0)


def device_mesh(ranks, names):
    return SimpleNamespace(mesh=torch.tensor(ranks), mesh_dim_names=names)


def members(mesh, *axes):
    group = mesh.group(*axes)
    assert group.world_size == mesh.size(*axes)
    assert group.rank == mesh.index(*axes)
    return group.all_gather(torch.tensor([mesh.comm.rank])).flatten().tolist()


def check_groups(rank: Rank) -> None:
    comm = rank.connect()
    mesh = Mesh(comm, cp=2, tp=2)
    r = comm.rank
    assert mesh.coordinates == {"pp": 0, "dp": r // 4, "cp": r // 2 % 2, "tp": r % 2}
    assert members(mesh, "tp") == [r // 2 * 2, r // 2 * 2 + 1]
    assert members(mesh, "dp") == [r % 4, r % 4 + 4]
    assert members(mesh, "cp", "tp") == [r // 4 * 4 + i for i in range(4)]
    assert members(mesh, "tp", "cp") == [r // 4 * 4 + i for i in (0, 2, 1, 3)]
    assert members(mesh, "dp", "cp", "tp") == list(range(8))
    assert members(mesh, "dp", "tp") == [r // 2 % 2 * 2 + i for i in (0, 1, 4, 5)]
    assert members(mesh) == [r]
    assert mesh.group("tp") is mesh.group("tp")
    assert mesh.group("dp", "cp", "tp") is comm
    mesh.close()
    staged = Mesh(comm, pp=2, tp=2)
    assert staged.coordinates == {"pp": r // 4, "dp": r // 2 % 2, "cp": 0, "tp": r % 2}
    assert members(staged, "pp") == [r % 4, r % 4 + 4]
    assert members(staged, "dp", "cp") == [r // 4 * 4 + r % 2 + i for i in (0, 2)]
    staged.close()
    comm.barrier()


def test_groups() -> None:
    run_ranks(8, check_groups, threads=True)


def check_device_mesh(rank: Rank) -> None:
    comm = rank.connect()
    mesh = Mesh.from_device_mesh(device_mesh([[0, 2], [1, 3]], ("tp", "dp")), comm)
    r = comm.rank
    assert mesh.coordinates == {"pp": 0, "dp": r // 2, "cp": 0, "tp": r % 2}
    assert members(mesh, "tp") == [r // 2 * 2, r // 2 * 2 + 1]
    odd = Mesh.from_device_mesh(device_mesh([[3, 1], [0, 2]], ("dp", "tp")), comm)
    assert members(odd, "tp") == ([3, 1] if r in (1, 3) else [0, 2])
    assert members(odd, "dp", "tp") == [3, 1, 0, 2]


def test_device_mesh() -> None:
    run_ranks(4, check_device_mesh)


def test_a_device_mesh_of_torch() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        theirs = torch.distributed.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
        assert Mesh.from_device_mesh(theirs, stand_in(1)).coordinates == {"pp": 0, "dp": 0, "cp": 0, "tp": 0}
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({"tp": 4}, r"tp 4 = 4 does not divide the 6 ranks"),
        ({"dp": 2, "tp": 2}, r"dp 2 x cp 1 x tp 2 = 4 ranks, but the communicator has 6"),
        ({"tp": 0}, r"tp is 0"),
        ({"cp": 1.5}, r"cp is 1\.5"),
    ],
)
def test_refused_sizes(sizes, why) -> None:
    with pytest.raises(InvalidArgument, match=why):
        Mesh(stand_in(6), **sizes)


@pytest.mark.parametrize(
    ("mesh", "why"),
    [
        (device_mesh([[0, 1], [2, 3]], None), "names its dimensions"),
        (device_mesh([[0, 1], [2, 3]], ("dp", "model")), "'model'"),
        (device_mesh([[0, 1], [2, 2]], ("dp", "tp")), "each of the 4 ranks"),
        (device_mesh([0, 1], ("dp",)), "each of the 4 ranks"),
    ],
)
def test_refused_device_meshes(mesh, why) -> None:
    with pytest.raises(InvalidArgument, match=why):
        Mesh.from_device_mesh(mesh, stand_in(4))


def test_unknown_axes() -> None:
    mesh = Mesh(stand_in(4), tp=2)
    for axes in (("ep",), ("tp", "tp")):
        with pytest.raises(InvalidArgument, match="expected some of"):
            mesh.group(*axes)


def test_rows_of_a_batch() -> None:
    x = torch.arange(7)
    parts = [Mesh(stand_in(6, rank), tp=2).shard_rows(x) for rank in range(6)]
    assert [part.tolist() for part in parts] == [[0, 1, 2]] * 2 + [[3, 4]] * 2 + [[5, 6]] * 2


def test_extents_cover_everything_once() -> None:
    for total in range(12):
        for parts in range(1, 6):
            places = [extent(total, parts, index) for index in range(parts)]
            assert [size for _, size in places] == extents(total, parts)
            assert [i for offset, size in places for i in range(offset, offset + size)] == list(range(total))


def check_gather(rank: Rank) -> None:
    mesh = Mesh(rank.connect(), tp=3)
    r = mesh.index("tp")
    whole = torch.arange(7 * 12.0).view(7, 12)
    plain = Shard(0, *extent(7, 3, r))
    fused = Shard(1, 2 * r, 4, 12, pieces=((2 * r, 2), (6 + 2 * r, 2)))
    for shard in (plain, fused):
        parameter = torch.nn.Parameter(shard.take(whole))
        mark(parameter, shard)
        assert torch.equal(gather_parameter(parameter, mesh), whole)
        assert torch.equal(gather_parameter(parameter, mesh, parameter.detach() * 2), whole * 2)
    with pytest.raises(InvalidArgument, match="its parameter"):
        gather_parameter(parameter, mesh, torch.zeros(3))


def test_gather_parameter() -> None:
    run_ranks(3, check_gather)
