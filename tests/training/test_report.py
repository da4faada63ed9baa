import json
import math
import re
import runpy
import sys
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from moe.errors import DataError
from moe.training.metrics import MetricsWriter
from moe.training.report import RunSummary, write_report
from moe.training.report.summary import read_summary
from moe.training.run_folder import RunFolder

CONFIG = "seed: 0\nmodel:\n  dim: 64\n  layers:\n  - 1\n  - 3\n\ndata:\n  path: stdlib\n"
SUMMARY = RunSummary(
    total_parameters=6_412_416,
    active_parameters=1_893_120,
    top_k=2,
    validation_tokens=4096,
    unigram_bits_per_byte=4.5,
    gzip_bits_per_byte=2.25,
    skipped_count=1,
    skipped_files=("a.txt: not UTF-8",),
    prompt="def f(",
    sample="x):\n    return x",
    hardware="2 CPU cores",
    versions={"torch": "2.13.0"},
)
HOSTILE = "</pre></script><script>alert(1)</script><img src=http://a.example/x.png onerror=alert(2)>'\"&"
TRAINING = ["loss", "bits-per-byte", "learning-rate", "grad-norm", "balance-loss", "speed"]
BALANCE = ["max-vio", "cv", "entropy", "dead-experts", "drop-rate", "confidence"]


class Page(HTMLParser):
    """What a browser would find: elements with their attributes and the text in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.figures: dict[str, set[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], "an element is never closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.elements.append((tag, values))
        if tag == "figure":
            self.figures[values["id"]] = set()
        elif "figure" in self._open:
            self.figures[list(self.figures)[-1]].add(tag)
        if tag not in {"meta", "link"}:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def line(step: int, layers: Mapping[str, list[float]]) -> dict[str, float | int | list[float]]:
    values: dict[str, float | int | list[float]] = {
        "tokens": 512 * step,
        "seconds": 0.5 * step,
        "train/loss": 4.0 / step,
        "train/balance_loss": 0.01 / step,
        "train/grad_norm": 1.0,
        "train/learning_rate": 0.001,
        "train/tokens_per_second": 1000.0 + step,
        "train/skipped_steps": 3,
    }
    for layer, load in layers.items():
        shares = np.array(load)
        values |= {
            f"balance/max_vio/{layer}": float(shares.max() * len(load) - 1),
            f"balance/cv/{layer}": float(shares.std() * len(load)),
            f"balance/entropy/{layer}": 0.9876,
            f"balance/dead_experts/{layer}": int((shares == 0).sum()),
            f"balance/drop_rate/{layer}": 0.0125,
            f"balance/confidence/{layer}": 0.6,
            f"balance/load/{layer}": load,
        }
    return values


def make_run(
    root: Path, layers: Mapping[str, list[float]], *, steps: int = 6, status: str | None = "finished"
) -> RunFolder:
    folder = RunFolder.open(root, "run")
    folder.write_config(CONFIG)
    with MetricsWriter(folder) as writer:
        for step in range(1, steps + 1):
            writer.write(step, line(step, layers))
        if steps > 1:
            layers_checked = {f"val/max_vio/{layer}": 0.75 for layer in layers}
            writer.write(steps, {"val/loss": 1.5, "val/bits_per_byte": 2.125, **layers_checked})
        if status is not None:
            writer.write(steps, {"tokens": 512 * steps, "seconds": 90.0, "run/status": status})
    return folder


def read_page(folder: RunFolder, summary: RunSummary | None = SUMMARY) -> Page:
    return Page(write_report(folder, summary).read_text(encoding="utf-8"))


LAYERS = {"blocks.1.ffn": [0.25, 0.25, 0.25, 0.25], "blocks.3.ffn": [0.5, 0.25, 0.25, 0.0]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("runs"), LAYERS)


@pytest.fixture(scope="module")
def page(run: RunFolder) -> Page:
    return read_page(run)


def test_every_figure_is_drawn(page: Page) -> None:
    assert list(page.figures) == [*TRAINING, "load-0", "load-1", *BALANCE]
    assert all({"svg", "path"} <= tags for tags in page.figures.values())
    assert {key for key, tags in page.figures.items() if "image" in tags} == {"load-0", "load-1"}


def assert_self_contained(page: Page) -> None:
    """No element can make a browser ask for anything, and every inner link leads somewhere."""
    ids = [values["id"] for _, values in page.elements if "id" in values]
    assert len(ids) == len(set(ids))
    for tag, values in page.elements:
        assert tag not in {"script", "iframe", "object", "embed", "base", "img"}
        for key, value in values.items():
            assert not key.startswith("on")
            if key in {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}:
                assert value.startswith("data:") or value.removeprefix("#") in ids, value
            for target in re.findall(r"url\(([^)]*)\)", value):
                assert target.removeprefix("#") in ids
    policy = next(values["content"] for _, values in page.elements if "http-equiv" in values)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_the_page_asks_for_nothing_from_outside(run: RunFolder, page: Page) -> None:
    assert_self_contained(page)
    text = run.report.read_text(encoding="utf-8")
    assert "://" not in text  # not even a namespace or a comment
    assert "@import" not in text
    assert run.report.stat().st_size < 500_000


def test_headline_numbers(page: Page) -> None:
    # 2 of 4 tokens' experts of a step of 512 tokens: after 6 steps n = 6 * 512 * 2 / 4 tokens an expert.
    floor = math.sqrt(2 * math.log(4) / (6 * 512 * 2 / 4))
    for words in (
        "Validation, bits per byte 2.125 unigram bytes 4.500 gzip -9 2.250",
        f"Worst MaxVio 1.000 blocks.3.ffn sampling floor {floor:.3f}",
        "Tokens per second 34 ",  # 3072 tokens in 90 seconds
        "Parameters 6.41 M 1.89 M met by one token",
        "Wall time 1 min 30 s 6 steps",
        "Tokens seen 3.07 k 512 a step",
        "Skipped steps 3 ",
        "Data files skipped 1 ",
        "run finished 2 CPU cores",
    ):
        assert words in page.text


def test_final_balance_of_each_layer(page: Page) -> None:
    trained, checked = (math.sqrt(2 * math.log(4) / (tokens * 2 / 4)) for tokens in (6 * 512, 4096))
    rest = f"0.9876 {{dead}} 1.25 % 0.600 0.750 {checked:.3f}"
    assert f"blocks.1.ffn 4 0.000 {trained:.3f} 0.000 {rest.format(dead=0)}" in page.text
    assert f"blocks.3.ffn 4 1.000 {trained:.3f} 0.707 {rest.format(dead=1)}" in page.text


def test_settings_sample_and_versions_are_shown(page: Page) -> None:
    assert "def f( x):\n    return x" in " ".join(page.texts)
    for words in ("seed: 0", "model dim: 64 layers: - 1 - 3", "data path: stdlib", "torch 2.13.0", "a.txt: not UTF-8"):
        assert words in page.text


def test_reference_lines_are_named(run: RunFolder) -> None:
    figure = run.report.read_text(encoding="utf-8").split('<figure id="bits-per-byte">')[1].split("</figure>")[0]
    assert "unigram bytes 4.50" in figure
    assert "gzip -9 2.25" in figure


def run_report() -> None:
    """``python -m moe.training.report``, whether or not another test has imported that module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "moe.training.report.__main__", raising=False)
        runpy.run_module("moe.training.report", run_name="__main__")


