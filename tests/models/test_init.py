"""The scale of every kind of weight at the start."""

import math

import pytest
import torch

from moe.models import Decoder, DecoderConfig
from moe.models.init import EMBEDDING_STD

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
