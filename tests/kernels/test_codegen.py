"""Every kernel, compiled for every kind of GPU: nothing spills, all fits, and products run on the matrix units."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton, which compiles the kernels, is not installed"),
]

ROOT = Path(__file__).parents[2]

# Kernels with one fault each. A program of one warp cannot keep 8192 numbers in registers while it sorts them.
FAULTY = """
import torch, triton, triton.language as tl
from tests.support.codegen import check

@triton.jit
def hoards(x, out):
    at = tl.arange(0, 8192)
    tl.store(out + at, tl.sort(tl.load(x + at)))

@triton.jit
def multiplies(x, out, N: tl.constexpr, STEPS: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    total = tl.zeros((N, N), tl.float32)
    for step in range(STEPS):
        total = tl.dot(tl.load(x + at + step * N), tl.load(x + at), total, input_precision="ieee")
    tl.store(out + at, total)

def launch(kernel, dtype, *sizes, **options):
    make = lambda: torch.empty(2**16, device="cuda", dtype=dtype)
    return lambda: kernel[(1,)](make(), make(), *sizes, **options)

check("sm90", {
    "much": launch(hoards, torch.float32, num_warps=1),
    "wide": launch(multiplies, torch.float16, 128, 64, num_stages=9, num_warps=8),
    "slow": launch(multiplies, torch.float32, 16, 1),
    "none": lambda: None,
    "good": launch(multiplies, torch.float16, 64, 1),
    "both": lambda: (launch(multiplies, torch.float32, 16, 1)(), launch(multiplies, torch.float16, 64, 1)()),
})
"""


def python(*command: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("gpu", ["sm80", "sm90", "sm100", "gfx942"])
def test_every_tile_fits_and_spills_nothing(gpu: str, tmp_path: Path) -> None:
    done = python("-m", "tests.support.codegen", gpu, cache=tmp_path)
    assert done.returncode == 0, f"{done.stderr[-3000:]}\n{done.stdout}"
    assert f"{gpu} forward: grouped_mm_kernel: fine" in done.stdout


# Results that overwrite operands: an element must be loaded and stored by one thread. The last is the counterexample.
IN_PLACE = """
import torch
from moe.kernels.experts.triton_activation import BLOCK_COLUMNS, BLOCK_ROWS, activation_backward, can_overwrite
from tests.support.codegen import GPUS, layouts, recorded

for activation, hidden_dim in (("swiglu", 48), ("swiglu", 1024), ("relu", 50), ("swiglu", 50)):
    make = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype)
    up, hidden = make(64, hidden_dim * (2 if activation == "swiglu" else 1)), make(64, hidden_dim)
    routing = (make(16, 4, dtype=torch.float32), make(64, dtype=torch.int32), make(9, dtype=torch.int32))
    with recorded(GPUS["{gpu}"]) as compiled:
        activation_backward(up, hidden, *routing, make(16, 32), None, up, hidden, activation)
    found = layouts(compiled[0], f"{{BLOCK_ROWS}}x{{BLOCK_COLUMNS}}")
    print(activation, hidden_dim, can_overwrite(hidden_dim, activation), len(found))
"""


@pytest.mark.parametrize("gpu", ["sm90", "gfx942"])
def test_results_overwrite_operands_where_both_have_one_layout(gpu: str, tmp_path: Path) -> None:
    done = python("-c", IN_PLACE.format(gpu=gpu), cache=tmp_path)
    expected = ["swiglu 48 True 1", "swiglu 1024 True 1", "relu 50 True 1", "swiglu 50 False 2"]
    assert done.stdout.splitlines() == expected, done.stderr[-3000:]


def test_faults_are_found(tmp_path: Path) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)  # Triton reads a kernel's source from its file
    done = python("-c", f"import runpy; runpy.run_path({str(script)!r})", cache=tmp_path)
    lines: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        case, found = line.split(": ", 1)
        lines.setdefault(case, []).append(found)
    assert "spills" in lines["sm90 much"][0], done.stderr[-3000:]
    assert "bytes of shared memory, 232448 at most" in lines["sm90 wide"][0]
    assert "multiplies without wgmma" in lines["sm90 slow"][0]
    assert "launches nothing" in lines["sm90 none"][0]
    assert lines["sm90 good"] == ["multiplies: fine"]
    slow, good = lines["sm90 both"]  # launches of one kernel, each judged
    assert (slow, good) == (lines["sm90 slow"][0], "multiplies: fine")