def test_the_page_can_be_made_again_from_the_folder_alone(
    run: RunFolder, page: Page, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = run.report.read_bytes()
    run.report.unlink()
    monkeypatch.setattr("sys.argv", ["report", str(run.path)])
    with pytest.raises(SystemExit, match=r"^0$"):
        run_report()
    assert capsys.readouterr().out.strip() == str(run.report)
    assert run.report.read_bytes() == before


def test_a_folder_that_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^2$"):
        run_report()
    assert "is not a run folder: it has no metrics.jsonl" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path, {HOSTILE: [0.5, 0.5], "$x_1$": [0.5, 0.5]}, status=HOSTILE)
    folder.write_config(f"{HOSTILE}:\n  key: {HOSTILE}\n")
    summary = replace(
        SUMMARY,
        prompt=HOSTILE,
        sample=HOSTILE,
        hardware=HOSTILE,
        versions={HOSTILE: HOSTILE},
        skipped_count=3,
        skipped_files=(HOSTILE,),
    )
    page = read_page(folder, summary)
    assert_self_contained(page)
    # sample and prompt, setting and its group, status, hardware, version twice, file, and the layer where it is named
    assert page.text.count("<script>alert(1)</script>") >= 12


def test_a_dense_run_has_no_word_on_experts(tmp_path: Path) -> None:
    page = read_page(make_run(tmp_path, {}, status="interrupted"), replace(SUMMARY, top_k=0))
    assert list(page.figures) == [key for key in TRAINING if key != "balance-loss"]
    assert "Worst MaxVio \u2013 no layer with experts" in page.text
    assert "Balance" not in page.text
    assert "run interrupted" in page.text
    assert_self_contained(page)


def test_a_run_that_was_killed_after_one_line(tmp_path: Path) -> None:
    page = read_page(make_run(tmp_path, LAYERS, steps=1, status=None), None)  # no summary was ever written
    assert list(page.figures) == [
        *[key for key in TRAINING if key != "bits-per-byte"], "load-0", "load-1", *BALANCE,
    ]  # fmt: skip
    assert "running, or killed" in page.text
    assert "Validation, bits per byte \u2013" in page.text
    assert "Sample" not in page.text
    assert_self_contained(page)


def test_a_run_without_any_line(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, "run")
    MetricsWriter(folder).close()
    page = read_page(folder)
    assert page.figures == {}
    assert "The run has no config.yaml." in page.text


def test_numbers_that_were_not_finite(tmp_path: Path) -> None:
    folder = make_run(tmp_path, LAYERS, steps=1, status=None)
    with MetricsWriter(folder, resume_step=1) as writer:
        writer.write(2, {"train/loss": math.nan, "val/bits_per_byte": math.nan, "balance/max_vio/blocks.3.ffn": None})
    page = read_page(folder)
    assert "Validation, bits per byte not finite" in page.text
    assert "bits-per-byte" not in page.figures
    assert "Worst MaxVio 0.000 blocks.1.ffn" in page.text


def test_summary_of_another_kind_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path, {}, steps=1)
    for text in ("{", "[]", '{"colour": "red"}'):
        folder.summary.write_text(text)
        with pytest.raises(DataError, match=r"summary\.json' is not a run's summary"):
            write_report(folder)


def test_summary_survives_the_file(run: RunFolder, page: Page) -> None:
    assert json.loads(run.summary.read_text())["skipped_files"] == ["a.txt: not UTF-8"]
    assert read_summary(run) == SUMMARY
