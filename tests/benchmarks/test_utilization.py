"""The sweep over routers and balance: from end to end on a tiny model, and its figures held against a hand."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import utilization
from hydra import initialize_config_dir
from hydra.errors import HydraException
from sweep import children
from sweep.job import read_job
from sweep.result import read_result
from sweep.train import StepLog, kind_of, train

from moe.balance import BIAS_RULES, LOSSES, make_balance
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
    assert run(monkeypatch, "mode=pictures", *shared) == 0
    drawn = {path.name for path in Path("results").glob("*.png")}
    assert drawn == {"count-bias.png", "null-experts.png", "quantile-bias.png"}  # sigmoid, score_bias is on these


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


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("mode=train", "mode=train is unknown; choose from run, sweep, timing, report, pictures"),
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
