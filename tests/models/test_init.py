"""The scale of every kind of weight at the start."""

import math

import pytest
import torch

from moe.models import Decoder, DecoderConfig

LAYERS, DIM, HIDDEN, EXPERT_HIDDEN, SHARED_HIDDEN = 2, 192, 256, 96, 128
RESIDUAL = 1 / math.sqrt(2 * LAYERS)


@pytest.fixture(scope="module")
def wide() -> dict[str, torch.Tensor]:
    """The weights of a decoder large enough to measure: one dense layer, one MoE layer."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=256,
        dim=DIM,
        num_layers=LAYERS,
        num_heads=3,
        num_kv_heads=3,
        ffn_hidden_dim=HIDDEN,
        max_seq_len=16,
        tie_embeddings=False,
        first_dense=1,
        moe={"hidden_dim": EXPERT_HIDDEN, "num_experts": 16, "shared_hidden_dim": SHARED_HIDDEN},
    )
    return {name: weight.detach() for name, weight in Decoder(config).named_parameters()}


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("embedding.weight", math.sqrt(0.4 / DIM)),
        ("head.weight", math.sqrt(0.4 / DIM)),
        ("blocks.0.attention.qkv.weight", math.sqrt(0.4 / DIM)),
        ("blocks.0.attention.out.weight", math.sqrt(0.4 / DIM) * RESIDUAL),
        ("blocks.0.ffn.up.weight", math.sqrt(0.4 / DIM)),
        ("blocks.0.ffn.down.weight", math.sqrt(0.4 / HIDDEN) * RESIDUAL),
        ("blocks.1.ffn.experts.up_weight", math.sqrt(0.4 / DIM)),
        ("blocks.1.ffn.experts.down_weight", math.sqrt(0.4 / EXPERT_HIDDEN) * RESIDUAL),
        ("blocks.1.ffn.shared.up.weight", math.sqrt(0.4 / DIM)),
        ("blocks.1.ffn.shared.down.weight", math.sqrt(0.4 / SHARED_HIDDEN) * RESIDUAL),
        ("blocks.1.ffn.router.weight", math.sqrt(0.1 / DIM)),
    ],
)
def test_every_weight_has_its_deviation(wide, name, deviation):
    weight = wide[name]
    # Measured from n numbers a deviation is off by deviation / sqrt(2 n); five of these, and as many of the mean's.
    n = weight.numel()
    assert weight.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * n))
    assert abs(weight.mean().item()) < 5 * deviation / math.sqrt(n)


def test_nothing_is_left_out(wide):
    matrices = {name for name, weight in wide.items() if weight.dim() > 1}
    assert len(matrices) == 2 + 2 * 2 + 2 + 5  # ends, attention, dense layer, MoE layer: each has its line above
    norms = [weight for weight in wide.values() if weight.dim() == 1]
    assert len(norms) == 5
    assert all((weight == 1).all() for weight in norms)


@torch.no_grad()
def test_a_new_model_knows_nothing_and_says_so(small_config):
    logits = Decoder(small_config(vocab_size=256, dim=128))(torch.randint(0, 256, (4, 32)))
    # sqrt(2/5) for logits from normalised activations, were the tied embedding independent of them.
    assert 0.3 < logits.std() < 0.9


def test_weights_can_be_drawn_again(small_config):
    model = Decoder(small_config(moe={"hidden_dim": 8, "num_experts": 4, "bias": True}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    torch.manual_seed(5)
    model.init_weights()
    first = [parameter.clone() for parameter in model.parameters()]
    assert all(parameter.isfinite().all() for parameter in first)
    torch.manual_seed(5)
    model.init_weights()
    assert all(torch.equal(a, b) for a, b in zip(first, model.parameters()))
