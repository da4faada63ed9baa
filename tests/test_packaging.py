"""Checks how the package is put together: the link to kernels/, the wheel, and what `import moe` brings along."""

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FILES = {  # as they are imported -> where they lie; rglob follows no link, so each file is seen once
    Path("moe", *path.relative_to(ROOT).parts[folder == "moe" :]): path
    for folder in ("moe", "kernels")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file() and "__pycache__" not in path.parts
}
MODULES = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in FILES if path.suffix == ".py"]
FORWARD = """
import torch, moe
layer = moe.MoE(16, 32, 4)
y = layer(torch.randn(3, 5, 16))
y.sum().backward()
assert y.shape == (3, 5, 16) and y.isfinite().all()
assert all(p.grad is not None for p in layer.parameters())
print(moe.__file__)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command to its end, without a GPU, and return what it printed."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_moe_kernels_is_a_relative_link() -> None:
    link = ROOT / "moe" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert link.resolve() == ROOT / "kernels"


def test_git_keeps_the_link_as_a_link() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = run("git", "ls-files", "--stage", "moe/kernels", cwd=ROOT).split()
    assert listed, "git does not track moe/kernels"
    assert listed[0] == "120000"


def test_kernels_is_no_package_of_its_own() -> None:
    # With an __init__.py, `import kernels` from here would hide the distribution of that name, which transformers uses.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "from importlib.util import find_spec; spec = find_spec('kernels'); print(spec and spec.origin)"
    origin = run(sys.executable, "-c", code, cwd=ROOT).strip()
    assert origin == "None" or ROOT not in Path(origin).resolve().parents


@pytest.mark.parametrize("module", MODULES)
def test_every_module_can_be_imported(module: str) -> None:
    assert importlib.import_module(module).__doc__


def test_import_moe_is_quick_and_brings_no_extra_along() -> None:
    code = (
        "import time, torch; start = time.process_time(); import moe; print(time.process_time() - start, *sys.modules)"
    )
    seconds, *modules = run(sys.executable, "-c", f"import sys; {code}", cwd=ROOT).split()
    loaded = {name.partition(".")[0] for name in modules}
    extras = {"hydra", "omegaconf", "matplotlib", "rich", "tensorboard", "tokenizers", "transformers"}
    extras |= {"lightning", "accelerate"}
    if not torch.backends.cuda.is_built():
        extras.add("triton")
    assert "moe" in loaded
    assert not extras & loaded
    # Beside torch's own import, and in processor time, which does not grow with the machine's load: 0.1 s was measured,
    # so a whole second says that something heavy came in.
    assert float(seconds) < 1.0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy, since setuptools packs what an earlier build left in build/."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("moe", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", ".", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        (top_level,) = (name for name in packed if name.endswith("top_level.txt"))
        assert archive.read(top_level).decode().split() == ["moe"]
    assert {name for name in packed if ".dist-info/" not in name} == {path.as_posix() for path in FILES}
    assert any(name.endswith("licenses/LICENSE") for name in packed)


@pytest.mark.slow
def test_the_installed_wheel_runs_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel, cwd=elsewhere)
    imported = run(sys.executable, "-W", "error", "-c", FORWARD, cwd=elsewhere, PYTHONPATH=str(target)).strip()
    assert Path(imported) == target / "moe" / "__init__.py"
    assert sorted(path.name for path in target.iterdir() if path.suffix != ".dist-info") == ["moe"]
