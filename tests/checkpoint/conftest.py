"""A model with everything a checkpoint can get wrong, and one so small that saving it costs nothing."""

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Awkward(nn.Module):
    """Tied, bfloat16, non-contiguous and empty parameters; float32 and int64 buffers; random draws in training."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.inner = nn.Linear(8, 8, dtype=torch.bfloat16)
        self.strided = nn.Parameter(torch.randn(8, 6).t())
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("score_bias", torch.zeros(8))
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("both_halves", torch.arange(8.0))
        self.register_buffer("upper", self.both_halves[4:])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        self.tokens_seen += tokens.numel()
        x = self.dropout(x) + self.inner(x.bfloat16()).float() + self.score_bias
        x = x + (x @ self.strided.t()).tanh() @ self.strided * self.scale
        self.score_bias += 0.01 * x.detach().mean((0, 1)).sign()
        return self.head(x) + self.empty.sum()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Train on data that comes from the global generators of torch and numpy.

    Python's is left out: the type checks that tests put into the library draw from it to pick an item of a list.
    """
    for _ in range(steps):
        tokens = torch.randint(16, (4, 5))
        targets = torch.from_numpy(np.random.randint(16, size=(4, 5)))

        def loss(tokens: Tensor = tokens, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
            value.backward()
            return value

        optimizer.step(loss)


def seed(value: int) -> None:
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def groups(model: nn.Module) -> list[dict[str, object]]:
    """Two groups with options of their own, the second in another order than the model's."""
    parameters = dict(model.named_parameters())
    decayed = ["embedding.weight", "inner.weight", "strided"]
    rest = sorted(set(parameters) - set(decayed), reverse=True)
    return [
        {"params": [parameters[name] for name in decayed], "weight_decay": 0.1},
        {"params": [parameters[name] for name in rest], "weight_decay": 0.0, "lr": 3e-3},
    ]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def awkward() -> Callable[[int], tuple[nn.Module, torch.optim.Optimizer]]:
    """Seed everything, then make an awkward model and AdamW over two groups of its parameters."""

    def make(value: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
        seed(value)
        model = Awkward()
        return model, torch.optim.AdamW(groups(model), lr=1e-2, betas=(0.9, 0.95))

    return make


@pytest.fixture
def trainer() -> Callable[[nn.Module, torch.optim.Optimizer, int], None]:
    return train


@pytest.fixture
def seeder() -> Callable[[int], None]:
    return seed


@pytest.fixture
def tiny() -> Callable[[float], tuple[nn.Module, torch.optim.Optimizer]]:
    """A linear layer full of one number, and AdamW after a step on it."""

    def make(value: float = 0.0) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        return model, optimizer

    return make
