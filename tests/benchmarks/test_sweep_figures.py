"""What the sweep makes of its results, held against a hand; no training."""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from measure.timing import Spread
from omegaconf import OmegaConf
from PIL import Image
from sweep import figures, pictures, plots, tables
from sweep.figures import Estimate, Row
from sweep.race import Times
from sweep.result import FORMAT, Result, read_result, write_result

from moe.monitor import LoadStats

ROOT = Path(__file__).resolve().parents[2]


def load_of(counts, tokens=None, null=0):
    counts = list(counts)
    tokens = sum(counts) // 2 if tokens is None else tokens
    numbers = {"tokens_per_expert": counts, "dropped": 0, "tokens": tokens, "top_score_sum": 1.0}
    return numbers | {"num_null_experts": null}


def made(steps, evaluation=None, **changes):
    """A result with these counts of each layer in each step."""
    loads = [{layer: load_of(counts) for layer, counts in step.items()} for step in steps]
    final = loads[-1] if evaluation is None else {layer: load_of(counts) for layer, counts in evaluation.items()}
    words = {"fingerprint": "f", "pair": "p", "sweep": "s", "router": "softmax", "balance": "none", "kind": "nothing"}
    numbers = {"seed": 0, "top_k": 2, "loss": 2.0, "bits_per_byte": 3.0, "seconds": 9.0, "ended": 10.0}
    rest = {"step_seconds": [0.5, 0.1, 0.2], "machine": "this"}
    return replace(Result(FORMAT, **words, **numbers, **rest, steps=loads, evaluation=final), **changes)


def test_a_result_is_read_only_if_it_is_whole_and_of_these_settings(tmp_path):
    path, result = tmp_path / "result.json", made([{"a": [3, 1]}])
    assert read_result(path) is None
    write_result(path, result)
    assert read_result(path) == read_result(path, "f") == result
    assert read_result(path, "another") is None
    write_result(path, replace(result, format=FORMAT - 1))
    assert read_result(path) is None
    for spoilt in ("", "{", "[]", "3", '{"format": 1}', path.read_text()[:-1]):
        path.write_text(spoilt)
        assert read_result(path) is None


def test_figures_are_those_computed_by_hand():
    even, odd = {"a": [8, 8, 8, 8], "b": [8, 8, 8, 8]}, {"a": [16, 16, 0, 0], "b": [4, 4, 8, 16]}
    mirrored = {"a": [0, 0, 16, 16], "b": [12, 12, 8, 0]}
    steps = [odd] + [even] * 11 + [odd, mirrored, even, even]  # a tenth of 16 is the first, a quarter the last four
    found = figures.figures_of(made(steps, evaluation={"a": [20, 10, 10, 0], "b": [10, 10, 10, 10]}))
    assert found["early"] == pytest.approx((1.0 + 1.0) / 2)
    # Layer a: 1, 1, 0, 0. Layer b: 16/8 - 1, 12/8 - 1, 0, 0.
    assert found["late"] == pytest.approx((1 + 1 + 1 + 0.5) / 8)
    # All 32 in a; b has 4+12+8+8 = 32, 32, 32, 16+0+8+8 = 32: pooled it is even.
    assert found["pooled"] == pytest.approx(0)
    assert found["evaluation"] == pytest.approx((20 / 10 - 1 + 0) / 2)
    assert found["step_floor"] == pytest.approx(math.sqrt(2 * math.log(4) / 8))
    assert found["pooled_floor"] == pytest.approx(math.sqrt(2 * math.log(4) / 32))
    assert found["evaluation_floor"] == pytest.approx(math.sqrt(2 * math.log(4) / 10))
    # Of 8 late calls of 32: a is over 8 by 8 + 8, twice; b by 8, then by 4 + 4. Over 10: by 6 + 6 twice, 6, 2 + 2.
    assert found["drop_1.0"] == pytest.approx((16 + 16 + 8 + 8) / 256)
    assert found["drop_1.25"] == pytest.approx((12 + 12 + 6 + 4) / 256)
    deviations = [8, 8, math.sqrt((16 + 16 + 64) / 4), math.sqrt((16 + 16 + 64) / 4)]
    assert found["cv"] == pytest.approx(sum(deviations) / 8 / 8)
    assert found["entropy"] == pytest.approx(1)
    assert found["dead"] == found["null"] == 0
    assert found["experts"] == pytest.approx(2)
    assert found["seconds"] == 0.2


def test_dead_and_null_experts_of_the_late_steps():
    loads = [{"a": load_of([6, 0, 2, 8], tokens=8, null=1)}] * 4
    result = replace(made([{"a": [1]}]), steps=loads, evaluation=loads[0])
    found = figures.figures_of(result)
    assert found["dead"] == 1
    assert found["null"] == pytest.approx(0.5)
    assert found["experts"] == pytest.approx(1)
    # Four columns share 8 * 2 choices: an even share is 4, and the null expert's 8 drop nothing.
    assert found["drop_1.0"] == pytest.approx(2 / 8)
    assert found["drop_1.25"] == pytest.approx(1 / 8)
    assert found["late"] == pytest.approx(6 * 3 / 8 - 1)


