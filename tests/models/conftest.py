"""Small decoders, dense and with MoE layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe.models import Decoder, DecoderConfig

SMALL: dict[str, Any] = {
    "vocab_size": 37,
    "dim": 24,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_dim": 40,
    "max_seq_len": 32,
}
MOE: dict[str, Any] = {"hidden_dim": 20, "num_experts": 5, "top_k": 2, "shared_hidden_dim": 12}


@pytest.fixture
def small_config() -> Callable[..., DecoderConfig]:
    return lambda **changes: DecoderConfig(**{**SMALL, **changes})


@pytest.fixture(params=["dense", "moe"])
def config(request: pytest.FixtureRequest, small_config: Callable[..., DecoderConfig]) -> DecoderConfig:
    """Three layers; with MoE, the first is dense."""
    moe = {"moe": MOE, "first_dense": 1} if request.param == "moe" else {}
    return small_config(tie_embeddings=False, **moe)


@pytest.fixture
def model(config: DecoderConfig) -> Decoder:
    """A float64 decoder in evaluation mode, with weights so large that every token moves every later logit."""
    model = Decoder(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture
def tokens(config: DecoderConfig) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (2, 11))
