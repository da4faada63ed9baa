"""What experts have to do with each other and with kinds of tokens, counted from decisions that were kept.

All counts are exact integers. Checks of ids may wait for the device: this is for afterwards, not for a training step.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.errors import ShapeError
from moe.monitor.decisions import require_ids
from moe.types import count_experts


@torch.no_grad()
def co_activation(expert_ids: Int[Tensor, "T K"], num_experts: int) -> Int[Tensor, "E E"]:
    """Count for each two experts the tokens that chose both.

    Args:
        expert_ids: integer, a token's experts all different, -1 for none.
        num_experts: E.

    Returns:
        ``(E, E)`` int64, symmetric; the diagonal is the number of tokens of each expert.

    Raises:
        ConfigError: an id that is no expert.
    """
    require_ids("expert_ids", expert_ids, "num_experts", num_experts)
    ids = expert_ids.long()
    counts = torch.zeros(num_experts**2, dtype=torch.int64, device=ids.device)
    for slot in ids.unbind(1):  # a slot at a time: T * K pairs in memory, not T * K * K
        counts += count_experts(_pairs(ids, slot[:, None], num_experts), num_experts**2)
    return counts.view(num_experts, num_experts)


def co_activation_probability(counts: Int[Tensor, "E E"]) -> Float[Tensor, "E E"]:
    """Chance that a token of expert i has expert j too: ``P(j | i) = counts[i, j] / counts[i, i]``.

    Not symmetric: an expert with few tokens may always come with one that has many. Experts that know nothing of each
    other, evenly loaded, have (K - 1) / (E - 1) everywhere off the diagonal.

    Args:
        counts: what `co_activation` gave.

    Returns:
        ``(E, E)`` float32; row i is 0 where expert i has no token.

    Source: OLMoE, arXiv 2409.02060, section 5.2.
    """
    return counts / counts.diagonal().clamp(min=1)[:, None]


@final
@dataclass(frozen=True)
class Specialization:
    """How many tokens of each class each expert got, and what follows."""

    counts: Int[Tensor, "E C"]
    """int64; assignments."""

    @property
    def class_shares(self) -> Float[Tensor, "E C"]:
        """float64; what an expert's tokens are: ``P(class | expert)``, rows sum to 1 (0 for an expert without any)."""
        return self.counts.double() / self.counts.sum(1, keepdim=True).clamp(min=1)

    @property
    def mutual_information(self) -> Float[Tensor, ""]:
        """float64; bits that an assignment's expert tells about its class, at most the entropy of the classes.

        ``sum_ec p_ec log2(p_ec / (p_e p_c))`` with p the shares in ``counts``. Above 0 by chance: hold it against
        `mutual_information_bias`.
        """
        joint = self.counts.double() / self.counts.sum().clamp(min=1)
        independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        return (torch.xlogy(joint, joint) - torch.xlogy(joint, independent)).sum() / math.log(2)

    @property
    def mutual_information_bias(self) -> Float[Tensor, ""]:
        """float64; about the bits that N assignments show where experts and classes are independent.

        ``(E - 1) (C - 1) / (2 N ln 2)``, E and C those experts and classes that have an assignment. It holds for
        independent assignments. The K experts of a token are distinct, which makes it less, by (E - K) / (E - 1) where
        they are evenly loaded; tokens of a text resemble their neighbours, which makes it more.

        Source: Miller 1955, "Note on the bias of information estimates"; Madow's correction to each entropy gives it.
        """
        experts, classes = ((self.counts.sum(dim) > 0).sum() for dim in (1, 0))
        total = self.counts.sum()
        bias = (experts - 1) * (classes - 1) / (2 * math.log(2) * total.clamp(min=1).double())
        return torch.where(total > 0, bias, torch.zeros_like(bias))

    @property
    def class_entropy(self) -> Float[Tensor, ""]:
        """float64; entropy of the classes over assignments in bits: what an expert could tell at most."""
        shares = self.counts.sum(0).double() / self.counts.sum().clamp(min=1)
        return -torch.xlogy(shares, shares).sum() / math.log(2)


@torch.no_grad()
def specialization(
    expert_ids: Int[Tensor, "T K"], classes: Int[Tensor, " T"], num_experts: int, num_classes: int
) -> Specialization:
    """Count the tokens of each class that each expert got.

    Args:
        expert_ids: integer, -1 for none.
        classes: integer, what kind of token each is (of bytes: letter, digit, space; of words: their part of speech);
            -1 for a token that is left out.
        num_experts: E.
        num_classes: C.

    Raises:
        ConfigError: an id that is no expert, or a class that there is not.
        ShapeError: not one class a token.
    """
    if len(classes) != len(expert_ids):
        raise ShapeError(f"classes has {len(classes)} tokens, but expert_ids has {len(expert_ids)}")
    require_ids("expert_ids", expert_ids, "num_experts", num_experts)
    require_ids("classes", classes, "num_classes", num_classes)
    pairs = _pairs(expert_ids.long(), classes.long()[:, None], num_classes)
    return Specialization(count_experts(pairs, num_experts * num_classes).view(num_experts, num_classes))


def _pairs(first: Tensor, second: Tensor, size: int) -> Tensor:
    """``first * size + second``, one number for each pair; -1 where either is none."""
    return torch.where((first < 0) | (second < 0), -1, first * size + second)