def test_the_drop_rate_is_what_the_layer_drops():
    torch.manual_seed(1)
    ids = torch.stack([torch.randperm(5)[:2] for _ in range(37)])
    ids[:20, 0], ids[:20, 1] = 3, torch.randint(0, 3, (20,))
    counts = torch.bincount(ids.flatten(), minlength=5)
    load = LoadStats.from_numbers(load_of(counts.tolist(), tokens=37), torch.device("cpu"))
    for factor in (0.5, 1.0, 1.25, 10.0):
        room, dropped = [math.ceil(round(factor * 37 * 2 / 5, 9))] * 5, 0
        for expert in ids.flatten().tolist():
            dropped += room[expert] == 0
            room[expert] -= room[expert] > 0
        assert figures.drop_rate([load, load], 2, factor) == pytest.approx(dropped / 74)
    nothing = LoadStats.zero(5, torch.device("cpu"))
    assert figures.drop_rate([nothing], 2, 1.0) == 0


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # of 0.975, from a printed table
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (29, 2.045), (99, 1.984)],
)
def test_the_quantile_of_students_distribution(freedom, quantile):
    assert figures.student(0.975, freedom) == pytest.approx(quantile, abs=6e-4)
    assert figures.student(0.5, freedom) == pytest.approx(0, abs=1e-9)


def test_an_interval_over_seeds():
    found = Estimate.of([1.0, 2.0, 6.0])
    # Mean 3, squared deviations 4 + 1 + 9 = 14, standard deviation sqrt(7), 4.3027 * sqrt(7) / sqrt(3).
    assert (found.mean, found.n) == (3.0, 3)
    assert found.half == pytest.approx(6.573, abs=1e-3)
    assert tables.estimate(found, 2) == "3.00 ± 6.57"
    assert tables.estimate(Estimate.of([0.25]), 1, scale=100) == "25.0"


def row(name, bits, evaluation):
    return Row(name, "loss", name, [], {"bits_per_byte": Estimate.of([bits]), "evaluation": Estimate.of([evaluation])})


def test_the_frontier_is_what_nothing_beats_in_both():
    rows = [row("a", 2.0, 3.0), row("b", 2.1, 1.0), row("c", 2.1, 2.0), row("d", 2.2, 1.0), row("e", 2.3, 0.0)]
    assert [found.name for found in figures.frontier(rows)] == ["a", "b", "e"]
    twins = [row("a", 2.0, 1.0), row("b", 2.0, 1.0)]
    assert figures.frontier(twins) == twins


def test_rows_are_by_pair_and_the_best_is_first():
    worse = [made([{"a": [1, 3]}], pair="w", balance="switch", seed=seed, bits_per_byte=4.0) for seed in (1, 0)]
    first, second = figures.rows_of([*worse, made([{"a": [1, 3]}])])
    assert (first.name, len(first.results)) == ("softmax / none", 1)
    assert (second.name, [each.seed for each in second.results]) == ("softmax / switch", [0, 1])


def test_a_heat_map_shows_the_last_layer_over_an_even_share():
    steps = [{"a": [4, 4], "b": [8, 0]}] * 24 + [{"a": [4, 4], "b": [2, 6]}] * 24
    found = figures.heat_map(made(steps))
    assert found.shape == (2, figures.TIME_BINS)
    assert found[:, 0].tolist() == [2.0, 0.0]
    assert found[:, -1].tolist() == [0.5, 1.5]
    assert figures.heat_map(made(steps[:5])).shape == (2, 5)
    assert figures.heat_map(made([{"a": [0, 0]}])).tolist() == [[0.0], [0.0]]


def test_a_plot_of_many_pairs_stays_small(tmp_path):
    torch.manual_seed(0)
    steps = [{"a": torch.randint(95, 161, (64,)).tolist()} for _ in range(figures.TIME_BINS)]
    rows = [Row(f"softmax / {number}", "loss", "p", [made(steps)], {}) for number in range(25)]
    plots.plot_heat_maps(rows, tmp_path / "load.svg")
    first = (tmp_path / "load.svg").read_bytes()
    assert len(first) < 150_000
    plots.plot_heat_maps(rows, tmp_path / "load.svg")
    assert (tmp_path / "load.svg").read_bytes() == first


def test_times_are_ratios_within_a_round():
    seconds = {"one": [1.0, 2.0, 4.0], "two": [1.5, 2.0, 8.0]}
    ratios = Times("s", 3, 0, seconds, "this").ratios()
    assert ratios == {"one": Spread(1.0, 1.0, 1.0), "two": Spread(1.5, 1.25, 1.75)}
    assert list(tables.time_table(ratios, "one"))[-1] == "| two | 1.500 (1.250-1.750) |"


