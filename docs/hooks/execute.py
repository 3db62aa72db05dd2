"""Runs the code of one page in a process of its own: blocks from standard input, what they print and draw to a file.

python docs/hooks/execute.py results.json < blocks.json
"""

import base64
import contextlib
import io
import json
import pathlib
import sys
import time

import matplotlib
import pandas

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

pandas.set_option("display.width", 120)  # a table of ArviZ is not cut in the middle
pandas.set_option("display.max_columns", 20)


def run(blocks: list[str]) -> dict:
    """Run blocks one after the other with common names; what each printed, its figures, and the seconds of all."""
    names: dict = {"__name__": "__main__"}
    plt.close("all")
    began = time.process_time()
    results = [run_one(block, f"<block {i}>", names) for i, block in enumerate(blocks, 1)]
    return {"results": results, "seconds": time.process_time() - began}


def run_one(block: str, place: str, names: dict) -> dict:
    """What one block printed, and its figures as PNG: those of pyplot, and others that it gave a name."""
    printed, known = io.StringIO(), set(map(id, names.values()))
    with contextlib.redirect_stdout(printed):
        exec(compile(block, place, "exec"), names)
    named = [v for v in names.values() if isinstance(v, Figure) and id(v) not in known and not hasattr(v, "number")]
    figures = [png(figure) for figure in [*map(plt.figure, plt.get_fignums()), *named]]
    plt.close("all")
    return {"text": printed.getvalue(), "figures": figures}


def png(figure: plt.Figure) -> str:
    """A figure as PNG in base64."""
    file = io.BytesIO()
    figure.savefig(file, dpi=100, bbox_inches="tight")
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    pathlib.Path(sys.argv[1]).write_text(json.dumps(run(json.load(sys.stdin))))
