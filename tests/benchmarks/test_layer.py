"""The benchmark of the layer from end to end on a tiny case, with whatever peers are installed."""

import math
import re
import sys

import layer
import peers
import pytest
import torch

TINY = [
    f"shapes.{case}.{size}"
    for case, top_k in (("fine", 2), ("switch", 1))
    for size in ("tokens=32", "dim=16", "hidden_dim=8", "num_experts=4", f"top_k={top_k}")
]


def run(tmp_path, *arguments):
    """The exit code, and the lines of the one result."""
    code = layer.main([*TINY, "rounds=2", "warmup=1", f"results={tmp_path}", *arguments])
    (result,) = tmp_path.glob("*.md")
    return code, result.read_text().splitlines()


def cells(lines):
    """Contestant -> cells, of the last table that says so."""
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if row[0].strip() in peers.NAMES}


def ratio(cell):
    return float(cell.split()[0])


@pytest.mark.parametrize("case", ["fine", "switch"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_contestant_has_a_line_or_a_reason(tmp_path, case, dtype):
    code, lines = run(tmp_path, f"cases=[{case}]", f"dtype={dtype}")
    assert code == 0
    table = cells(lines)
    skipped = {line.split()[1] for line in lines if line.startswith("- ")}
    assert set(table) | skipped == set(peers.NAMES)
    assert not set(table) & skipped
    assert set(peers.OWN) <= set(table)
    tolerance = 1e-2 if dtype == "bfloat16" else 1e-5
    for name, (step, step_ratio, forward, forward_ratio, saved, output, gradient, moved) in table.items():
        assert all(float(value) > 0 for value in (step, forward)), name
        assert all(0 < ratio(value) < math.inf for value in (step_ratio, forward_ratio)), name
        if name not in ("bare", "dense"):
            assert float(saved) > 0
        if name in ("ours", "ours_recompute_up", "plain"):
            assert 0 < float(output) < tolerance
            assert 0 < float(gradient.split()[0]) < tolerance
            assert moved == "0"
    assert ratio(table["dense"][1]) == ratio(table["dense"][3]) == 1.0
    assert table["bare"][4:] == ["-"] * 4


def test_the_result_says_what_it_was_made_with(tmp_path):
    _, lines = run(tmp_path, "cases=[fine]", "contestants=[plain]")
    text = "\n".join(lines)
    assert f"`python benchmarks/layer.py {' '.join(TINY)} rounds=2" in text
    assert f"torch {torch.__version__}" in text
    assert "threads of" in text
    assert "## fine: T=32 D=16 F=8 E=4 K=2" in text
    assert set(cells(lines)) == {"plain", "dense"}  # the floor is there unasked


def test_a_missing_peer_is_named_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.models.qwen3_moe.modeling_qwen3_moe", None)
    _, lines = run(tmp_path, "cases=[fine]", "contestants=[transformers_eager]")
    (line,) = [line for line in lines if line.startswith("- ")]
    assert line.startswith("- transformers_eager is left out: not installed: ")
    assert set(cells(lines)) == {"dense"}


def test_a_peer_that_fails_is_named_and_ours_that_fails_ends_the_run(tmp_path, monkeypatch):
    def broken(problem):
        raise RuntimeError("no such op\nand more")

    monkeypatch.setitem(peers.FOREIGN, "torchtitan", broken)
    _, lines = run(tmp_path / "a", "cases=[fine]", "contestants=[torchtitan]")
    assert "- torchtitan is left out: fails: no such op" in lines
    monkeypatch.setitem(peers.OWN, "ours", broken)
    with pytest.raises(RuntimeError, match="no such op"):
        run(tmp_path / "b", "cases=[fine]", "contestants=[ours]")


def test_a_peer_that_is_far_too_slow_is_named_with_its_time(tmp_path, monkeypatch):
    monkeypatch.setitem(peers.FOREIGN, "torchtitan", peers.plain)
    _, lines = run(tmp_path, "cases=[fine]", "contestants=[torchtitan,plain]", "limit=0")
    assert set(cells(lines)) == {"plain", "dense"}  # the limit is for peers
    assert any(
        re.match(r"- torchtitan is left out: its first step took \d+ times the floor's, over limit=0", line)
        for line in lines
    )


def test_results_are_not_overwritten(tmp_path):
    run(tmp_path, "cases=[fine]", "contestants=[dense]")
    with pytest.raises(SystemExit, match="results are not overwritten"):
        run(tmp_path, "cases=[fine]", "contestants=[dense]")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("cases=[fien]", "cases=fien is unknown; choose from fine, coarse"),
        ("contestants=[our]", "contestants=our is unknown; choose from ours"),
        ("dtype=int8", "dtype=int8 is unknown; choose from bfloat16, float32"),
        ("mode=fast", "mode=fast is unknown"),
        ("rounds=0", "rounds=0 must be at least 1"),
        ("ronds=3", "ronds"),
    ],
)
def test_a_wrong_setting_is_answered_in_a_line(tmp_path, argument, message):
    with pytest.raises(SystemExit, match=message):
        layer.main([f"results={tmp_path}", argument])
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert layer.main(["device=cuda", f"results={tmp_path}"]) == 2
    assert "sees no GPU here; nothing was measured" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_a_gpu_has_a_second_table(tmp_path):
    code, lines = run(tmp_path, "cases=[fine]", "contestants=[ours,plain,bare]", "device=cuda")
    assert code == 0
    assert any(line.startswith("Measured limits: ") for line in lines)
    assert any("of roofline" in line for line in lines)
    for name, (_, _, _, _, peak) in cells(lines).items():
        assert float(peak) >= 0, name


@pytest.mark.skipif(sys.platform != "linux", reason="weighs a process by /proc")
def test_memory_grows_with_what_is_saved(tmp_path):
    sizes = ["memory.tokens=[2048,1024]", "memory.shape={dim:64,hidden_dim:64,num_experts:4,top_k:2}", "threads=1"]
    assert layer.main(["mode=memory", f"results={tmp_path}", "contestants=[dense,bare]", *sizes]) == 0
    (result,), (plot,) = tmp_path.glob("*.md"), tmp_path.glob("*.svg")
    assert plot.name in result.read_text()
    table = cells(result.read_text().splitlines())
    assert set(table) == {"dense"}
    peak, held, saved = (float(cell.replace(",", "")) for cell in table["dense"])
    # Saved: the 2 * K * F of the first product, and K * F of the activation and of its product with the rest, each of
    # two bytes. The process holds as much within some pages, and its peak is above it.
    assert saved == 4 * 2 * 64 * 2
    assert held == pytest.approx(saved, rel=0.1)
    assert peak > held
