"""Options of the layer that concern its arithmetic: batch invariance, recomputation, the dtype of weight gradients."""

import copy
import io

import pytest
import torch
from torch import Tensor

import moe
from moe.errors import ConfigError
from moe.routing import SoftmaxRouter


def gradients(layer: moe.MoE, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the tokens."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_a_token_alone_is_the_token_in_a_batch(router: str, dtype: torch.dtype) -> None:
    options = {"shared_hidden_dim": 20, "shared_gate": True, "router": router, "balance": (), "bias": True}
    layer = moe.MoE(64, 24, 33, 3, batch_invariant=True, dtype=dtype, **options)
    x, grad = torch.randn(157, 64, dtype=dtype), torch.randn(157, 64, dtype=dtype)
    y, grad_x = gradients(layer, x, grad)
    for token in range(0, 157, 4):
        part = slice(token, token + 1)
        y_alone, grad_alone = gradients(layer, x[part], grad[part])
        assert torch.equal(y_alone, y[part])
        assert torch.equal(grad_alone, grad_x[part])


def test_a_router_that_feels_the_batch_does_not_fit_a_batch_invariant_layer() -> None:
    with pytest.raises(ConfigError, match="batch_invariant=True, but router was made with batch_invariant=False"):
        moe.MoE(8, 4, 4, 2, router=SoftmaxRouter(8, 4, 2), batch_invariant=True)


def test_recomputing_the_up_projection_changes_no_bit() -> None:
    torch.manual_seed(0)
    layer = moe.MoE(16, 8, 4, 2, dtype=torch.bfloat16, balance=())
    other = moe.MoE(16, 8, 4, 2, dtype=torch.bfloat16, balance=(), recompute="up")
    other.load_state_dict(layer.state_dict())
    x, grad = torch.randn(30, 16).bfloat16(), torch.randn(30, 16).bfloat16()
    assert all(torch.equal(*pair) for pair in zip(gradients(layer, x, grad), gradients(other, x, grad)))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(layer.parameters(), other.parameters()))


def test_an_unknown_recomputation_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="recompute='down' is unknown; choose one of none, up"):
        moe.MoE(8, 4, 4, 2, recompute="down")


def with_float32_gradients() -> moe.MoE:
    return moe.MoE(16, 8, 4, 2, dtype=torch.bfloat16, balance=(), weight_grad_dtype=torch.float32)


def copied(layer: moe.MoE) -> moe.MoE:
    return copy.deepcopy(layer)


def loaded(layer: moe.MoE) -> moe.MoE:
    other = with_float32_gradients()
    other.load_state_dict(layer.state_dict(), assign=True)
    return other


def saved(layer: moe.MoE) -> moe.MoE:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def materialised(layer: moe.MoE) -> moe.MoE:
    with torch.device("meta"):
        other = with_float32_gradients()
    other.to_empty(device="cpu")
    other.load_state_dict(layer.state_dict())
    return other


@pytest.mark.parametrize("remade", [lambda layer: layer, copied, loaded, saved, materialised])
def test_weight_gradients_add_up_in_float32(remade) -> None:
    layer = remade(with_float32_gradients())
    plain = moe.MoE(16, 8, 4, 2, dtype=torch.bfloat16, balance=())
    plain.load_state_dict(layer.state_dict())
    x, grad = torch.randn(40, 16).bfloat16(), torch.randn(40, 16).bfloat16()
    for each in (layer, plain):
        gradients(each, x, grad)
    for name in ("up_weight", "down_weight"):
        exact, rounded = getattr(layer.experts, name).grad, getattr(plain.experts, name).grad
        assert exact.dtype == torch.float32
        assert torch.equal(exact.bfloat16(), rounded)
        assert not torch.equal(exact, rounded.float())


def test_weight_gradients_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"weight_grad_dtype=torch.int32 must be floating point"):
        moe.MoE(8, 4, 4, 2, weight_grad_dtype=torch.int32)


def test_a_compiled_layer_refuses_gradients_that_the_compiler_would_round() -> None:
    layer = with_float32_gradients()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        with pytest.raises(ConfigError, match=r"weight_grad_dtype=torch.float32 for parameters of torch.bfloat16"):
            layer.experts._ask_for_grad_dtype()
