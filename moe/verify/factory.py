"""The model that is verified, its data and its loss: what a factory must return, and the routing it is given."""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.layer import MoE, moe_layers
from moe.models import Decoder
from moe.models.stage import split_decoder
from moe.parallel import Degrees

Batch = Mapping[str, Tensor]
"""Tensors by name, rows first."""
MakeBatch = Callable[[torch.Generator, int], Batch]
"""Draws a batch: a generator, and how many rows."""
Loss = Callable[[nn.Module, Batch], Tensor]
"""The mean over a batch that training minimises, ``moe.balance_loss(model)`` included where it is used."""
Factory = Callable[[], tuple[nn.Module, MakeBatch, Loss]]
"""Builds a model, the same for the same seed; of a module, so that other processes can import it."""


@final
@dataclass(frozen=True)
class Trial:
    """A model that can take training steps."""

    model: nn.Module
    make_batch: MakeBatch
    loss: Loss
    dtype: torch.dtype

    def batch(self, seed: int, rows: int) -> dict[str, Tensor]:
        """The batch of a seed, floating tensors in the model's dtype.

        Raises:
            ConfigError: ``make_batch`` returned no mapping to tensors.
        """
        batch = self.make_batch(torch.Generator().manual_seed(seed), rows)
        if not isinstance(batch, Mapping) or not all(isinstance(tensor, Tensor) for tensor in batch.values()):
            raise ConfigError(f"make_batch returned {_brief(batch)}; it must return a dict of tensors")
        return {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in batch.items()}

    def loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch under the model, or under what stands in for it.

        Raises:
            ConfigError: ``loss`` returned no scalar with a gradient.
        """
        loss = self.loss(model, batch)
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.requires_grad:
            raise ConfigError(f"loss returned {_brief(loss)}; it must return a scalar tensor with a gradient")
        return loss


def build(factory: Factory, seed: int, dtype: torch.dtype) -> Trial:
    """Call a factory and make the routing of its model uneven.

    Args:
        factory: see :data:`Factory`.
        seed: of torch's global generator.
        dtype: what the model's floating parameters become.

    Raises:
        ConfigError: the factory returns something else, or a model without MoE layers.
    """
    torch.manual_seed(seed)
    made: Any = factory()
    if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module)) or not (
        callable(made[1]) and callable(made[2])
    ):
        raise ConfigError(f"the factory returned {_brief(made)}; it must return (model, make_batch, loss)")
    model, make_batch, loss = made
    if not any(True for _ in moe_layers(model)):
        raise ConfigError(f"the factory's model {type(model).__name__} has no moe.MoE layer: nothing is routed")
    model.to(dtype).train()
    skew(model)
    return Trial(model, make_batch, loss, dtype)


def skew(model: nn.Module) -> None:
    """Send every token to the first expert of each layer and none to the last, by their selection biases.

    Scores lie in 0 .. 1, so a bias of 2 decides; with one expert a token, the first is only made likelier. A layer
    without a bias rule keeps the bias that it gets here.
    """
    for _, layer in moe_layers(model):
        push = torch.zeros(layer.num_experts, device=layer.router.weight.device)
        push[0] += 2 if layer.top_k > 1 else 0.1
        push[-1] -= 2
        before = layer.router.score_bias
        layer.router.score_bias = push if before is None else before + push


def check_fits(model: nn.Module, degrees: Degrees, stages_per_rank: int) -> None:
    """Refuse a model that cannot be divided so.

    Raises:
        ConfigError: a layer has fewer experts than ``ep``, or hidden units than ``etp``; or the model is no decoder
            that can be cut into as many stages.
    """
    for name, layer in moe_layers(model):
        for axis, value, size in (("ep", "num_experts", layer.num_experts), ("etp", "hidden_dim", hidden_dim(layer))):
            if getattr(degrees, axis) > size:
                raise ConfigError(
                    f"{axis}={getattr(degrees, axis)} is more than {value}={size} of layer {name!r}: a rank would "
                    "hold none"
                )
    if degrees.pp > 1:
        if not isinstance(model, Decoder):
            raise ConfigError(
                f"pp={degrees.pp} cuts a moe.models.Decoder into stages; the factory's model is a "
                f"{type(model).__name__}: leave pp out to check the other axes"
            )
        split_decoder(model, degrees.pp * stages_per_rank)


def hidden_dim(layer: MoE) -> int:
    """F of a layer's routed experts."""
    return layer.experts.down_weight.shape[-1]


def import_factory(path: str) -> Factory:
    """The function that ``module:function`` names; modules in the working directory are found.

    Raises:
        ConfigError: no such module or function; or it is no function.
    """
    if ":" not in path:
        raise ConfigError(f"factory={path!r} must be module:function, as in my_package.my_module:make")
    try:
        found: Any = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"factory={path!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"factory={path!r} is {_brief(found)}; it must be a function")
    factory: Factory = found
    return factory


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, requires_grad={value.requires_grad}"
    if isinstance(value, tuple):
        return f"({', '.join(type(item).__name__ for item in value)})"
    return f"{type(value).__name__} {str(value)[:100]!r}"
