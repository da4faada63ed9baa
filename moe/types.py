"""The records that the parts of a layer hand to each other.

Sizes: T tokens, E experts, K experts per token (``top_k``), N = T * K assignments.
"""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@final
@dataclass(frozen=True)
class Routing:
    """One routing decision: which experts each token goes to, and with what weight.

    Example, T=3, E=4, K=2; token 2 wants one expert only::

        expert_ids = [[0, 2], [1, 0], [3, -1]]
        weights    = [[.7, .3], [.6, .4], [1., 0.]]

    An id of -1 means *no expert*, whatever the reason: a masked token, an assignment dropped by a capacity, an
    expert that lives on another device. Its weight is 0.
    """

    expert_ids: Int[Tensor, "T K"]
    """int32; best expert first, -1 for none."""

    weights: Float[Tensor, "T K"]
    """float32 (float64 in a float64 model); what each expert's output is multiplied by."""

    scores: Float[Tensor, "T E"]
    """Logits after softmax or sigmoid, same dtype as ``weights``."""

    logits: Float[Tensor, "T E"]
    """Router outputs before any normalisation, same dtype as ``weights``."""

    token_mask: Bool[Tensor, " T"] | None = None
    """True for tokens that count; None when all do. A masked token has no expert."""

    num_sequences: int = 1
    """The tokens are so many sequences of equal length, one after the other."""

    num_null_experts: int = 0
    """The last so many of the E experts are null: they compute nothing. The router's decision names them; what is
    handed to the experts does not."""

    selection_probability: Float[Tensor, "T E"] | None = None
    """Where the router adds noise: how probable each choice is for a draw of new noise, with gradients."""

    @property
    def num_experts(self) -> int:
        """E, null experts included."""
        return self.scores.shape[-1]

    @property
    def num_real_experts(self) -> int:
        """E without the null experts."""
        return self.num_experts - self.num_null_experts

    def keep(self, kept: Bool[Tensor, "T K"]) -> "Routing":
        """The same decision with the assignments that are not ``kept`` turned into *no expert*."""
        return replace(
            self,
            expert_ids=self.expert_ids.masked_fill(~kept, -1),
            weights=self.weights.masked_fill(~kept, 0.0),
        )

    def detach(self) -> "Routing":
        """The same decision without gradients."""
        probability = self.selection_probability
        return replace(
            self,
            weights=self.weights.detach(),
            scores=self.scores.detach(),
            logits=self.logits.detach(),
            selection_probability=None if probability is None else probability.detach(),
        )

    def tokens_per_expert(self) -> Int[Tensor, " E"]:
        """How many assignments each expert gets, int64, without waiting for the device."""
        return count_experts(self.expert_ids, self.num_experts)


@final
@dataclass(frozen=True)
class Plan:
    """The rows of a routing decision in expert order, and the way back.

    Example, ``expert_ids = [[0, 2], [1, 0], [3, -1]]``, E=4, so N=6 assignments, numbered ``t * K + k``::

        assignments    = [0, 3, 2, 1, 4, 5]          # expert 0: tokens 0 and 1; expert 1: token 1; ...; none: last
        expert_offsets = [0, 2, 3, 4, 5]             # expert e owns rows expert_offsets[e] .. expert_offsets[e + 1]
        rows           = [[0, 3], [2, 1], [4, -1]]   # the inverse: assignments[rows[t, k]] == t * K + k

    Rows from ``expert_offsets[E]`` on belong to no expert.
    """

    assignments: Int[Tensor, " N"]
    """int32; the assignment in each row. Stable: an expert's rows are in token order."""

    expert_offsets: Int[Tensor, " E_plus_1"]
    """int32; where each expert's rows start, then where the last one's end."""

    rows: Int[Tensor, "T K"]
    """int32; the row of each assignment, -1 for no expert."""


def count_experts(expert_ids: Int[Tensor, "..."], num_experts: int) -> Int[Tensor, " E"]:
    """Count each expert's assignments; -1 counts for none.

    Integer additions commute, so the result is exact and the same on every run.

    Args:
        expert_ids: any shape, integer, values in -1 .. num_experts - 1.
        num_experts: E.

    Returns:
        ``(E,)`` int64.
    """
    slots = expert_ids.reshape(-1).long() + 1
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_ids.device)
    return counts.scatter_add_(0, slots, torch.ones_like(slots))[1:]
