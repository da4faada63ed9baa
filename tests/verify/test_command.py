"""The command: what it prints, its exit codes, a user's own model, and bad arguments."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moe.verify import FAULTS
from moe.verify.__main__ import main
from tests.verify.trials import SMALL

ROOT = Path(__file__).resolve().parents[2]
FACTORY = "tests.verify.trials:make"


@pytest.fixture
def small_config(tmp_path: Path) -> str:
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return str(path)


def test_a_process_of_its_own_proves_the_built_in_model() -> None:
    command = [sys.executable, "-m", "moe.verify", "--degrees", "ep=2", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "OK: dp_shard=2,ep=2 (2 processes) against one process, float64, 1 steps" in done.stdout
    assert "gradient        blocks.1.ffn.experts.up_weight" in done.stdout
    assert "routing of blocks.2.ffn: expert 0 got 50% (even: 20%), no token for 4" in done.stdout


def test_what_differs_first_is_named(small_config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--degrees", "ep=2", "--model", small_config, "--steps", "1", "--fault", "expert-average"]
    assert main(arguments) == 1
    shown = capsys.readouterr().out
    assert "first parameter that differs: gradient of blocks.1.ffn.experts.up_weight, in step 1, by 1.0e+00" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("gradient        blocks.1.ffn.experts.up_weight")]
    assert line.endswith("DIFFERS")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_model_of_ones_own(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--degrees", "ep=2", "--factory", FACTORY, "--dtype", dtype, "--steps", "2", "--batch-size", "44"]
    assert main(arguments) == 0
    assert "parameter       second.experts.down_weight" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_model(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--degrees", "ep=2", "--factory", FACTORY, "--steps", "1", "--accumulate", "1"]
    assert main([*arguments, "--compile", "aot_eager"]) == 0
    assert "all within tolerance" in capsys.readouterr().out


def test_a_model_of_ones_own_with_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--degrees", "dp_shard=2", "--factory", FACTORY, "--steps", "1", "--fault", "dense-sum"]) == 1
    assert "first parameter that differs: gradient of enter.weight" in capsys.readouterr().out


def test_bfloat16_is_reported_and_not_judged(small_config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--degrees", "ep=2", "--model", small_config, "--dtype", "bfloat16", "--steps", "1"]
    assert main(arguments) == 0
    assert "reported only, no tolerance was given" in capsys.readouterr().out
    assert main([*arguments, "--tolerance", "1e-7"]) == 1


def test_models_that_differ_from_rank_to_rank_are_caught(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--degrees", "ep=2", "--factory", "tests.verify.trials:random_each_time", "--steps", "1"]) == 2
    assert "ranks differ in parameter enter.weight: 1 from the first" in capsys.readouterr().err


def test_the_list_of_faults_explains_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--fault", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(FAULTS)
    assert all("; needs " in line for line in lines)


BAD = [  # arguments, what the error says
    ("", "--degrees is missing"),
    ("--degrees ep=2,xx=2", "xx=2 is no axis; choose from pp, dp_replicate"),
    ("--degrees ep=two", "ep='two' must be a whole number"),
    ("--degrees ep=3,dp_shard=2", "that must divide dp_shard=2"),
    (f"--degrees pp=2 --factory {FACTORY}", "pp=2 cuts a moe.models.Decoder .* model is a Regression"),
    ("--degrees pp=5", "5 pipeline stages are more than num_layers=4"),
    ("--degrees pp=2 --stages-per-rank 3", "6 pipeline stages are more than num_layers=4"),
    ("--degrees pp=2 --stages-per-rank 0", "stages_per_rank=0 must be positive"),
    ("--degrees pp=4 --microbatches 3", "microbatches=3 must be at least pp=4"),
    ("--degrees pp=2 --batch-size 4", "accumulate=2 \\* microbatches=3 = 6 micro-batches; take a multiple of 6"),
    ("--degrees ep=4,etp=2 --node-size 3", "node_size=3 must be a multiple of ep=4 .* etp=2 = 8"),
    ("--degrees ep=2 --node-size 0", "node_size=0 must be positive"),
    ("--degrees ep=2 --microbatches 4", "microbatches=4 and stages_per_rank=1 are of a pipeline; .* add pp=2"),
    ("--degrees pp=2 --factory tests.verify.trials:tied", "tie_embeddings=True puts one weight on the first and"),
    ("--degrees pp=2 --factory tests.verify.trials:batch_without_tokens", "under pp > 1 a batch needs 'tokens'"),
    ("--degrees dp_shard=100", "need 100 ranks, each a process of this machine; at most 64"),
    ("--degrees ep=8", "ep=8 is more than num_experts=5 of layer 'blocks.1.ffn'"),
    ("--degrees etp=16", "etp=16 is more than hidden_dim=12 of layer 'blocks.1.ffn'"),
    ("--degrees ep=2 --batch-size 5", "batch_size=5 does not split over .* = 4 micro-batches; take a multiple of 4"),
    ("--degrees ep=2 --max-received-tokens 1", "max_received_tokens=1 must be at least ep=2"),
    ("--degrees ep=2 --fault bias-twise", "fault='bias-twise' is unknown; did you mean 'bias-twice'"),
    ("--degrees ep=2 --steps 1 --fault bias-slices", "cannot show with degrees dp_shard=2,ep=2"),
    ("--degrees ep=2 --dtype float8", "dtype='float8' is unknown; choose one of float64, float32, bfloat16"),
    ("--degrees ep=2 --compile fast", "compile='fast' is no backend of torch.compile; choose one of .*inductor"),
    ("--degrees ep=2 --checkpoint full", "activation_checkpointing='full' is unknown"),
    ("--degrees ep=2 --steps 0", "steps=0 must be positive"),
    ("--degrees ep=2 --tolerance -1", "tolerance=-1.0 must be positive"),
    ("--degrees ep=2 --model /none.yaml", "model=/none.yaml cannot be read"),
    ("--degrees ep=2 --model README.md", "must be a mapping|cannot be read"),
    ("--degrees ep=2 --model examples/conf/config.yaml", "does not take these options"),
    (f"--degrees ep=2 --factory {FACTORY} --model x.yaml", "are two models; give one"),
    (f"--degrees ep=2 --factory {FACTORY} --checkpoint", "uses torch.utils.checkpoint itself"),
    ("--degrees ep=2 --factory make", "must be module:function"),
    ("--degrees ep=2 --factory no_such:make", "cannot be imported: No module named 'no_such'"),
    ("--degrees ep=2 --factory tests.verify.trials:nothing", "cannot be imported: .* no attribute 'nothing'"),
    ("--degrees ep=2 --factory tests.verify.trials:SMALL", "must be a function"),
    ("--degrees ep=2 --factory tests.verify.trials:model_alone", "it must return \\(model, make_batch, loss\\)"),
    ("--degrees ep=2 --factory tests.verify.trials:without_experts", "Linear has no moe.MoE layer"),
    ("--degrees ep=2 --factory tests.verify.trials:batch_of_tuples", "make_batch returned .* a dict of tensors"),
    ("--degrees ep=2 --factory tests.verify.trials:loss_of_rows", "loss returned a tensor of shape .* a scalar tensor"),
    ("--degrees ep=2 --factory tests.verify.trials:failing", "RuntimeError: no such luck"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments_are_named(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(arguments.split()) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert re.search(message, shown.err), shown.err
