"""Sampling text from a decoder."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe.errors import ConfigError, DtypeError, ShapeError
from moe.layer import moe_layers
from moe.models.cache import KVCache
from moe.models.decoder import Decoder


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: Int[Tensor, "B S"],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    eos_id: int | None = None,
) -> Int[Tensor, "B length"]:
    """Continue each prompt, one token at a time, with keys and values kept in a cache.

    Runs in evaluation mode without gradients, and leaves each submodule in the mode it was in. What a sequence gets
    does not depend on the others in the batch, unless MoE layers have a ``capacity_factor``: then tokens compete for
    room, within the prompt and across the batch, and the logits differ from those of one pass over the whole text.

    Args:
        model: what scores the next token.
        prompt: ``(B, S)`` int32 or int64, all of one length, at least one token each. Checking it waits for the device
            once.
        max_new_tokens: how many to add; no fewer are, unless every sequence has ended.
        temperature: what logits are divided by; 0 takes the likeliest token (the lowest id of equals).
        top_p: sample among the fewest likeliest tokens that hold this much probability together; 1 is all.
        generator: source of randomness, on the model's device; None is PyTorch's own.
        eos_id: the token that ends a sequence; an ended one is filled up with it. Looking whether all have ended
            waits for the device once a token.

    Returns:
        ``(B, S + n)`` like ``prompt``, which it starts with; n is ``max_new_tokens``, or fewer where all have ended.

    Raises:
        ConfigError: a router looks at later tokens (expert choice), ``temperature`` is negative, ``top_p`` outside
            (0, 1], ``max_new_tokens`` negative, or ``eos_id`` or a token of the prompt outside the vocabulary.
        ShapeError: the prompt is empty, or with the new tokens longer than ``max_seq_len``.
        DtypeError: the prompt is not int32 or int64.

    Source: Holtzman et al. 2020, arXiv 1904.09751, section 3.1 (top-p).
    """
    check_request(model, prompt, max_new_tokens, temperature, top_p, eos_id)
    batch_size, length = prompt.shape
    tokens = prompt.new_empty(batch_size, length + max_new_tokens)
    tokens[:, :length] = prompt
    weight = model.embedding.weight
    cache = KVCache(model.config, batch_size, length + max_new_tokens, device=weight.device, dtype=weight.dtype)
    ended = torch.zeros(batch_size, dtype=torch.bool, device=prompt.device)
    with _evaluating(model):
        for end in range(length, length + max_new_tokens):
            logits = model(tokens[:, cache.length : end], cache=cache)[:, -1]
            chosen = sample(logits, temperature, top_p, generator).to(tokens.dtype)
            if eos_id is not None:
                chosen = chosen.masked_fill(ended, eos_id)
                ended |= chosen == eos_id
            tokens[:, end] = chosen
            if eos_id is not None and ended.all():
                return tokens[:, : end + 1].clone()
    return tokens


def sample(
    logits: Float[Tensor, "B V"], temperature: float, top_p: float, generator: torch.Generator | None = None
) -> Int[Tensor, " B"]:
    """Draw a token from each row of logits; arguments as in `generate`."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # With the maximum taken off first, a tiny temperature sends the others to -inf and none to +inf.
    probabilities = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)
    if top_p < 1:
        probabilities = probabilities.where(nucleus(probabilities, top_p), 0.0)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def nucleus(probabilities: Float[Tensor, "B V"], top_p: float) -> Bool[Tensor, "B V"]:
    """The fewest likeliest tokens of each row whose probabilities sum to ``top_p`` at least; lower ids first of equals.

    Args:
        probabilities: ``(B, V)``, rows sum to 1.
        top_p: in (0, 1).

    Returns:
        ``(B, V)`` bool, True in at least one place a row.
    """
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1).roll(1, dims=-1)
    before[:, 0] = 0
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, ids, before < top_p)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_request(
    model: Decoder, prompt: Tensor, max_new_tokens: int, temperature: float, top_p: float, eos_id: int | None
) -> None:
    """Raise what `generate` documents unless its arguments are in their ranges."""
    config = model.config
    for name, layer in moe_layers(model):
        if not layer.router.is_causal:
            raise ConfigError(
                f"layer {name!r} has router={type(layer.router).__name__}, under which a token's experts depend on "
                "later tokens; a model that generates needs a router that decides for each token alone"
            )
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature={temperature} must be 0 or positive, and finite")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p} is outside (0, 1]")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 0")
    if eos_id is not None and not 0 <= eos_id < config.vocab_size:
        raise ConfigError(f"eos_id={eos_id} is outside 0 .. vocab_size - 1 = {config.vocab_size - 1}")
    if prompt.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"prompt has dtype {prompt.dtype}; token ids are int32 or int64")
    if prompt.dim() != 2 or prompt.numel() == 0:
        raise ShapeError(f"prompt has shape {tuple(prompt.shape)}; expected (batch, sequence), neither of them empty")
    if prompt.shape[1] + max_new_tokens > config.max_seq_len:
        raise ShapeError(
            f"a prompt of {prompt.shape[1]} tokens and max_new_tokens={max_new_tokens} are longer together than "
            f"max_seq_len={config.max_seq_len}"
        )
    if (outside := prompt[(prompt < 0) | (prompt >= config.vocab_size)]).numel():
        raise ConfigError(f"prompt has token {outside[0]}, outside 0 .. vocab_size - 1 = {config.vocab_size - 1}")
