"""Degrees: how they are read, which fit together, and where every rank stands."""

import itertools

import pytest

from moe.errors import ConfigError
from moe.parallel.degrees import DENSE_AXES, EXPERT_AXES, Degrees, coordinates, rank_table


@pytest.mark.parametrize(
    ("spec", "world_size", "dp_shard"),
    [
        ("", None, 1),
        ("ep=2", None, 2),
        ("ep=2,tp=2", None, 2),
        ("ep=2,etp=2", None, 4),
        ("ep=2, tp=2", 8, 4),
        ("pp=2,dp_replicate=2,ep=4", 32, 8),
        ("ep=4,dp_shard=1,dp_replicate=4", 4, 1),
        ({"ep": 2, "dp_shard": 2}, 2, 2),
    ],
)
def test_parse(spec: str | dict[str, int], world_size: int | None, dp_shard: int) -> None:
    degrees = Degrees.parse(spec, world_size)
    assert degrees.dp_shard == dp_shard
    assert world_size is None or degrees.world_size == world_size


@pytest.mark.parametrize(
    ("spec", "world_size", "message"),
    [
        ("dp=2", None, r"dp='?2'? is no axis; choose from pp, dp_replicate, dp_shard, tp, ep, etp"),
        ("ep", None, "ep='' must be a whole number"),
        ("ep=two", None, "ep='two' must be a whole number"),
        ("ep=2.0", None, "ep='2.0' must be a whole number"),
        ("ep=-2", None, "ep='-2' must be a whole number"),
        ("ep=2,ep=4", None, "ep is given twice"),
        ("ep=0", None, "ep=0 must be positive"),
        ("tp=0,dp_shard=2", None, "tp=0 must be positive"),
        ({"ep": 2.5}, None, "ep=2.5 must be a whole number"),
        ({"ep": True}, None, "ep=True must be a whole number"),
        ("tp=3", 8, "pp=1 .* tp=3 = 3 does not divide the 8 ranks there are"),
        ("dp_shard=4,tp=2", 6, "dp_shard=4 .* = 8 ranks, but there are 6"),
        ("ep=3", 4, r"ep=3 \* etp=1 = 3 ranks hold all experts once; that must divide dp_shard=4"),
        ("ep=3,dp_shard=2,dp_replicate=3", None, "or be a multiple of it that divides dp_replicate=3"),
    ],
)
def test_bad_degrees_are_refused(spec: str | dict[str, int], world_size: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Degrees.parse(spec, world_size)


def all_degrees(limit: int) -> list[Degrees]:
    """Every one of up to so many ranks that is not refused."""
    found = []
    for shape in itertools.product(range(1, limit + 1), repeat=6):
        if shape[0] * shape[1] * shape[2] * shape[3] <= limit:
            try:
                found.append(Degrees(*shape))
            except ConfigError:
                continue
    return found


def test_experts_take_all_ranks_of_a_stage_and_replicas_divide_none() -> None:
    degrees = all_degrees(6)
    assert len(degrees) > 100
    for each in degrees:
        assert each.edp * each.ep * each.etp == each.dp * each.tp
        assert each.edp_replicate * each.edp_shard == each.edp
        held = each.ep * each.etp
        # Within a replica of the dense part, or over whole ones.
        assert each.edp_shard == 1 or each.edp_shard * held == each.dp_shard * each.tp


def test_every_rank_has_an_address_of_its_own_on_both_meshes() -> None:
    for degrees in all_degrees(6):
        for shape in (degrees.dense_shape, degrees.expert_shape):
            addresses = [tuple(coordinates(rank, shape).values()) for rank in range(degrees.world_size)]
            assert addresses == sorted(itertools.product(*(range(size) for size in shape.values())))


def test_table() -> None:
    lines = rank_table(Degrees(dp_shard=2, tp=2, ep=4)).splitlines()
    assert lines[0].split() == ["rank", *DENSE_AXES, *EXPERT_AXES[1:]]
    assert [line.split() for line in lines[1:]] == [
        #        rank pp rep shd tp  rep shd ep etp
        list("000000000"),
        list("100010010"),
        list("200100020"),
        list("300110030"),
    ]


def test_words() -> None:
    assert str(Degrees()) == "one rank"
    assert str(Degrees(dp_shard=4, ep=2)) == "dp_shard=4,ep=2"
    assert Degrees.parse(str(Degrees(dp_shard=4, ep=2))) == Degrees(dp_shard=4, ep=2)
