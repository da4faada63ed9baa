"""Ranks against one process, over the combinations of ways to spread a model."""

from typing import Any

import pytest

from moe.parallel import Degrees
from moe.verify import VerifyOptions, verify
from tests.verify.trials import small

# degrees, kind of activation checkpointing, options of the verification, options of the MoE layer
Case = tuple[str, str, dict[str, Any], dict[str, Any]]

TWO: list[Case] = [
    ("ep=2", "none", {"accumulate": 1}, {}),
    ("ep=2", "nonreentrant", {"chunks": 3}, {}),
    ("ep=2", "reentrant", {"max_received_tokens": 5}, {}),
    ("ep=2", "none", {}, {"capacity_factor": 1.0, "drop_policy": "position"}),
    ("ep=2", "nonreentrant", {}, {"capacity_factor": 1.5, "shared_hidden_dim": 0, "num_experts": 4}),
    ("ep=1,dp_shard=2", "reentrant", {}, {"activation": "relu_squared", "bias": False}),
    ("dp_shard=1,dp_replicate=2", "none", {"accumulate": 3}, {}),
    ("dp_shard=1,dp_replicate=2,ep=2", "nonreentrant", {}, {"recompute": "up"}),
    ("dp_shard=1,tp=2", "none", {"accumulate": 1}, {}),
    ("dp_shard=1,tp=2,ep=2", "nonreentrant", {"chunks": 2}, {"shared_hidden_dim": 0}),
    ("dp_shard=2,etp=2", "none", {"chunks": 2}, {}),
    ("dp_shard=1,tp=2,etp=2", "reentrant", {}, {"router": "sigmoid", "hidden_dim": 11}),
]
FOUR: list[Case] = [
    ("ep=4", "nonreentrant", {"max_received_tokens": 6}, {}),
    (
        "ep=4",
        "none",
        {},
        {"num_experts": 8, "top_k": 3, "router": {"name": "sigmoid", "num_groups": 4, "top_groups": 2}},
    ),
    ("ep=2,dp_shard=4", "reentrant", {}, {}),
    ("ep=4", "none", {"node_size": 2, "chunks": 2}, {"num_experts": 7, "top_k": 3}),
    ("ep=2,etp=2,dp_shard=4", "nonreentrant", {"node_size": 2, "max_received_tokens": 7}, {}),
    ("ep=2,dp_shard=2,dp_replicate=2", "none", {}, {"capacity_factor": 1.0}),
    ("ep=4,dp_shard=1,dp_replicate=4", "none", {"chunks": 2}, {}),
    ("ep=2,tp=2,dp_shard=2", "nonreentrant", {"max_received_tokens": 4}, {}),
    ("ep=2,tp=2,dp_shard=1,dp_replicate=2", "none", {}, {"top_k": 1, "router": "switch", "shared_gate": True}),
    ("ep=2,etp=2,dp_shard=4", "reentrant", {"chunks": 2}, {}),
    ("etp=4,ep=1,tp=2,dp_shard=2", "none", {}, {}),
]
EIGHT: list[Case] = [
    ("ep=4,dp_shard=4,dp_replicate=2", "nonreentrant", {"accumulate": 1}, {}),
    ("ep=2,etp=2,tp=2,dp_shard=4", "reentrant", {"chunks": 2}, {}),
    ("ep=4,tp=2,dp_shard=2,dp_replicate=2", "none", {"max_received_tokens": 9}, {"capacity_factor": 2.0}),
]
SINGLE: list[Case] = [
    ("ep=2", "nonreentrant", {"dtype": "float32", "chunks": 2}, {}),
    ("ep=2,tp=2,dp_shard=2", "none", {"dtype": "float32"}, {}),
    ("ep=2,etp=2,dp_shard=4", "reentrant", {"dtype": "float32", "max_received_tokens": 8}, {}),
]
PIPELINES: list[Case] = [
    ("pp=2", "none", {"microbatches": 2}, {}),
    ("pp=2", "reentrant", {"stages_per_rank": 2, "dtype": "float32"}, {}),
    # Sequences that begin with the same token compete with equal scores; which of them rounds up must not depend on the
    # batch that it is in.
    ("pp=2,dp_shard=2", "nonreentrant", {"accumulate": 3}, {"capacity_factor": 1.5, "batch_invariant": True}),
    ("pp=2,ep=2", "none", {"stages_per_rank": 2, "microbatches": 4}, {"shared_hidden_dim": 0}),
    ("pp=2,dp_shard=1,dp_replicate=2,ep=2", "none", {"chunks": 2}, {}),
    ("pp=2,dp_shard=1,tp=2,ep=2", "nonreentrant", {"max_received_tokens": 5}, {}),
    ("pp=2,etp=2", "none", {"stages_per_rank": 2}, {"router": "sigmoid"}),
    ("pp=4", "nonreentrant", {"microbatches": 6}, {"top_k": 1, "router": "switch"}),
]
PIPELINES_OF_EIGHT: list[Case] = [
    ("pp=2,ep=2,tp=2,dp_shard=2", "nonreentrant", {"stages_per_rank": 2, "max_received_tokens": 6}, {}),
    ("pp=4,ep=2", "reentrant", {"chunks": 2}, {}),
    ("pp=2,ep=2,etp=2,dp_shard=2,dp_replicate=2", "none", {}, {}),
]
EIGHT += PIPELINES_OF_EIGHT
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in EIGHT]


@pytest.mark.parametrize(("degrees", "checkpointing", "options", "layer"), [*TWO, *FOUR, *SLOW, *SINGLE, *PIPELINES])
def test_ranks_compute_what_one_process_computes(
    degrees: str, checkpointing: str, options: dict[str, Any], layer: dict[str, Any]
) -> None:
    chosen = VerifyOptions(**{"steps": 2, **options})
    assert chosen.allowed <= 1e-5
    parsed = Degrees.parse(degrees)
    # A pipeline cannot have tied embeddings, and interleaves only with four layers.
    decoder = {"num_layers": 4} if parsed.pp > 1 else {"tie_embeddings": True}
    report = verify(parsed, small(checkpointing, decoder, **layer), chosen, reference=small("none", decoder, **layer))
    assert report.ok, str(report)
    assert all("expert 0 got" in line and "every expert got some" not in line for line in report.routing)


def test_the_matrix_is_as_wide_as_it_should_be() -> None:
    cases = [*TWO, *FOUR, *EIGHT, *SINGLE, *PIPELINES]
    assert len(cases) >= 20
    assert {Degrees.parse(case[0]).world_size for case in cases} == {2, 4, 8}
