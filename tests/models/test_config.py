"""What a DecoderConfig refuses, and which layers it makes MoE layers."""

import math

import pytest

from moe.errors import ConfigError
from moe.routing import SoftmaxRouter

MOE = {"hidden_dim": 8, "num_experts": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be positive"),
        ({"dim": 0}, "dim=0 must be positive"),
        ({"num_layers": 0}, "num_layers=0 must be positive"),
        ({"num_heads": -1}, "num_heads=-1 must be positive"),
        ({"num_kv_heads": 0}, "num_kv_heads=0 must be positive"),
        ({"ffn_hidden_dim": 0}, "ffn_hidden_dim=0 must be positive"),
        ({"max_seq_len": 0}, "max_seq_len=0 must be positive"),
        ({"moe_every": 0}, "moe_every=0 must be positive"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be positive"),
        ({"norm_eps": math.nan}, "norm_eps=nan must be finite"),
        ({"first_dense": -1}, "first_dense=-1 must be at least 0"),
        ({"dim": 30}, "dim=30 is not a multiple of num_heads=4"),
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"dim": 20}, "dim=20 over num_heads=4 gives heads of 5; rotary embedding turns pairs"),
        ({"moe": {**MOE, "dim": 24}}, "moe has dim=24"),
        ({"moe": {"num_experts": 4}}, "does not fit moe.MoE: missing a required argument: 'hidden_dim'"),
        ({"moe": {**MOE, "topk": 1}}, "does not fit moe.MoE: got an unexpected keyword argument 'topk'"),
        ({"moe": MOE, "first_dense": 3}, "first_dense=3 leaves none of num_layers=3"),
    ],
)
def test_a_bad_value_is_named(small_config, changes, message):
    with pytest.raises(ConfigError) as error:
        small_config(**changes)
    assert message in str(error.value)


def test_a_router_object_is_refused_because_layers_would_share_it(small_config):
    with pytest.raises(ConfigError, match=r"router=SoftmaxRouter\(...\), a module, which all MoE layers would share"):
        small_config(moe={**MOE, "router": SoftmaxRouter(24, 4, 2)})


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, ()),
        ({"first_dense": 1, "moe_every": 2}, ()),
        ({"moe": MOE}, (0, 1, 2, 3, 4, 5)),
        ({"moe": MOE, "first_dense": 2}, (2, 3, 4, 5)),
        ({"moe": MOE, "first_dense": 1, "moe_every": 2}, (1, 3, 5)),
        ({"moe": MOE, "moe_every": 4}, (0, 4)),
        ({"moe": MOE, "first_dense": 5, "moe_every": 9}, (5,)),
    ],
)
def test_moe_layers_follow_the_rule(small_config, changes, layers):
    assert small_config(num_layers=6, **changes).moe_layers == layers
