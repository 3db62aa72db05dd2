"""How much there is to read: a census of the code, and what is called on the way through it.

``python -m tests.benchmarks house [--only census walks]`` measures the package of the current directory, so
``cd TREE && PYTHONPATH=. python THIS_FILE`` measures another tree. The census also counts zuko, and flowjax where it can be
imported or where ``FLOWJAX`` names its folder.
"""

import argparse
import ast
import importlib.util
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tokenize
from collections import Counter, defaultdict

WALKS = pathlib.Path(__file__).with_name("_house_walks.py")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


class File:
    """One source file: its tree, and the numbers of the lines that hold code."""

    def __init__(self, path, package):
        self.text = path.read_text()
        self.tree = ast.parse(self.text)
        parts = path.relative_to(package).parts
        self.room = parts[0] if len(parts) > 1 else ""
        self.stem = path.stem
        self.code = code_lines(self.text, self.tree)

    def nodes(self, *kinds):
        return [node for node in ast.walk(self.tree) if isinstance(node, kinds)]


def code_lines(text, tree):
    """Lines without docstrings, comments and blanks."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {n for t in tokens if t.type not in NOT_CODE for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines


def is_packed(node):
    """``a, b = x, y`` of two things or more; a swap, which only moves the same names about, is none."""
    target, value = node.targets[0], node.value
    if not (isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts)):
        return False
    return sorted(map(ast.unparse, target.elts)) != sorted(map(ast.unparse, value.elts))


def is_number(node):
    """A number, arithmetic of numbers, or a tuple of them."""
    if isinstance(node, ast.Tuple):
        return bool(node.elts) and all(map(is_number, node.elts))
    if isinstance(node, ast.UnaryOp):
        return is_number(node.operand)
    if isinstance(node, ast.BinOp):
        return is_number(node.left) and is_number(node.right)
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def constants(file):
    """Names of the module that are bound to numbers."""
    found = 0
    for node in file.tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and is_number(node.value):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found += len(target.elts) if isinstance(target, ast.Tuple) else 1
    return found


def parameters(file):
    """Every parameter but self and cls, and whether it is one of ``*args`` and ``**kwargs``."""
    for node in file.nodes(*FUNCTIONS):
        named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        yield from ((p, False) for p in named if p.arg not in ("self", "cls"))
        yield from ((p, True) for p in (node.args.vararg, node.args.kwarg) if p is not None)


def is_any(parameter):
    return parameter.annotation is not None and ast.unparse(parameter.annotation) in ("Any", "typing.Any")


def homes(files):
    """Names of classes and top-level functions that have more than one home, and names of files that have."""
    places = defaultdict(set)
    for file in files:
        for node in file.tree.body:
            if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
                places[node.name].add((file.room, file.stem))
    shared = sorted(name for name, where in places.items() if len(where) > 1)
    stems = defaultdict(set)
    for file in files:
        stems[file.stem].add(file.room)
    return {
        "public": [n for n in shared if not n.startswith("_")],
        "private": [n for n in shared if n.startswith("_")],
        "files": sorted(s for s, rooms in stems.items() if len(rooms) > 1 and s not in ("__init__", "conftest")),
    }


def census(package):
    """The counts of one package folder."""
    paths = sorted(p for p in package.rglob("*.py") if p.name != "conftest.py")
    files = [File(p, package) for p in paths]
    code = sum(len(f.code) for f in files)
    lengths = sorted(len(f.code & set(range(n.lineno, n.end_lineno + 1))) for f in files for n in f.nodes(*FUNCTIONS))
    params = [p for f in files for p in parameters(f)]
    count = lambda *kinds: sum(len(f.nodes(*kinds)) for f in files)
    per_thousand = lambda n: round(1000 * n / code, 1)
    return {
        "files": len(files),
        "lines": sum(len(f.text.splitlines()) for f in files),
        "code lines": code,
        "classes": count(ast.ClassDef),
        "functions": len(lengths),
        "code lines of a function: median": statistics.median(lengths),
        "  90 % have at most": lengths[int(0.9 * (len(lengths) - 1))],
        "  longest": lengths[-1],
        "packed assignments, per 1,000": per_thousand(sum(is_packed(n) for f in files for n in f.nodes(ast.Assign))),
        "conditional expressions, per 1,000": per_thousand(count(ast.IfExp)),
        "comprehensions, per 1,000": per_thousand(count(*COMPREHENSIONS)),
        "parameters": len(params),
        "  typed Any": sum(is_any(p) for p, starred in params if not starred),
        "  typed Any, *args and **kwargs": sum(is_any(p) for p, starred in params if starred),
        "numeric constants of modules": sum(map(constants, files)),
        "names": homes(files),
    }


def packages():
    """Folders to count: ours, and two libraries of the same kind."""
    found = {"pyro_dgm": pathlib.Path.cwd() / "pyro_dgm"}
    for name in ("zuko", "flowjax"):
        spec = importlib.util.find_spec(name)
        path = os.environ.get(name.upper()) or (spec and spec.submodule_search_locations[0])
        if path and pathlib.Path(path).is_dir():
            found[name] = pathlib.Path(path)
        else:
            print(f"{name} is left out: it is not installed, and {name.upper()} names no folder")
    return found


def print_census(columns):
    print(f"{'':38s}" + "".join(f"{name:>12s}" for name in columns))
    for key in columns["pyro_dgm"]:
        if key != "names":
            print(f"{key:38s}" + "".join(f"{column[key]:>12,}" for column in columns.values()))
    for kind, label in {
        "public": "names of two homes",
        "private": "  private",
        "files": "file names of two rooms",
    }.items():
        print(f"{label:38s}" + "".join(f"{len(column['names'][kind]):>12,}" for column in columns.values()))
    for kind, names in columns["pyro_dgm"]["names"].items():
        print(f"  {kind}: {', '.join(names) or 'none'}")


def walk(name):
    """One walk in a process of its own, on the package of the current directory."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.getcwd(),
        "PYTHONSAFEPATH": "1",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, str(WALKS), name], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"walk {name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def print_walk(name, row):
    numbers = [f"{row[k]} {k}" for k in ("functions", "files", "rooms", "file arrows", "room pairs")]
    print(f"\n{name}\n  {', '.join(numbers)}")
    print(f"  calls upwards: {len(row['climbs'])} climbs, {row['hooks']} hooks, {row['library hooks']} library hooks")
    by_pair = Counter(tuple(c.split(":")[0].split("/")[0] for c in climb.split(" -> ")) for climb in row["climbs"])
    for pair, n in by_pair.most_common():
        print(f"    {' -> '.join(pair)}: {n}")
    for climb in row["climbs"]:
        print(f"      {climb}")
    for what, cost in row["one density"].items():
        print(f"  {what}: {cost['calls']} calls, {cost['depth']} deep, {cost['files']} files")


def main(arguments):
    rows = {}
    if not arguments.only or "census" in arguments.only:
        rows["census"] = {name: census(folder) for name, folder in packages().items()}
        print_census(rows["census"])
    if not arguments.only or "walks" in arguments.only:
        for name in ("posterior", "amortised", "likelihood"):
            rows[name] = walk(name)
            print_walk(name, rows[name])
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*")
    main(parser.parse_args())
