"""Runs the examples and keeps, for the gallery, a small picture of each, what it printed and the CPU seconds that it took.

python docs/hooks/thumbnails.py [--smoke] [NAME ...]     # 01_flow_posterior, or all that were not run yet
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile

from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
PLACE = ROOT / "docs/assets/gallery"
RUNS = PLACE / "runs.json"
WIDTH = 960


def known() -> dict[str, dict]:
    """Of each example that was run: ``seconds``, ``smoke`` and ``printed``."""
    return json.loads(RUNS.read_text()) if RUNS.exists() else {}


def children() -> float:
    """CPU seconds of all processes that this one has started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(example: pathlib.Path, smoke: bool) -> None:
    """Run one example, and keep its first picture."""
    before = children()
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(example), "--out", out, *(["--smoke"] if smoke else [])]
        printed = subprocess.run(command, check=True, cwd=out, stdout=subprocess.PIPE, text=True).stdout
        picture = Image.open(min(pathlib.Path(out).glob("*.png"))).convert("RGB")
    picture.thumbnail((WIDTH, 2 * WIDTH))
    picture.save(PLACE / f"{example.stem}.webp", quality=75, method=6)
    found = {"seconds": round(children() - before), "smoke": smoke, "printed": printed.replace(out, "out").strip()}
    RUNS.write_text(json.dumps(dict(sorted({**known(), example.stem: found}.items())), indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="as the examples' own: a few steps only")
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    examples = [p.stem for p in sorted((ROOT / "examples").glob("[0-9]*.py"))]
    for name in arguments.names or [name for name in examples if name not in known()]:
        run(ROOT / "examples" / f"{name}.py", arguments.smoke)
