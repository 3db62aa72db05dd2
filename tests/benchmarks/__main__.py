"""``python -m tests.benchmarks NAME [--out results.json]``."""

import argparse
import importlib
import json
import pathlib

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("name", choices=sorted(p.stem for p in pathlib.Path(__file__).parent.glob("[a-z]*.py")))
parser.add_argument("--out", type=pathlib.Path)
parser.add_argument("--only", nargs="*", help="a subset of the benchmark's rows")
parser.add_argument("--limit", type=float, help="CPU seconds after which a NUTS row is stopped")
parser.add_argument("--count", type=int, help="inputs of a seed of the fuzz, or kills of a kind")
parser.add_argument("--case", type=int, help="the number of one input of the fuzz, to repeat it")
parser.add_argument("--sizes", nargs="*", type=int, default=[10_000], help="simulations of a training")
parser.add_argument("--seeds", nargs="*", type=int, default=[0])
arguments = parser.parse_args()
rows = importlib.import_module(f"tests.benchmarks.{arguments.name}").main(arguments)
if arguments.out:
    arguments.out.write_text(json.dumps(rows, indent=1))
