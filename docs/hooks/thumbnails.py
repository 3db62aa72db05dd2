"""Runs the examples and keeps a small picture of each for the gallery, with the CPU seconds that it took.

python docs/hooks/thumbnails.py [NAME ...]     # 01_flow_posterior, or all that have no picture
"""

import json
import pathlib
import resource
import subprocess
import sys
import tempfile

from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
PLACE = ROOT / "docs/assets/gallery"
SECONDS = PLACE / "seconds.json"
WIDTH = 640


def seconds() -> dict[str, float]:
    """CPU seconds of the examples that were run."""
    return json.loads(SECONDS.read_text()) if SECONDS.exists() else {}


def children() -> float:
    """CPU seconds of all processes that this one has started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(example: pathlib.Path) -> None:
    """Run one example, and keep its first picture."""
    before = children()
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([sys.executable, str(example), "--out", out], check=True, cwd=out)
        picture = Image.open(min(pathlib.Path(out).glob("*.png"))).convert("RGB")
    picture.thumbnail((WIDTH, 2 * WIDTH))
    picture.save(PLACE / f"{example.stem}.webp", quality=75, method=6)
    SECONDS.write_text(
        json.dumps(dict(sorted({**seconds(), example.stem: round(children() - before)}.items())), indent=0)
    )


if __name__ == "__main__":
    examples = [p.stem for p in sorted((ROOT / "examples").glob("[0-9]*.py"))]
    for name in sys.argv[1:] or [name for name in examples if not (PLACE / f"{name}.webp").exists()]:
        run(ROOT / "examples" / f"{name}.py")
