"""Routing decisions for tests of balance, and what plain loops say of them."""

import torch
from torch import Tensor

from moe.balance import StepCounts
from moe.types import Routing


def decision(
    num_tokens=50,
    num_experts=8,
    top_k=2,
    num_sequences=1,
    mask=None,
    sigmoid=False,
    seed=0,
    skew=1.0,
) -> tuple[Routing, Tensor]:
    """A decision whose logits are leaves, in float64; later experts are likelier by ``skew``."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    logits = (logits + skew * torch.arange(num_experts) / num_experts).requires_grad_()
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    ids = logits.topk(top_k, -1).indices.int()
    weights = scores.gather(1, ids.long())
    if mask is not None:
        ids, weights = ids.masked_fill(~mask[:, None], -1), weights.masked_fill(~mask[:, None], 0.0)
    return Routing(ids, weights, scores, logits, mask, num_sequences), logits


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


def by_sequence(routing: Routing) -> list[tuple[list[float], list[Tensor], int, list[list[int]]]]:
    """Of every sequence: shares ``f_e``, probabilities ``P_e``, tokens that count, and each such token's experts."""
    found, length = [], len(routing.scores) // routing.num_sequences
    for first in range(0, len(routing.scores), max(length, 1)):
        rows = [t for t in range(first, first + length) if routing.token_mask is None or routing.token_mask[t]]
        chosen = [[e for e in routing.expert_ids[t].tolist() if e >= 0] for t in rows]
        flat = [e for experts in chosen for e in experts]
        load = [flat.count(e) / max(len(flat), 1) for e in range(routing.num_experts)]
        sums = [sum(routing.scores[t, e] / routing.scores[t].sum() for t in rows) for e in range(routing.num_experts)]
        found.append((load, [torch.as_tensor(total) / max(len(rows), 1) for total in sums], len(rows), chosen))
    return found


def step_counts(tokens_per_expert, top_k=1, tokens=None, margins=None) -> StepCounts:
    counts = torch.as_tensor(tokens_per_expert, dtype=torch.int64)
    tokens = int(counts.sum()) // top_k if tokens is None else tokens
    return StepCounts(counts, torch.tensor(tokens), top_k, margins)
