"""Every router by name, made and called alike."""

import torch
from torch import Tensor

from moe.routing import ROUTERS, Router

VOCABULARY = 97

TOP_K_IN_EVALUATION = (
    "softmax",
    "top_k_softmax",
    "sigmoid",
    "sqrt_softplus",
    "switch",
    "noisy_top_k",
    "sinkhorn",
    "base",
)
"""Those that send a token to its K best logits in evaluation mode."""

OWN_TOKENS_ONLY = (*TOP_K_IN_EVALUATION, "hash", "relu", "threshold")
"""Those whose decision for a token in evaluation mode depends on no other one."""


def options_of(name: str) -> dict[str, object]:
    """The options that a router cannot do without."""
    return {"vocab_size": VOCABULARY} if name == "hash" else {}


def build(name: str, dim: int = 16, num_experts: int = 8, top_k: int = 2, seed: int = 0, **options: object) -> Router:
    """A router with drawn weights, those of its noise included."""
    torch.manual_seed(seed)
    router = ROUTERS[name](dim, num_experts, 1 if name == "switch" else top_k, **options_of(name), **options)
    if name == "noisy_top_k":
        torch.nn.init.normal_(router.noise_weight, std=0.2)
    return router


def ids_of(x: Tensor) -> Tensor:
    """Token ids of the vocabulary that go with these tokens."""
    return torch.randint(0, VOCABULARY, (len(x),), generator=torch.Generator().manual_seed(1))
