"""Preparing a corpus takes little memory, however large it is."""

import subprocess
import sys
from pathlib import Path

import pytest

BIG_CORPORA = """
import json, re, sys
from pathlib import Path
import pyarrow.parquet
from moe.training.data import prepare

folder = Path(sys.argv[1])
line = "a line of some sixty characters, of which there are a million." * 10 + "\\n"
lines = [f"{i} {line}" for i in range(1000)]
with (folder / "big.txt").open("w") as text, (folder / "big.jsonl").open("w") as records:
    for _ in range(100):
        text.write("".join(lines))
        records.write("".join(json.dumps({"text": line}) + "\\n" for line in lines))
with pyarrow.parquet.ParquetWriter(folder / "big.parquet", pyarrow.schema([("text", pyarrow.string())])) as table:
    for i in range(100):
        table.write_table(pyarrow.table({"text": [f"{i} {line}" for line in lines]}))

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, starts again from here
for name in ("big.txt", "big.jsonl", "big.parquet"):
    data = prepare(str(folder / name), cache_dir=sys.argv[1])
    assert data.train_bytes + data.val_bytes > 60e6
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is known on Linux only")
def test_memory_stays_far_under_the_corpus(tmp_path):
    """Three corpora of 62 MB of text, each of which is 124 MB of tokens, in a process of its own."""
    command = [sys.executable, "-c", BIG_CORPORA, str(tmp_path)]
    added = int(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    assert added < 50e6  # 15 MB for text, 20 more for what pyarrow sets up
