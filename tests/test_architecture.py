"""Holds the layers and the sizes on every file, and holds the checker on planted violations."""

import re
from pathlib import Path

import pytest

from tests.support.architecture import (
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    ONLY_IN,
    find_cycle,
    read_graph,
    violations,
    within,
)

ROOT = Path(__file__).resolve().parents[1]
IF_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("moe", *parts) if parts[0] == "kernels" else parts)


# moe/kernels is a link, which rglob does not follow: kernels/ is listed for itself.
FILES = {
    module_name(path): path
    for folder in ("moe", "kernels", "examples", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
LIBRARY = {module: path for module, path in FILES.items() if within(module, "moe")}


@pytest.mark.parametrize("module", FILES)
def test_every_file_keeps_the_rules(module: str) -> None:
    path = FILES[module]
    found = violations(path.read_text(encoding="utf-8"), module)
    assert not found, "\n".join(f"{path.relative_to(ROOT)}:{v.line}: {v.rule}: {v.message}" for v in found)


def test_the_library_was_found() -> None:
    assert {"moe.types", "moe.errors"} <= LIBRARY.keys()
    assert any(module.startswith("moe.kernels.") for module in LIBRARY)


def test_no_import_cycle() -> None:
    cycle = find_cycle(read_graph({module: path.read_text(encoding="utf-8") for module, path in LIBRARY.items()}))
    assert not cycle, " imports ".join(reversed(cycle))


@pytest.mark.parametrize(
    "hidden",
    [
        "import moe.b",
        "from moe import b",
        "from .b import f",
        "def g():\n    from . import b",
        IF_TYPES + "import moe.b",
    ],
)
def test_a_cycle_is_found_however_it_is_written(hidden: str) -> None:
    assert find_cycle(read_graph({"moe.a": hidden, "moe.b": "from moe.c import f", "moe.c": "import torch"})) == []
    cycle = find_cycle(read_graph({"moe.a": hidden, "moe.b": "from moe.c import f", "moe.c": "import moe.a"}))
    assert {"moe.a", "moe.b", "moe.c"} == set(cycle)


def test_a_package_that_a_part_of_it_imports_is_a_cycle() -> None:
    package, part = "from moe.routing.part import f", "from moe.routing import g"
    assert find_cycle(read_graph({"moe.routing.__init__": package, "moe.routing.part": part}))


def test_the_folder_of_kernels_is_no_module_and_in_no_cycle() -> None:
    sources = {"moe.__init__": "import moe.layer", "moe.layer": "from moe import kernels", "moe.kernels.plan": ""}
    assert read_graph(sources)["moe.layer"] == set()
    assert find_cycle(read_graph(sources)) == []


PLANTED = [  # rule, module, source
    ("upward", "moe.types", "from moe.routing import Router"),
    ("upward", "moe.kernels.plan.reference", "import moe.layer"),
    ("upward", "moe.routing.router", "from ..layer import MoE"),
    ("upward", "moe.models.decoder", "from moe import parallel"),
    ("upward", "moe.layer", IF_TYPES + "from moe.models import Decoder"),
    ("upward", "moe.__init__", "from moe.verify import verify"),
    ("upward", "moe.__init__", "from .training import Trainer"),
    ("upward", "moe.parallel.mesh", "def f():\n    import moe.training"),
    ("upward", "moe.training.loop", "import moe.serving.router"),
    ("siblings", "moe.balance.losses", "from moe.routing import Router"),
    ("siblings", "moe.experts.__init__", "from ..dispatch import Local"),
    ("siblings", "moe.checkpoint.files", "import moe.parallel"),
    ("siblings", "moe.training.loop", "from moe.verify import check"),
    ("serving", "moe.serving.router", "from moe.types import Routing"),
    ("serving", "moe.serving.router", "from torch import nn"),
    ("torch.distributed", "moe.dispatch.local", "import torch.distributed as dist"),
    ("torch.distributed", "moe.training.loop", "from torch import distributed"),
    ("torch.distributed", "moe.layer", "import torch\nrank = torch.distributed.get_rank()"),
    ("torch.distributed", "moe.kernels.plan.reference", "from torch.distributed import all_reduce"),
    ("hydra", "moe.training.loop", "import hydra"),
    ("omegaconf", "moe.config", "from omegaconf import DictConfig"),
    ("triton", "moe.kernels.plan.__init__", "import triton.language as tl"),
    ("triton", "moe.layer", "def f():\n    from triton import jit"),
    ("transformers", "moe.models.decoder", "from transformers import PreTrainedModel"),
    ("lightning", "moe.training.loop", "import lightning.pytorch as pl"),
    ("pytorch_lightning", "moe.layer", "try:\n    import pytorch_lightning\nexcept ImportError:\n    pass"),
    ("accelerate", "moe.training.loop", "from accelerate import Accelerator"),
    ("outside", "moe.training.loop", "from tests.support import parity"),
    ("outside", "moe.layer", "import examples.train_lm"),
    ("outside", "examples.train_lm", "import benchmarks.common"),
    ("kernels", "moe.experts.operation", "from kernels.plan import plan"),
    ("kernels", "tests.kernels.test_plan", "import kernels"),
    ("hidden", "moe.layer", "def f():\n    from moe.types import Routing"),
    ("hidden", "moe.kernels.plan.__init__", "async def f():\n    from . import reference"),
    ("hidden", "moe.layer", "class A:\n    def f(self, name):\n        return importlib.import_module(name)"),
    ("hidden", "moe.layer", "moe = __import__('moe.models')"),
    ("facade", "moe.layer", "import moe"),
    ("facade", "moe.training.loop", "from moe import balance_loss"),
    ("unknown", "moe.utils", ""),
    ("file size", "moe.layer", "x = 1\n" * (MAX_FILE_LINES + 1)),
    ("function size", "tests.test_x", "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES + 1)),
    ("docstring", "moe.layer", "def f():\n    return 1"),
    ("docstring", "moe.layer", "class A:\n    x = 1"),
    ("docstring", "moe.layer", "class A:\n    'Doc.'\n    def f(self): ..."),
    ("module", "moe.kernels.plan.__init__", "class Plan(nn.Module):\n    'Doc.'"),
]


@pytest.mark.parametrize(("rule", "module", "source"), PLANTED)
def test_a_planted_violation_is_caught(rule: str, module: str, source: str) -> None:
    assert rule in {violation.rule for violation in violations(source, module)}


def test_every_rule_has_a_planted_violation() -> None:
    checker = (ROOT / "tests/support/architecture.py").read_text(encoding="utf-8")
    rules = set(re.findall(r'Violation\("([^"]+)"', checker)) | ONLY_IN.keys()
    assert rules == {rule for rule, _, _ in PLANTED}


LONG_DOCSTRING = 'def f():\n    """' + "Doc.\n" * 60 + '"""\n' + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
ALLOWED = [  # module, source
    ("moe.config", "from moe.errors import ConfigError\nfrom .types import Routing"),
    ("moe.kernels.plan.triton_backend", "import triton\n@triton.jit\ndef plan_kernel(): ..."),
    ("moe.kernels.plan.__init__", "from moe.kernels.plan.reference import plan\nfrom moe.kernels.gather import gather"),
    ("moe.layer", "import torch\nfrom moe import kernels, routing\nfrom moe.balance import Loss"),
    ("moe.__init__", "from moe.layer import MoE\nfrom .balance import balance_loss"),
    ("moe.parallel.mesh", "import torch.distributed as dist\nfrom moe.dispatch import Local"),
    ("moe.integrations.hf", "import transformers\nfrom moe.layer import MoE"),
    ("moe.serving.adapter", "import torch\nfrom moe.models import Decoder"),
    ("moe.serving.router", "import torchlike\nfrom moe.errors import MoEError\nfrom . import ring"),
    ("moe.training.report", "def f():\n    'Doc.'\n    import matplotlib"),
    ("tests.test_x", "from tests.support import parity\nimport examples.train_lm, hydra"),
    ("moe.layer", "def _f():\n    def g(): ...\nclass _A:\n    def f(self): ..."),
    ("moe.layer", LONG_DOCSTRING),
]


@pytest.mark.parametrize(("module", "source"), ALLOWED)
def test_what_the_rules_allow_passes(module: str, source: str) -> None:
    assert violations(source, module) == []
