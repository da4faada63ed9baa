"""What every test starts from: one thread, fixed seeds, and no GPU test where there is no GPU."""

import random
from collections.abc import Iterator

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import settings

# One thread: results do not depend on how a sum was split, and small tensors run faster.
torch.set_num_threads(1)

# No deadline: a machine under load is no failure. Derandomised: a run that passed passes again.
settings.register_profile("moe", deadline=None, derandomize=True)
settings.load_profile("moe")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or torch.empty(0).is_cuda:  # ttsem, a stand-in for a GPU, has every tensor say so
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            is_kernels = item.path.parent.name == "kernels"
            instead = "; `make test-kernels` executes it on the CPU" if is_kernels else ""
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU{instead}"))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations are not checked, as for a user: a wrong type reaches the library's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
