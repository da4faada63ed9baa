"""Models that the tests verify, and factories that are wrong; of a module, so that other processes can import them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import moe
from moe.verify.decoder import BUILT_IN, DecoderFactory

SMALL: dict[str, Any] = {
    **BUILT_IN,
    "dim": 16,
    "num_heads": 2,
    "num_kv_heads": 2,
    "ffn_hidden_dim": 24,
    "num_layers": 2,
}
"""One dense layer and one with five experts."""


def small(checkpointing: str = "none", decoder: Mapping[str, Any] | None = None, **options: Any) -> DecoderFactory:
    """A small decoder; ``options`` are of its MoE layers."""
    return DecoderFactory({**SMALL, **(decoder or {}), "moe": {**SMALL["moe"], **options}}, checkpointing)


class Regression(nn.Module):
    """A user's own model: no list of blocks, layers of his own names, and experts on top of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 10)
        self.first = moe.MoE(10, 7, 4, 2, activation="gelu", router="sigmoid")
        self.second = moe.MoE(10, 5, 3, 1, router="switch", balance=())
        self.leave = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x))
        x = x + self.first(x)
        return self.leave(x + self.second(x))


def make_rows(generator: torch.Generator, batch_size: int) -> dict[str, Tensor]:
    return {
        "x": torch.randn(batch_size, 6, generator=generator),
        "y": torch.randn(batch_size, 2, generator=generator),
    }


def squared_error(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean() + moe.balance_loss(model)


def make() -> tuple[nn.Module, Any, Any]:
    """What ``--factory`` names."""
    return Regression(), make_rows, squared_error


def random_each_time() -> tuple[nn.Module, Any, Any]:
    """A model that is another one on every rank: it does not follow torch's seed."""
    model = Regression()
    generator = torch.Generator()
    generator.seed()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model, make_rows, squared_error


def model_alone() -> nn.Module:
    return Regression()


def without_experts() -> tuple[nn.Module, Any, Any]:
    return nn.Linear(6, 2), make_rows, squared_error


def batch_of_tuples() -> tuple[nn.Module, Any, Any]:
    return Regression(), lambda generator, batch_size: (1, 2), squared_error


def loss_of_rows() -> tuple[nn.Module, Any, Any]:
    return Regression(), make_rows, lambda model, batch: model(batch["x"])


def failing() -> tuple[nn.Module, Any, Any]:
    raise RuntimeError("no such luck")


def tied() -> tuple[nn.Module, Any, Any]:
    return small(decoder={"tie_embeddings": True})()


def batch_without_tokens() -> tuple[nn.Module, Any, Any]:
    model, make_batch, _ = small(balance=())()

    def renamed(generator: torch.Generator, batch_size: int) -> dict[str, Tensor]:
        return {"ids": make_batch(generator, batch_size)["tokens"]}

    return model, renamed, lambda model, batch: model(batch["ids"]).mean()
