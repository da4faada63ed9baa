"""A run small enough to repeat: a few thousand bytes of text, two layers, a dozen steps."""

import copy

import pytest

SETTINGS = {
    "model": {
        "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_hidden_dim": 24, "first_dense": 1,
        "moe": {"hidden_dim": 16, "num_experts": 4, "top_k": 2}, "activation_checkpointing": "none",
    },
    "balance": {"squared_deviation": {"coefficient": 0.01}, "score_bias": {"rate": 0.01}},
    "data": {"val_fraction": 0.1},
    "tokenizer": {"tokenizer": "bytes"},
    "optim": {
        "peak": 1e-2, "adamw": {"weight_decay": 0.1, "betas": (0.9, 0.95)},
        "schedule": {"warmup_steps": 2, "decay": "wsd", "decay_share": 0.5},
    },
    "run": {
        "name": "tiny", "device": "cpu", "threads": 1, "precision": "float32", "prompt": "the ", "sample_tokens": 8,
        "steps": 12, "batch_size": 2, "seq_len": 16, "accumulation": 2, "log_every": 1, "eval_every": 6,
        "eval_windows": 4, "checkpoint_every": 3, "pool_steps": 4,
    },
    "resume": "never",
}  # fmt: skip


@pytest.fixture
def settings(tmp_path):
    """Settings of a tiny run below ``tmp_path``, on text written there."""
    text = "".join(f"the {i}th line says that {i * i} is the square of {i}\n" for i in range(200))
    (tmp_path / "text.txt").write_text(text)
    chosen = copy.deepcopy(SETTINGS)
    chosen["data"] |= {"path": str(tmp_path / "text.txt"), "cache_dir": str(tmp_path / "cache")}
    chosen["run"]["root"] = str(tmp_path / "runs")
    return chosen
