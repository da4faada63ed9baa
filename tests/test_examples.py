"""The example as a user starts it: its settings, its output, and what it says to wrong settings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe.training.metrics import read_metrics

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
EXAMPLE = EXAMPLES / "train_lm.py"

TINY = [
    *("model.dim=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "model.ffn_hidden_dim=16"),
    *("model.moe.hidden_dim=8", "model.moe.num_experts=4", "run.threads=1", "run.sample_tokens=4"),
    *("run.steps=2", "run.batch_size=2", "run.seq_len=16", "run.eval_windows=2", "optim.schedule.warmup_steps=1"),
]


def run(tmp_path, *arguments):
    command = [sys.executable, str(EXAMPLE), *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be, that is the question\n" * 200)
    return [f"data.path={path}", f"data.cache_dir={tmp_path / 'cache'}"]


def test_trains_and_prints_where_the_run_lies(tmp_path, text):
    done = run(tmp_path, *TINY, *text, "run.name=first", "balance=[squared_deviation,score_bias]")
    assert done.returncode == 0, done.stderr
    assert "run:    runs/first" in done.stdout
    assert "report: runs/first/report.html" in done.stdout
    assert (tmp_path / "runs" / "first" / "report.html").exists()
    config = (tmp_path / "runs" / "first" / "config.yaml").read_text()
    assert "score_bias" in config
    assert "squared_deviation" in config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "runs", "text.txt"]  # Hydra leaves nothing


def test_tokenizer_and_dense_model_by_name(tmp_path, text):
    dense = [argument for argument in TINY if "moe" not in argument]
    done = run(tmp_path, *dense, *text, "tokenizer=bpe", "tokenizer.vocab_size=270", "model=dense", "balance=none")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.stesp=5"], "'run.stesp' is no setting; did you mean 'run.steps'?"),
        (["modle=small"], "'modle' is no setting; did you mean 'model'?"),
        (["balance=swich"], "Could not find 'balance/swich'"),
        (["model.moe.top_k=9"], "ConfigError: top_k=9 must be between 1 and num_experts=8"),
        (["data.path=nowhere"], "DataError: "),
        (["run.precision=int8"], "ConfigError: precision='int8' is unknown; choose one of auto, float32, bfloat16"),
    ],
)
def test_wrong_settings_are_answered_in_one_line(tmp_path, text, arguments, message):
    done = run(tmp_path, *text, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def torchrun(tmp_path, *arguments):
    """What a user's torchrun does, on this machine and a port of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=280
    )


@pytest.mark.slow
def test_a_model_of_ones_own_learns_over_two_ranks(tmp_path):
    done = torchrun(tmp_path, "--nproc-per-node=2", EXAMPLES / "own_model.py", "ep=2")
    assert done.returncode == 0, done.stderr
    losses = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 3  # of the first rank alone
    assert losses[-1] < 0.3  # log 2 before anything is known


KILLED = """
import os, runpy, signal, sys
from moe.training.trainer import Trainer

original = Trainer.train_step
def train_step(self):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and self.step == 5:
        self.model.blocks[1].register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    return original(self)
Trainer.train_step = train_step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_torchrun_resumes_after_a_rank_is_killed_in_mid_step(tmp_path, text):
    """SIGKILL in the forward pass of step 6; the newest checkpoint is of step 4, so two steps are done again."""
    (tmp_path / "killed.py").write_text(KILLED)
    steps = ["run.steps=8", "run.checkpoint_every=2", "run.log_every=1", "run.precision=float32"]
    over = ["parallel.ep=2", "parallel.timeout=60", "run.name=first", "resume=auto"]
    launcher = ["--nproc-per-node=2", "--max-restarts=1", "killed.py", EXAMPLE]
    done = torchrun(tmp_path, *launcher, *TINY, *text, *steps, *over)
    assert done.returncode == 0, done.stderr
    assert "ParallelError: after step 5: rank 1 (process " in done.stderr
    assert done.stderr.count("is gone") == 1
    assert "the last good checkpoint is runs/first/checkpoints/step_00000004" in done.stderr
    lines = read_metrics(tmp_path / "runs" / "first" / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 9))
    assert lines[-1]["run/status"] == "finished"
    assert done.stdout.count("report: runs/first/report.html") == 1
    alone = run(tmp_path, *TINY, *text, *steps, "run.name=alone")
    assert alone.returncode == 0, alone.stderr
    expected = [line["train/loss"] for line in read_metrics(tmp_path / "runs" / "alone" / "metrics.jsonl")[:-2]]
    # Balance losses of two micro-batches of one sequence are not those of one micro-batch of two: hence the tolerance.
    assert [line["train/loss"] for line in lines[:-2]] == pytest.approx(expected, rel=1e-3)
