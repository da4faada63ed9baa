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


def test_faults_are_found(tmp_path: Path) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)  # Triton reads a kernel's source from its file
    done = python("-c", f"import runpy; runpy.run_path({str(script)!r})", cache=tmp_path)
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert "spills" in lines["sm90 much"], done.stderr[-3000:]
    assert "bytes of shared memory, 232448 at most" in lines["sm90 wide"]
    assert "multiplies without wgmma" in lines["sm90 slow"]
    assert "launches nothing" in lines["sm90 none"]
    assert lines["sm90 good"] == "multiplies: fine"
