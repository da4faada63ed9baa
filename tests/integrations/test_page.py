"""The programs of the guide that need a framework; tests/test_docs.py runs the others."""

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "report-balance.md"
PROGRAMS = re.findall(
    r"^## (\w+)\n(?:(?!^## ).)*?^```{code-block} python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S
)


def test_there_is_one_for_each_framework() -> None:
    assert [name for name, _ in PROGRAMS] == ["transformers", "Lightning", "Accelerate"]


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")  # Lightning 2.6 with torch 2.13
@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # its advice on speed
@pytest.mark.parametrize(("name", "program"), PROGRAMS, ids=[name for name, _ in PROGRAMS])
def test_it_runs(name, program, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    exec(compile(program, f"{PAGE.name}, {name}", "exec"), namespace)
    assert (tmp_path / {"transformers": "trainer"}.get(name, name.lower())).with_suffix(".jsonl").stat().st_size
