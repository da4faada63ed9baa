"""The sweep over routers and balance: from end to end on a tiny model, and its figures held against a hand."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import utilization
from hydra import initialize_config_dir
from hydra.errors import HydraException
from measure.timing import Spread
from sweep import children, figures, plots, tables
from sweep.figures import Estimate, Row
from sweep.job import read_job
from sweep.race import read_times
from sweep.result import FORMAT, Result, read_result, write_result
from sweep.train import StepLog, kind_of, train

from moe.balance import BIAS_RULES, LOSSES, make_balance
from moe.monitor import LoadStats
from moe.routing import ROUTERS

CONF = Path(utilization.HERE) / "conf"
TINY = [
    *("model.dim=16", "model.num_heads=2", "model.num_kv_heads=1", "model.moe.hidden_dim=8", "model.moe.num_experts=4"),
    *(
        "model.moe.top_k=2",
        "run.steps=8",
        "run.batch_size=2",
        "run.seq_len=16",
        "run.eval_windows=4",
        "run.log_every=8",
    ),
    "optim.schedule.warmup_steps=1",
]


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """Arguments of a tiny sweep in an empty folder."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"the {i}th line says that {i * i} is the square of {i}\n" for i in range(200)))
    return [*TINY, "data.path=text.txt", "data.cache_dir=cache", "root=runs", "results=results"]


@pytest.fixture
def composing():
    with initialize_config_dir(str(CONF), version_base=None):
        yield


def run(monkeypatch, *arguments):
    """What the command line does; returns what it exits with."""
    monkeypatch.setattr(sys, "argv", ["utilization.py", *arguments])
    try:
        utilization.main()
    except SystemExit as end:
        return end.code
    return 0


def results():
    found = [read_result(path) for path in sorted(Path("runs").glob("*/result.json"))]
    return {(result.router, result.balance, result.seed): result for result in found if result is not None}


@pytest.mark.slow
def test_a_sweep_is_trained_once_and_reported(shared, monkeypatch, capfd):
    sweep = ["-m", "router=softmax,sigmoid", "balance=score_bias", *shared]
    assert run(monkeypatch, *sweep) == 0
    found = results()
    assert found.keys() == {(router, "score_bias", 0) for router in ("softmax", "sigmoid")}
    one = found["softmax", "score_bias", 0]
    assert len(one.steps) == 8
    assert len(one.step_seconds) == 7
    assert one.kind == "bias"
    assert one.bits_per_byte == pytest.approx(one.loss / math.log(2), rel=0.1)  # a separator is a token of no byte
    assert {load["tokens"] for step in one.steps for load in step.values()} == {2 * 16}
    assert {load["tokens"] for load in one.evaluation.values()} == {4 * 16}
    assert not list(Path("runs").glob("*/*/checkpoints"))

    times = {path: path.stat().st_mtime_ns for path in Path("runs").glob("*/result.json")}
    torn = next(iter(times))
    whole = torn.read_text()
    torn.write_text(whole[: len(whole) // 2])
    capfd.readouterr()
    assert run(monkeypatch, *sweep) == 0
    assert capfd.readouterr().err.count("was done") == 1
    again = json.loads(torn.read_text())
    assert again["steps"] == json.loads(whole)["steps"]  # the same text in the same order, and the same weights
    assert [path for path, time in times.items() if path.stat().st_mtime_ns != time] == [torn]

    pairs = "pairs.list=[[softmax,score_bias],[sigmoid,score_bias],[softmax,none]]"
    times = ["mode=timing", "timing.rounds=3", "timing.warmup=1", pairs, *shared]
    assert run(monkeypatch, *times) == 0
    report = ["mode=report", pairs, "seeds=[0]", *shared]
    assert run(monkeypatch, *report) == 0
    (page,) = Path("results").glob("utilization_*.md")
    text = page.read_text()
    assert f"`python benchmarks/utilization.py {' '.join(report)}`" in text
    assert f"torch {torch.__version__}" in text
    assert "2 trainings took" in text
    assert text.count("is missing: not trained") == 1
    bits = {router: each.bits_per_byte for (router, _, _), each in found.items()}
    lines = [line for line in text.splitlines() if "/ score_bias | 1 |" in line]
    for number, (line, router) in enumerate(zip(lines, sorted(bits, key=lambda router: bits[router]), strict=True), 1):
        assert line.startswith(f"| {number} | {router} / score_bias | 1 | {bits[router]:.3f} | ")
    assert "| softmax / score_bias | 1.000 (1.000-1.000) |" in text
    for name in ("frontier", "drops", "load", "time"):
        plot = page.with_name(f"{page.stem}_{name}.svg")
        assert f"]({plot.name})" in text
        assert 1_000 < plot.stat().st_size < 150_000
    assert "exists; move it away" in run(monkeypatch, *report)


def test_a_training_that_fails_is_recorded_and_the_others_are_done(shared, monkeypatch, capfd):
    sweep = ["-m", "router=softmax", "balance=importance_load,none", *shared]
    assert run(monkeypatch, *sweep) == 1
    assert results().keys() == {("softmax", "none", 0)}
    (error,) = Path("runs").glob("*/error.txt")
    assert error.parent.name.startswith("softmax-importance_load-0-")
    pairs = "pairs.list=[[softmax,none],[softmax,importance_load]]"
    assert run(monkeypatch, "mode=report", pairs, "seeds=[0]", *shared) == 0
    (page,) = Path("results").glob("*.md")
    assert "softmax, importance_load, seed 0 is missing: moe.errors.ConfigError: balance='load'" in page.read_text()


@pytest.mark.slow
def test_processes_side_by_side_and_one_that_fails(shared, monkeypatch, capfd):
    sweep = ["mode=sweep", "pairs.list=[[softmax,none],[softmax,importance_load]]", "seeds=[0]", "jobs=2", *shared]
    code = run(monkeypatch, *sweep)
    assert code.startswith("1 of 2 trainings failed: softmax-importance_load-0-")
    assert results().keys() == {("softmax", "none", 0)}
    told = capfd.readouterr().err
    assert "softmax, none, seed 0: done" in told
    assert "softmax, importance_load, seed 0: FAILED with 1, see runs/logs/softmax-importance_load-0-" in told
    assert "ConfigError: balance='load'" in next(Path("runs/logs").glob("*importance_load*")).read_text()


def test_an_interrupted_training_starts_again(shared, composing, monkeypatch):
    job = read_job(shared)
    note = StepLog.__call__

    def interrupting(log, step, loads):
        note(log, step, loads)
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(StepLog, "__call__", interrupting)
    with pytest.raises(KeyboardInterrupt):
        train(job)
    assert list(job.folder.iterdir()) == []
    monkeypatch.setattr(StepLog, "__call__", note)
    assert train(job)
    assert len(read_result(job.result, job.fingerprint).steps) == 8
    assert not train(job)


def test_what_a_result_is_made_with_tells_it_from_others(shared, composing):
    job = read_job(shared)
    assert read_job([*shared, "data.cache_dir=elsewhere", "root=there"]).fingerprint == job.fingerprint
    seed, balance = read_job([*shared, "seed=1"]), read_job([*shared, "balance=switch", "router=sigmoid"])
    longer = read_job([*shared, "run.steps=9"])
    assert len({each.fingerprint for each in (job, seed, balance, longer)}) == 4
    assert job.pair == seed.pair != balance.pair
    assert job.sweep == seed.sweep == balance.sweep != longer.sweep
    changed = read_job([*shared, "balance=score_bias", "balance.score_bias.rate=0.003"])
    assert changed.balance == "score_bias(score_bias.rate=0.003)"
    assert changed.pair != read_job([*shared, "balance=score_bias"]).pair


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


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("mode=train", "mode=train is unknown; choose from run, sweep, timing, report"),
        ("pairs.list=[softmax]", r"pairs\.list=\['softmax'\] must be a list of a router and a balance each"),
        ("pairs.list=[]", r"pairs.list=\[\] must be a list"),
        ("seeds=[]", r"seeds=\[\] must be a list"),
        ("jobs=0", "jobs=0 must be a whole number of at least 1"),
        ("timing.rounds=0", "timing.rounds=0 must be a whole number of at least 1"),
    ],
)
def test_settings_that_cannot_be_say_so(monkeypatch, tmp_path, argument, message):
    monkeypatch.chdir(tmp_path)
    code = run(monkeypatch, argument)
    assert re.match(message, code)
    assert list(tmp_path.iterdir()) == []


