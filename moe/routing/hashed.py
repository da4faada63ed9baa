"""Hash routing: a token's experts are fixed by its id in the vocabulary."""

from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.config import require_positive_integer
from moe.errors import ConfigError, DtypeError, ShapeError
from moe.kernels.route import ScoreFunction
from moe.routing.router import Router, Tokens


@final
class HashRouter(Router):
    """Experts from a table that is drawn once: id by id K distinct ones, each expert in equally many places up to one.

    The table is even over ids, not over tokens: an expert that owns a frequent id is busy. Nothing that is learnt
    changes a decision, so balance losses only move the weights. Needs ``token_ids``.

    Takes no bias, no groups and no null experts.

    Args:
        args: as of ``Router``.
        vocab_size: ids are 0 .. vocab_size - 1.
        seed: of the table. Layers with the same seed and sizes have the same table.
        learnt_weights: weigh the experts by their softmax scores, normalised as the other routers do. False: each by
            1/K, and the router's own weight gets no gradient from the model's loss.
        options: as of ``Router``.

    Raises:
        ConfigError: from ``forward``, without ``token_ids`` or, on the CPU, with an id outside the vocabulary where the
            mask says that the token counts. (On a GPU the look-up itself fails.)
        DtypeError: from ``forward``, if the ids are not whole numbers.
        ShapeError: from ``forward``, if there are not as many ids as tokens.

    Source: Hash Layers (Roller et al. 2021, arXiv 2106.04426), with K = 1 and no weights; learnt weights as in the
    first layers of DeepSeek-V4, which has another score function.
    """

    score_function = ScoreFunction.SOFTMAX
    takes_score_bias = False
    takes_groups = False
    takes_null_experts = False

    table: Tensor
    """``(vocab_size, K)`` int32; part of the state dict."""

    def __init__(self, *args: Any, vocab_size: int, seed: int = 0, learnt_weights: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        require_positive_integer(vocab_size=vocab_size)
        self.vocab_size, self.seed, self.learnt_weights = vocab_size, seed, learnt_weights
        table = balanced_table(vocab_size, self.num_experts, self.top_k, seed)
        self.register_buffer("table", table.to(self.weight.device))

    def reset_parameters(self) -> None:
        """Draw the weight anew, and the same table."""
        super().reset_parameters()
        if "table" in self._buffers:  # not while the base is being made
            self.table.copy_(balanced_table(self.vocab_size, self.num_experts, self.top_k, self.seed))

    def score(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Softmax over experts."""
        return self.score_function.of(logits)

    def select(
        self,
        logits: Float[Tensor, "T E"],
        scores: Float[Tensor, "T E"],  # noqa: ARG002
        tokens: Tokens,
    ) -> Int[Tensor, "T S"]:
        """The experts of each token's id, in the order of the table."""
        ids = tokens.ids
        if ids is None:
            raise ConfigError("token_ids=None: the router 'hash' finds a token's experts by its id; give token_ids")
        if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
            raise DtypeError(f"token_ids is {ids.dtype}; ids must be integers")
        if ids.shape != logits.shape[:1]:
            raise ShapeError(f"token_ids has shape {tuple(ids.shape)}; it must be that of the tokens, {len(logits)}")
        ids = ids.long()
        if tokens.mask is not None:
            ids = ids.masked_fill(~tokens.mask, 0)  # padding may have any id
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_range(ids)
        return self.table.index_select(0, ids)  # which unlike [] takes no negative index for one from the end

    def _check_range(self, ids: Tensor) -> None:
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ConfigError(
                f"token_ids are {int(ids.min())} to {int(ids.max())}, must be between 0 and vocab_size - 1, "
                f"{self.vocab_size - 1}"
            )

    def weigh(self, scores: Float[Tensor, "T E"], expert_ids: Int[Tensor, "T S"]) -> Float[Tensor, "T S"]:
        """Weights of the experts: learnt, or 1/K; 0 for none."""
        if self.learnt_weights:
            return super().weigh(scores, expert_ids)
        return (expert_ids >= 0).to(scores.dtype) * (self.scale / self.top_k)

    def extra_repr(self) -> str:
        """Options in the module's printed form."""
        own = f"vocab_size={self.vocab_size}, seed={self.seed}, learnt_weights={self.learnt_weights}"
        return f"{super().extra_repr()}, {own}"


def balanced_table(vocab_size: int, num_experts: int, top_k: int, seed: int) -> Int[Tensor, "V K"]:
    """K distinct experts for each id, at random, each expert equally often up to one.

    The rows follow one another in a sequence of shuffled lists of all experts. Where a row ends in the next list, the
    experts that it has already go to that list's end.

    Returns:
        ``(vocab_size, top_k)`` int32 on the CPU.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    sequence = torch.empty(vocab_size * top_k, dtype=torch.int32, device="cpu")
    for start in range(0, len(sequence), num_experts):
        experts = torch.randperm(num_experts, generator=generator, dtype=torch.int32, device="cpu")
        if begun := start % top_k:
            has = torch.isin(experts, sequence[start - begun : start])
            experts = torch.cat([experts[~has], experts[has]])
        part = sequence[start : start + num_experts]
        part.copy_(experts[: len(part)])
    return sequence.view(vocab_size, top_k)
