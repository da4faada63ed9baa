"""Routing by the definition: loops over tokens and experts, gradients by autograd in float64."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """The sizes and options of one routing."""

    tokens: int
    experts: int
    top_k: int
    score_function: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    bias: bool = False
    by_score: bool = False
    groups: tuple[int, int] | None = None
    masked: bool = False
    ties: bool = False

    def __str__(self) -> str:
        given = [name for name in ("normalize", "bias", "by_score", "masked", "ties") if getattr(self, name)]
        sizes = f"{self.tokens}x{self.experts} top {self.top_k}"
        groups = [f"groups {self.groups}"] if self.groups else []
        return " ".join([sizes, self.score_function, *given, *groups])

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits, bias and mask; ties are made by few values."""
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(self.tokens, self.experts, generator=generator) * 2
        bias = torch.randn(self.experts, generator=generator) * 0.3
        mask = torch.rand(self.tokens, generator=generator) < 0.7
        if self.ties:
            logits, bias = logits.round(), bias.round()
        return logits, bias if self.bias else None, mask if self.masked else None

    def options(self) -> dict[str, object]:
        """The keyword arguments of ``route`` besides its tensors."""
        num_groups, top_groups = self.groups or (None, None)
        weighting = self.weighting()
        return {**weighting, "by_score": self.by_score, "num_groups": num_groups, "top_groups": top_groups}

    def weighting(self) -> dict[str, object]:
        """The keyword arguments that ``route`` and ``weigh`` share."""
        return {"score_function": self.score_function, "normalize": self.normalize, "scale": self.scale}


def naive_ids(
    case: Case, logits: Tensor, scores: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
) -> list[list[int]]:
    """Each token's experts from the definition, by sorting (value, -id) pairs; NaN above all."""
    biased = scores if bias is None else scores + bias
    keys = biased if bias is not None or case.by_score else logits
    return [
        [-1] * case.top_k if mask is not None and not mask[t] else _best(case, keys[t].tolist(), biased[t].tolist())
        for t in range(len(logits))
    ]


def _best(case: Case, keys: list[float], biased: list[float]) -> list[int]:
    allowed = range(case.experts)
    if case.groups is not None:
        num_groups, top_groups = case.groups
        size = case.experts // num_groups
        by_value = sorted(range(case.experts), key=lambda e: _order(biased[e], e))
        members = [[e for e in by_value if e // size == g] for g in range(num_groups)]
        # In float32, as the library adds: two groups may be equal in float32 only.
        values = [torch.tensor([biased[e] for e in group[:2]], dtype=torch.float32).sum().item() for group in members]
        kept = sorted(range(num_groups), key=lambda g: _order(values[g], g))[:top_groups]
        allowed = [e for e in allowed if e // size in kept]
    return sorted(allowed, key=lambda e: _order(keys[e], e))[: case.top_k]


def _order(value: float, place: int) -> tuple[bool, float, int]:
    return (not math.isnan(value), 0.0 if math.isnan(value) else -value, place)


def naive_weights(case: Case, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and scores from the definition, a dense 0/1 matrix choosing; differentiable."""
    scores = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    if case.score_function == "sigmoid":
        scores = 1 / (1 + torch.exp(-logits))
    elif case.score_function == "sqrt_softplus":
        scores = torch.log(1 + torch.exp(logits)).sqrt()
    chooses = (ids[:, :, None] == torch.arange(case.experts)).to(logits.dtype)
    weights = torch.einsum("tke,te->tk", chooses, scores)
    if case.normalize:
        some = ids[:, :1] >= 0
        weights = torch.where(some, weights / torch.where(some, weights.sum(-1, keepdim=True), 1.0), 0.0)
    return weights * case.scale, scores