def test_one_process_starts_the_others(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    assert "under torchrun give -m" in run(monkeypatch, "mode=sweep")


def test_the_conf_names_every_router_and_only_what_there_is(composing):
    routers = {path.stem: read_job([f"router={path.stem}"]).settings for path in (CONF / "router").glob("*.yaml")}
    assert {settings["model"]["moe"]["router"]["name"] for settings in routers.values()} == ROUTERS.keys()
    balances = {
        path.stem: read_job([f"balance={path.stem}"]).settings["balance"] for path in (CONF / "balance").glob("*")
    }
    for balance in balances.values():
        assert balance.keys() <= LOSSES.keys() | BIAS_RULES.keys()
        make_balance(balance)
    for path in (CONF / "pairs").glob("*.yaml"):
        for router, balance in utilization.OmegaConf.load(path).list:
            assert router in routers
            assert balance in balances
    with pytest.raises(HydraException):
        read_job(["router=nothing"])


def test_what_balances():
    assert [kind_of(dict.fromkeys(names)) for names in ([], ["switch"], ["score_bias"], ["score_bias", "switch"])] == [
        *("nothing", "loss", "bias"),
        "loss and bias",
    ]


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


def test_times_are_ratios_within_a_round(tmp_path, composing):
    job = read_job([f"root={tmp_path}"])
    assert read_times(job) is None
    seconds = {"one": [1.0, 2.0, 4.0], "two": [1.5, 2.0, 8.0]}
    text = {"sweep": job.sweep, "rounds": 3, "warmup": 0, "seconds": seconds, "machine": "this"}
    (tmp_path / f"timing-{job.sweep}.json").write_text(json.dumps(text))
    ratios = read_times(job).ratios()
    assert ratios == {"one": Spread(1.0, 1.0, 1.0), "two": Spread(1.5, 1.25, 1.75)}
    assert list(tables.time_table(ratios, "one"))[-1] == "| two | 1.500 (1.250-1.750) |"


def test_commands_run_some_at_a_time(tmp_path, monkeypatch):
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(children, "Popen", Recorded)
    ends = [sys.executable, "-c", "print('hello'); raise SystemExit(3)"]
    os.mkfifo(tmp_path / "nobody_writes")
    waits = [sys.executable, "-c", f"open({str(tmp_path / 'nobody_writes')!r})"]
    commands = {"first": ends, "second": ends, "third": ends}
    assert list(children.run_all(commands, 1, {}, tmp_path)) == [("first", 3), ("second", 3), ("third", 3)]
    assert (tmp_path / "second.log").read_text() == "hello\n"
    assert len(started) == 3

    running = children.run_all({"long": waits, "short": ends}, 2, {}, tmp_path)
    assert next(running) == ("short", 3)
    long = started[3]
    assert long.poll() is None
    running.close()
    assert long.returncode == -signal.SIGTERM
