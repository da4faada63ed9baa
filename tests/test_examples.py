"""The example as a user starts it: its settings, its output, and what it says to wrong settings."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "train_lm.py"

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
