"""Holds the documentation to the code: its programs run, its links lead somewhere, its tables are complete."""

import importlib
import inspect
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import moe.errors
from moe.kernels.combine import combine_rows
from moe.kernels.experts import run_experts
from moe.kernels.gather import gather_rows
from moe.kernels.grouped_mm import grouped_mm
from moe.kernels.margins import count_margins
from moe.kernels.plan import make_plan
from moe.kernels.route import route
from moe.kernels.route.logits import router_logits
from moe.routing import ROUTERS
from moe.training.launch import launch
from moe.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CONF = ROOT / "examples" / "conf"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LAYER = "blocks.1.ffn"
"""The name of the tiny run's one MoE layer."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def rows(page: Path, head: str) -> list[list[str]]:
    """The cells of the table whose first column is called ``head``."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {head} |"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def code(cell: str) -> str:
    """What stands between the backticks of a cell that holds nothing else; a code span keeps its spaces."""
    match = re.fullmatch(r"`([^`]*)`", cell)
    assert match, f"{cell!r} is not one word of code"
    return match[1]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run called ``first`` has ended, as the pages that read one suppose."""
    here = tmp_path_factory.mktemp("docs")
    (here / "text.txt").write_text(
        "".join(f"the {i}th line says that {i * i} is the square of {i}\n" for i in range(200))
    )
    settings = composed(
        "model.dim=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "model.ffn_hidden_dim=24",
        "model.moe.hidden_dim=16", "model.moe.num_experts=4", "optim.schedule.warmup_steps=1", "run.name=first",
        "run.device=cpu", "run.threads=1", "run.sample_tokens=4", "run.steps=4", "run.batch_size=2", "run.seq_len=16",
        "run.log_every=2", "run.eval_every=2", "run.eval_windows=4", "run.precision=float32",
        f"run.root={here}/runs", f"data.path={here}/text.txt", f"data.cache_dir={here}/cache",
    )  # fmt: skip
    settings["optim"]["adamw"]["betas"] = (0.9, 0.95)  # YAML has lists only, and the annotation is checked here
    launch(settings)
    return here


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base=None):
        settings = OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_the_programs_of_a_page_run(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    routers = dict(ROUTERS)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page, "python"):
        # The real file and line in a traceback: as many empty lines in front as the page has.
        before = page.read_text(encoding="utf-8").partition(block)[0].count("\n")
        exec(compile("\n" * before + block, name_of(page), "exec"), namespace)
    assert routers == ROUTERS, "a page changed what all pages share"


def test_the_readme_uses_the_layer_in_about_thirty_lines() -> None:
    (program,) = blocks(ROOT / "README.md", "python")
    assert 20 <= len(program.splitlines()) <= 35
    for name in ("moe.MoE(", "moe.balance_loss(", "moe.balance_step("):
        assert name in program


def test_the_readme_starts_with_the_two_commands() -> None:
    first = FENCE.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert first
    assert [line.split("#")[0].strip() for line in first[2].splitlines()] == ["make train", "make test"]


def links(page: Path) -> Iterator[str]:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    yield from re.findall(r"\]\(([^)\s]+)\)", prose)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        assert not anchor, f"{link}: link to pages, whose names are checked"
        assert (page.parent / unquote(path)).is_file(), f"{name_of(page)} links to {link}, which is no file"


def toctree(page: Path) -> Iterator[Path]:
    for body in re.findall(r"^```\{toctree\}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        entries = (line.strip() for line in body.splitlines() if line.strip() and not line.startswith(":"))
        yield from (page.parent / f"{entry}.md" for entry in entries)


def test_every_page_is_in_the_contents() -> None:
    found, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        found.add(page)
        waiting += toctree(page)
    assert found == {page for page in PAGES if DOCS in page.parents}


def commands(page: Path) -> Iterator[list[str]]:
    """The settings of each command line that trains, wherever it stands on a page."""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("python examples/train_lm.py"):
            yield shlex.split(line.replace("$HOME", "home"))[2:]
        for arguments in re.findall(r'make train ARGS="([^"]*)"', line):
            yield shlex.split(arguments)


@pytest.mark.parametrize("page", [p for p in PAGES if list(commands(p))], ids=name_of)
def test_command_lines_can_be_composed(page: Path) -> None:
    for overrides in commands(page):
        settings = composed(*itertools.takewhile(lambda word: not word.startswith("--"), overrides))
        assert settings["run"]["steps"] > 0


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of all that is no mapping."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def test_the_settings_table_is_complete() -> None:
    page = DOCS / "reference" / "settings.md"
    groups = {code(group): re.findall(r"`(\w+)`", choices.partition(":")[0]) for group, choices in rows(page, "group")}
    files = {folder.name: {file.stem for file in folder.glob("*.yaml")} for folder in CONF.iterdir() if folder.is_dir()}
    assert {group: set(choices) for group, choices in groups.items()} == files

    defaults = leaves(composed())
    keys = set(defaults)
    for group, choices in files.items():
        for choice in choices:
            keys |= leaves(composed(f"{group}={choice}")).keys()
    table = {code(key): default for key, default, _ in rows(page, "key")}
    assert table.keys() == keys
    for key, default in table.items():
        if default == "-":
            assert key not in defaults, key
        else:
            # YAML 1.1 reads 1e-05 as a word, and strips a word's spaces.
            shown = code(default)
            value = defaults[key]
            assert (shown if isinstance(value, str) else json.loads(shown)) == value, key


def test_the_metrics_table_is_complete(workplace: Path) -> None:
    kinds: dict[str, set[str]] = {}
    for line in read_metrics(workplace / "runs" / "first" / "metrics.jsonl"):
        kind = "training" if "train/loss" in line else "validation" if "val/loss" in line else "last"
        for key in line:
            kinds.setdefault(key.replace(LAYER, "<layer>"), set()).add(kind)
    written = {key: "all" if len(found) == 3 else " ".join(found) for key, found in kinds.items()}
    table = {code(key): lines for key, lines, _ in rows(DOCS / "reference" / "metrics.md", "key")}
    assert table == written


def test_the_tables_of_files_are_complete(workplace: Path) -> None:
    run = workplace / "runs" / "first"
    text = (DOCS / "reference" / "run-folder.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| file \|[^\n]*\n\|[-|]*\n((?:\|[^\n]*\n)+)", text, re.MULTILINE)
    named = [{line.split("`")[1].rstrip("/") for line in table.splitlines()} for table in tables]
    assert named == [
        {path.name for path in folder.iterdir()} for folder in (run, run / "checkpoints" / "step_00000004")
    ]
    assert set(yaml.safe_load((run / "config.yaml").read_text())) == set(composed())


OPERATIONS = (router_logits, route, run_experts, make_plan, gather_rows, grouped_mm, combine_rows, count_margins)


def test_routers_losses_and_operations_are_all_described() -> None:
    assert {code(row[0]) for row in rows(DOCS / "howto" / "choose-a-router.md", "name")} == set(ROUTERS)
    operations = {code(row[0]) for row in rows(DOCS / "reference" / "kernels.md", "operation")}
    assert operations == {op.__name__ for op in OPERATIONS}
    errors = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    classes = {name for name, kind in vars(moe.errors).items() if inspect.isclass(kind)} - {"MoEError"}
    assert not {name for name in classes if f"`{name}`" not in errors.partition("## What raises what")[2]}


PACKAGES = ["moe", "moe.routing", "moe.balance", "moe.experts", "moe.dispatch", "moe.monitor", "moe.models"]
PACKAGES += ["moe.parallel", "moe.verify", "moe.checkpoint", "moe.training.data", "moe.training.report"]
PACKAGES += ["moe.integrations"]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name(package: str) -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    whole = re.findall(r"^\.\. automodule:: (\S+)\n +:members:$", text, re.MULTILINE)
    lists = re.findall(r"^\.\. automodule:: (\S+)\n +:members: (\S[^\n]*)$", text, re.MULTILINE)
    single = set(re.findall(r"^\.\. auto(?:class|function|data):: (\S+)$", text, re.MULTILINE))
    single |= {f"{module}.{name}" for module, names in lists for name in names.split(", ")}
    single |= set(re.findall(r"`(moe\.\w+)`", (DOCS / "reference" / "moe.md").read_text(encoding="utf-8")))
    public = importlib.import_module(package).__all__
    missing = [name for name in public if package not in whole and f"{package}.{name}" not in single]
    assert not missing
