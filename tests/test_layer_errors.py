"""What the layer says to wrong options and wrong tensors."""

import pytest
import torch

import moe
from moe.errors import ConfigError, DtypeError, ShapeError


def make(dim=8, hidden_dim=16, num_experts=6, top_k=2, **options):
    return moe.MoE(dim, hidden_dim, num_experts, top_k, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k=0 must be between 1 and num_experts=6"),
        ({"top_k": 7}, "top_k=7 must be between 1 and num_experts=6"),
        ({"dim": 0}, "dim=0 must be positive"),
        ({"hidden_dim": -4}, "hidden_dim=-4 must be positive"),
        ({"num_experts": 0}, "num_experts=0 must be positive"),
        ({"router": "sofmax"}, "router='sofmax' is unknown.*did you mean 'softmax'"),
        (
            {"router": {"name": "softmax", "temperature": 2}},
            "router='softmax' does not take these options.*temperature",
        ),
        ({"router": {"normalize": True}}, "router='None' is unknown"),
        ({"activation": "elu"}, "activation='elu' is unknown"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be positive"),
        ({"drop_policy": "random"}, "drop_policy='random' is unknown; choose one of position, probability"),
        ({"capacity_factor": "1.25"}, "capacity_factor='1.25' must be a number"),
        ({"top_k": 1.5}, "top_k=1.5 must be a whole number"),
        ({"num_experts": 4.5}, "num_experts=4.5 must be a whole number"),
        ({"router": None}, "router=None must be a name, a mapping with a name, or a Router"),
        ({"balance": "switch"}, "balance='switch' must be a mapping"),
        ({"balance": {"switch": 0.01}}, "balance='switch' has options 0.01; they must be a mapping"),
        ({"balance": [moe.SwitchLoss]}, "balance=SwitchLoss is a class; give an instance"),
        ({"balance": {"switch": {"name": "router_z", "rate": 1}}}, "balance='switch' does not take these options"),
        ({"shared_hidden_dim": -1}, "shared_hidden_dim=-1"),
        ({"shared_gate": True}, "shared_hidden_dim=0 must be positive where shared_gate"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
@pytest.mark.usefixtures("unchecked")
def test_tokens_must_be_floating(dtype):
    with pytest.raises(DtypeError, match=f"x is {dtype}; tokens must be floating"):
        make()(torch.zeros(3, 8, dtype=dtype))


@pytest.mark.usefixtures("unchecked")
def test_wrong_shapes_are_named():
    with pytest.raises(ShapeError, match=r"x has shape \(3, 7\); its last dimension must be dim=8"):
        make()(torch.zeros(3, 7))
    with pytest.raises(ShapeError, match=r"x has shape \(\)"):
        make()(torch.tensor(1.0))
    with pytest.raises(ShapeError, match=r"token_mask has shape \(4,\); it must be that of x .* \(3,\)"):
        make()(torch.zeros(3, 8), torch.ones(4, dtype=torch.bool))
    with pytest.raises(DtypeError, match=r"token_mask is torch.float32; it must be torch.bool"):
        make()(torch.zeros(3, 8), torch.ones(3))


def test_mixed_dtypes_are_named():
    with pytest.raises(DtypeError, match=r"x is torch\.float32 but the experts' weights are torch\.bfloat16"):
        make().bfloat16()(torch.zeros(3, 8))
