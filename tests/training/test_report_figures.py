"""The parts of the report: what its figures show, and how its numbers are written."""

import base64
import io
import math
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread

from moe.training.metrics import MetricsWriter
from moe.training.report import write_report
from moe.training.report.figures import Chart, Line, draw
from moe.training.report.heatmap import color_half_range, draw_load, resample
from moe.training.report.history import Curve, Loads
from moe.training.report.numbers import decimal, duration, percent, short_count
from moe.training.report.page import split_settings
from moe.training.run_folder import RunFolder


@pytest.mark.parametrize("experts", [1, 2, 256])
def test_load_map_shows_every_expert_against_an_even_share(experts: int) -> None:
    shares = np.full((3, experts), 1 / experts)
    if experts > 1:
        shares[:, 0], shares[:, -1] = 0.0, 2 / experts
    drawing = draw_load("key", "layer", Loads(np.array([1.0, 2.0, 3.0]), shares), 1.0, experts)
    data = re.search(r"data:image/png;base64,([^\"]*)\"", drawing.svg)
    assert data is not None
    picture = imread(io.BytesIO(base64.b64decode(data.group(1))), format="png")
    assert picture.shape == (experts, 3, 4)  # one pixel an expert and a line, nothing blurred
    red, blue, alpha = picture[..., 0], picture[..., 2], picture[..., 3]
    if experts == 1:
        assert (alpha == 0).all()
        return
    assert (blue[0] > red[0]).all()
    assert (red[-1] > blue[-1]).all()
    assert (alpha[[0, -1]] == 1).all()
    assert (alpha[1:-1] == 0).all()


def test_load_map_names_its_scale() -> None:
    loads = Loads(np.array([1.0, 2.0]), np.array([[0.5, 0.5], [0.4, 0.6]]))
    drawing = draw_load("key", "layer", loads, color_half_range([loads]), 2)
    for word in ("0.8/E", "1/E", "1.2/E", "expert", "step", "share of the load"):
        assert f">{word}</text>" in drawing.svg


def test_colours_reach_as_far_as_usual_loads() -> None:
    def half_range(share: float) -> float:
        return color_half_range([Loads(np.array([1.0]), np.array([[share, 1 - share]]))])

    assert [half_range(share) for share in (0.5, 0.55, 0.625, 1.0)] == [0.2, 0.2, 0.5, 1.0]


def test_resampling_keeps_even_steps_and_averages_crowded_ones() -> None:
    shares = np.array([[0.0, 1.0], [0.2, 0.8], [0.4, 0.6], [0.6, 0.4]])
    picture, edges = resample(Loads(np.array([10.0, 20.0, 30.0, 40.0]), shares), 240)
    np.testing.assert_array_equal(picture, shares)
    assert edges == (5.0, 45.0)
    picture, _ = resample(Loads(np.array([10.0, 20.0, 30.0, 40.0]), shares), 2)
    np.testing.assert_allclose(picture, [[0.1, 0.9], [0.5, 0.5]], rtol=1e-15)
    # The middle column of three has no line: it repeats the first.
    picture, _ = resample(Loads(np.array([0.0, 1.0, 100.0]), shares[:3]), 3)
    np.testing.assert_allclose(picture, [[0.1, 0.9], [0.1, 0.9], [0.4, 0.6]], rtol=1e-15)


def test_thinning_keeps_the_extremes_and_invents_nothing() -> None:
    values = np.sin(np.arange(1000.0))
    values[517], values[800:900] = 50.0, np.nan
    curve = Curve(np.arange(1000.0), values)
    thin = curve.thinned(100)
    assert len(thin.steps) <= 100
    assert (np.diff(thin.steps) > 0).all()
    np.testing.assert_array_equal(thin.values, values[thin.steps.astype(int)])
    assert np.nanmax(thin.values) == 50.0
    assert np.nanmin(thin.values) == np.nanmin(values)
    assert np.isnan(thin.values).any()  # the gap stays a gap
    assert curve.thinned(1000) is curve


def test_user_settings_of_matplotlib_do_not_reach_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [Line(Curve(np.array([1.0, 2.0]), np.array([3.0, 4.0])))]
    before = draw(Chart("key", "title", "note", "unit"), lines)
    monkeypatch.setitem(mpl.rcParams, "xtick.labelsize", 30.0)
    assert draw(Chart("key", "title", "note", "unit"), lines) == before
    assert before is not None


def test_numbers_for_readers() -> None:
    counts = {0.0: "0", 999.4: "999", 999.5: "1.00 k", 12345.0: "12.3 k", 999_499.0: "999 k", 999_600.0: "1.00 M"}
    times = {0.25: "0.2 s", 9.94: "9.9 s", 9.96: "10 s", 59.6: "1 min 0 s", 3599.6: "1 h 0 min", 90000.0: "1 d 1 h"}
    assert {value: short_count(value) for value in counts} == counts
    assert {value: duration(value) for value in times} == times
    assert decimal(1.0) == "1.000"
    assert percent(0.0125) == "1.25 %"
    for write in (short_count, duration, decimal, percent):
        assert write(None) == "\u2013"
        assert write(math.nan) == "not finite"


def test_every_line_of_the_settings_is_kept() -> None:
    config = "# by hand\nseed: 0\nmodel:\n  dim: 64\n\n  layers:\n  - 1\nempty: {}\ndata:\n- a\n- b\nlast: x\n"
    sections = [(section.title, section.body) for section in split_settings(config)]
    assert sections == [
        ("general", "# by hand\nseed: 0\nempty: {}\nlast: x"),
        ("model", "dim: 64\n\nlayers:\n- 1"),
        ("data", "- a\n- b"),
    ]
    assert split_settings("") == []


@pytest.mark.parametrize("balance_loss", [0.0, 0.01])
def test_a_balance_loss_of_zero_has_no_curve(tmp_path: Path, balance_loss: float) -> None:
    folder = RunFolder.open(tmp_path, "run")
    values = {"tokens": 8, "seconds": 1.0, "train/loss": 1.0, "train/balance_loss": balance_loss}
    with MetricsWriter(folder) as writer:
        for step in (1, 2):
            writer.write(step, values | {"balance/max_vio/layer": 0.0, "balance/load/layer": [0.5, 0.5]})
    page = write_report(folder, None).read_text(encoding="utf-8")
    assert ("Added to the loss, coefficients included." in page) == (balance_loss > 0)
    assert "Cross entropy of the next token." in page