def test_violations_are_the_mean_over_layers_and_their_median_runs():
    steps = [{"a": [8, 8], "b": [8, 8]}, {"a": [16, 0], "b": [12, 4]}, {"a": [8, 8], "b": [12, 4]}]
    assert pictures.violations(made(steps)).tolist() == pytest.approx([0, 0.75, 0.25])
    smooth = pictures.running_median(np.array([9, 1, 8, 2, 7, 3, 6, 4, 5, 0, 0]))
    # Of the first five, six, ... nine values, then of nine around, and at the end of fewer again.
    assert smooth.tolist() == [7, 5, 6, 5, 5, 4, 4, 3.5, 4, 3.5, 4]


def a_page(steps, **changes):
    """The two halves of a page with one pair, drawn but not written."""
    rows = figures.rows_of([made(steps, **changes)])
    halves = Figure().subfigures(1, 2)
    pictures.plot_balance(halves[0], rows)
    pictures.plot_loads(halves[1], rows)
    return halves[0].axes[0], halves[1].axes[0]


def test_a_page_shows_what_its_results_say():
    steps = [{"a": [8, 8, 8, 8], "b": [1, 5, 16, 10]}] * 40
    balance, loads = a_page(steps, evaluation={"a": [32, 0, 0, 0], "b": [24, 8, 0, 0]})
    assert balance.get_yscale() == "log"
    line, _, pooled, evaluation, *floors = balance.get_lines()
    assert line.get_ydata().tolist() == pytest.approx([0.5] * 40)
    assert (pooled.get_ydata(), pooled.get_markerfacecolor()) == (pytest.approx([0.5]), "white")
    assert (evaluation.get_ydata(), evaluation.get_markerfacecolor()) == (pytest.approx([2.5]), line.get_color())
    assert floors[0].get_ydata() == pytest.approx([math.sqrt(2 * math.log(4) / 8)] * 2)
    (heat,) = loads.get_images()
    assert np.array(heat.get_array()).T.tolist() == [[2.0, 1.25, 0.625, 0.125]] * figures.TIME_BINS
    colors = [heat.cmap(heat.norm(load)) for load in (0.125, 0.95, 1.0, 1.05, 8.0)]
    assert colors[1] == colors[2] == colors[3]  # and about white
    assert min(colors[2][:3]) > 0.95
    assert max(colors[0][0], colors[4][2]) < 0.35
    assert all(spine.get_edgecolor() == to_rgba(line.get_color()) for spine in loads.spines.values())
    assert loads.get_title() == "softmax\nnone"


def test_an_exact_zero_has_a_place_and_other_numbers_of_experts_are_said():
    even = {"a": [8, 8, 8, 8]}
    balance, loads = a_page([even] * 4, top_k=3)
    assert balance.get_yscale() == "symlog"
    assert balance.get_ylim()[0] < 0
    assert loads.get_title() == "softmax\nnone\n2.0 experts a token"


def test_pictures_are_small_and_the_same_again_and_what_is_missing_is_said(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(pictures, "PAGES", {name: pictures.PAGES[name] for name in ("share-losses", "hash", "top-k")})
    job = SimpleNamespace(root=tmp_path, sweep="s")
    with pytest.raises(SystemExit, match="has no result of these settings"):
        pictures.write_pictures(job, tmp_path / "drawn")
    for name in pictures.PAGES["share-losses"][1:]:
        router, balance = name.split(" / ")
        for seed in (0, 1):
            steps = [{"a": torch.randint(0, 300, (64,)).tolist()} for _ in range(60)]
            (tmp_path / f"{router}-{balance}-{seed}").mkdir()
            path = tmp_path / f"{router}-{balance}-{seed}" / "result.json"
            write_result(path, made(steps, router=router, balance=balance, pair=name, seed=seed))
    pictures.write_pictures(job, tmp_path / "drawn")
    told = capsys.readouterr().err.splitlines()
    assert "share-losses: no result of softmax / none" in told
    assert "hash: no result of softmax / none, hash / none" in told
    drawn = {path.stem: path.read_bytes() for path in (tmp_path / "drawn").iterdir()}
    assert drawn.keys() == {"top-k", "share-losses"}
    assert all(len(picture) < 60_000 for picture in drawn.values())
    with Image.open(tmp_path / "drawn" / "share-losses.png") as picture:
        assert picture.width == 900
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    pictures.write_pictures(job, tmp_path / "drawn")
    assert {path.stem: path.read_bytes() for path in (tmp_path / "drawn").iterdir()} == drawn


def test_every_page_has_its_picture_of_pairs_that_are_trained():
    pairs = {
        f"{router} / {balance}" for router, balance in OmegaConf.load(ROOT / "benchmarks/conf/pairs/all.yaml").list
    }
    assert {name for names in pictures.PAGES.values() for name in names} <= pairs
    assert max(len(names) for names in pictures.PAGES.values()) <= len(pictures.STYLES)
    pages = [path for folder in ("routers", "balancers") for path in (ROOT / "docs" / folder).glob("*.md")]
    shown = {
        (page.stem, name)
        for page in pages
        for name in re.findall(r"\(\.\./_static/sweep/(.+?)\.png\)", page.read_text("utf-8"))
    }
    assert shown == {(name, name) for name in pictures.PAGES}
    assert {path.stem for path in (ROOT / "docs/_static/sweep").iterdir()} == pictures.PAGES.keys()
