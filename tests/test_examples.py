"""Every example runs with --smoke, is short, and leaves its pictures."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example_runs(path, tmp_path):
    assert len(path.read_text().splitlines()) <= 110
    done = subprocess.run(
        [sys.executable, str(path), "--smoke", "--out", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    pictures = list(tmp_path.glob("*.png"))
    assert pictures and all(p.stat().st_size > 5_000 for p in pictures)
