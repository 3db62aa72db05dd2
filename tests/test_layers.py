"""The order of rooms, the size of files and functions, and what importing the package leaves behind."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(p for p in (ROOT / "pyro_dgm").rglob("*.py") if p.name != "conftest.py")

# A room may import those that stand before it.
ROOMS = [
    "core",
    "model",
    "train",
    "flows",
    "cnf",
    "objectives",
    "vae",
    "guides",
    "gan",
    "ratio",
    "amortized",
    "simulation",
    "evaluate",
    "diagnostics",
]
# Imported inside functions only: they are slow, or optional.
LAZY = {"arviz", "arviz_base", "arviz_stats", "matplotlib", "sklearn", "torchdiffeq"}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, node


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_downwards(path):
    room = path.relative_to(ROOT / "pyro_dgm").parts[0]
    for name, _ in imported(ast.parse(path.read_text())):
        if name.startswith("pyro_dgm.") and room != "__init__.py":
            below = ROOMS[: ROOMS.index(room) + 1]
            assert name.split(".")[1] in below, f"{path.name} of {room}/ imports {name}"


def test_every_room_has_a_place_in_the_order():
    assert sorted(ROOMS) == sorted(p.parent.name for p in (ROOT / "pyro_dgm").glob("*/__init__.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_slow_and_guarded_libraries_are_imported_where_they_should_be(path):
    tree = ast.parse(path.read_text())
    for name, node in imported(tree):
        assert not (name.split(".")[0] in LAZY and node in tree.body), f"{path.name} imports {name} at its top"
        assert name.split(".")[0] != "zuko" or path.name == "upstream.py", "zuko is imported by core/upstream.py only"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            doc = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            assert node.end_lineno - node.lineno + 1 - doc <= 60, node.name


def test_no_two_classes_share_a_name():
    trees = [ast.parse(p.read_text()) for p in FILES]
    names = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert {k for k in names if names.count(k) > 1} == set()


@pytest.mark.parametrize(
    "order",
    [
        "pyro, pyro_dgm",
        "pyro_dgm, pyro",
        "zuko, pyro, pyro_dgm",
        "pyro_dgm, zuko, pyro",
        "pyro, pyro_dgm, zuko",
        "torch, pyro_dgm, zuko",
    ],
)
def test_validation_stays_on_in_any_import_order(order):
    code = (
        f"import {order}\nimport pyro.distributions as dist, torch\n"
        "from torch.distributions import Distribution\n"
        "assert Distribution._validate_args and isinstance(Distribution.__dict__['arg_constraints'], property)\n"
        "try:\n    dist.Normal(0., -1.)\nexcept ValueError:\n    print('refused')\n"
    )
    if order.startswith("zuko"):  # zuko has replaced the property before we came; Pyro's import put validation back
        code = code.replace(" and isinstance(Distribution.__dict__['arg_constraints'], property)", "")
    assert run(code).stdout == "refused\n"


def test_an_earlier_zuko_is_left_alone_and_named():
    """`import pyro, zuko` had switched validation off before; it stays as it was, and a warning says so."""
    result = run("import pyro, zuko, pyro_dgm, torch; print(torch.distributions.Distribution._validate_args)")
    assert result.stdout == "False\n" and "pyro.enable_validation(True)" in result.stderr


def test_optimisers_are_left_as_they_were():
    """Planted fault: a hook on every optimiser of the process."""
    code = (
        "import pyro, torch.optim.optimizer as o\n"
        "before = dict(vars(o.Optimizer)), dict(o._global_optimizer_pre_hooks), dict(o._global_optimizer_post_hooks)\n"
        "import pyro_dgm\n"
        "assert before == (dict(vars(o.Optimizer)), o._global_optimizer_pre_hooks, o._global_optimizer_post_hooks)\n"
        "print('untouched')\n"
    )
    assert run(code).stdout == "untouched\n"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
