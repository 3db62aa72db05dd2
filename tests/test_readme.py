"""The README's first example runs as pasted; files and names in the pages exist, and public names have their place there."""

import importlib
import inspect
import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*.py")),
]
# Names that the pages give to objects, too, are left out.
ROOMS = {p.parent.name for p in (ROOT / "pyro_dgm").glob("*/__init__.py")} - {"vae", "cnf", "ratio", "model", "train"}


def example():
    text = README.read_text()
    start = text.index("```python")
    assert text[:start].count("\n") < 25, "the first code comes late"
    return re.search(r"```python\n(.*?)```", text, re.S).group(1)


def test_the_example_is_short_and_gives_the_evidence(capsys):
    code = example()
    assert len(code.strip().splitlines()) <= 20
    names = {}
    exec(code, names)
    printed = capsys.readouterr().out
    verdict = names["dgm"].khat(names["idata"])
    assert abs(verdict.log_evidence - -31.311) < 5 * max(verdict.log_evidence_error, 0.005)
    assert verdict.status == "good" and "posterior: good" in printed and "mu" in printed
    mean = names["idata"].posterior["mu"].values
    assert abs(mean.mean() - 4.397) < 5 * mean.std() / mean.size**0.5  # exact, by quadrature


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_names_in_a_page_exist(page):
    text = page.read_text()
    for path in re.findall(r"(?<![\w./*-])(\w+(?:/\w+)*/\w+\.py)\b", text):
        assert any((folder / path).exists() for folder in (ROOT, ROOT / "pyro_dgm", ROOT / "tests")), path
    for name in re.findall(r"\b(?:dgm|pyro_dgm)((?:\.[A-Za-z_]\w*)+)", text):
        found(name[1:])
    for name in re.findall(rf"`((?:{'|'.join(sorted(ROOMS))})\.[A-Za-z_]\w*)", text):
        found(name)


def found(name):
    """The object behind a dotted name of the package; its rooms are imported where they must be."""
    home, _, last = f"pyro_dgm.{name}".rpartition(".")
    try:
        return getattr(importlib.import_module(home), last)  # train.fit.fit: the file, not the function
    except (ModuleNotFoundError, AttributeError):
        return walked(name)


def walked(name):
    thing = importlib.import_module("pyro_dgm")
    for i, part in enumerate(name.split(".")):
        if not hasattr(thing, part):
            try:
                importlib.import_module("pyro_dgm." + ".".join(name.split(".")[: i + 1]))
            except ImportError as error:
                assert "needs the extra" in str(error)
                return
        thing = getattr(thing, part)


RUN = [page for page in PAGES if page.read_text().startswith("---\nrun: true\n")]


@pytest.mark.parametrize("page", RUN, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_of_pages_that_are_run_compiles(page):
    blocks = re.findall(r"^```python\n(.*?)^```\n", page.read_text(), re.M | re.S)
    assert blocks and [compile(block, page.name, "exec") for block in blocks]


def test_pages_are_run_block_by_block_with_what_they_print_and_draw():
    """Planted fault: figures that are left open for the next block."""
    execute = runpy.run_path(str(ROOT / "docs/hooks/execute.py"))["run"]
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.figure()  # of somebody else
    draw = "import matplotlib.pyplot as plt\n_ = plt.plot([1, 2])\nn = 41"
    named = "from matplotlib.figure import Figure\nfigure = Figure()"
    found = execute(["print('one')", draw, "print(n + 1)", named, "figure"])
    assert [result["text"] for result in found["results"]] == ["one\n", "", "42\n", "", ""]
    assert [len(result["figures"]) for result in found["results"]] == [0, 1, 0, 1, 0]


def test_docstrings_become_markdown():
    """Planted fault: a private name that is linked, so that the site has a broken link."""
    griffe = pytest.importorskip("griffe", reason="of the docs extra")
    roles = runpy.run_path(str(ROOT / "docs/hooks/roles.py"))["Roles"]()
    package = griffe.load("pyro_dgm", search_paths=[ROOT], extensions=griffe.Extensions(roles))
    text = "See :func:`~pyro_dgm.fit`, :func:`~pyro_dgm.guides.start.find_start`, :math:`a_i`.\n\n.. math:: x\n\nExample:\n    >>> 1\n"
    found = roles.markdown(text, package["flows.families.NSF"])
    assert "[`fit`][pyro_dgm.train.fit.fit], `find_start`, \\(a_i\\)." in found
    assert "\\[\nx\n\\]" in found and "Examples:" in found


def test_the_paper_cites_what_its_references_list():
    """Planted faults: a key that no work has; a work that is not cited."""
    pytest.importorskip("mkdocs", reason="of the docs extra")
    hook = runpy.run_path(str(ROOT / "docs/hooks/project.py"))
    shown = hook["cited"]((ROOT / "docs/project/paper.md").read_text())
    works = hook["references"]()
    assert "[@" not in shown and "([Bingham et al. 2019](#bingham2019))" in shown
    assert len(works) > 20 and [key for key in works if f'id="{key.lower()}"' not in shown] == []
    assert hook["cited"]("no reference") == "no reference"


def test_the_front_page_shows_the_example():
    assert example() in (ROOT / "docs/index.md").read_text()


def test_messages_of_the_page_of_errors_are_those_of_the_package():
    """Planted fault: a word of a quotation changed."""
    sources = "".join(file.read_text() for file in sorted((ROOT / "pyro_dgm").rglob("*.py")))
    joined = re.sub(r'"\s*f?"', "", sources)  # a message over several lines is one
    quoted = re.findall(r"^> (.+)$", (ROOT / "docs/errors.md").read_text(), re.M)
    assert len(quoted) >= 10
    assert [words for words in quoted if words not in joined] == []


PUBLIC = ["pyro_dgm", *(f"pyro_dgm.{p.parent.name}" for p in sorted((ROOT / "pyro_dgm").glob("*/__init__.py")))]


@pytest.mark.parametrize("room", PUBLIC)
def test_every_public_name_stands_in_the_reference(room):
    """Planted fault: a directive taken out of docs/reference/flows.md."""
    text = "".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    shown = [found(name) for name in re.findall(r"^::: pyro_dgm\.([\w.]+)$", text, re.M)]
    for name in getattr(importlib.import_module(room), "__all__", []):
        thing = getattr(importlib.import_module(room), name)
        named = inspect.ismodule(thing) and f"pyro_dgm.{name}" in text or f"{room}.{name}`" in text
        assert any(thing is s for s in shown) or named, f"{room}.{name} stands on no page of docs/reference"


STRICT = """
import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm


def model(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("point", len(x)):
        return pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


x = torch.linspace(-1.0, 1.0, 20)
guide = dgm.AutoFlow(model)
history = dgm.fit(dgm.STL_ELBO()(model, guide), (x, 2.0 * x), seed=0)
verdict = dgm.khat(dgm.from_svi(model, guide, x, 2.0 * x, seed=0))
flow = dgm.NSF(2, context_features=1)
dgm.fit(dgm.MaximumLikelihood(flow), (torch.randn(100, 2), torch.randn(100, 1)), max_steps=10)
amortised = dgm.AmortizedGuide(model, observed=["y"], args=(x,))
simulations = dgm.simulate(model, 1_000, x, observed=["y"], seed=0)
dgm.fit(dgm.ForwardKL(amortised), simulations)
reveal_type(guide)
reveal_type(history.loss)
reveal_type(verdict)
reveal_type(verdict.log_evidence)
reveal_type(flow(torch.zeros(3, 1)))
reveal_type(flow(torch.zeros(3, 1)).log_prob(torch.zeros(3, 2)))
reveal_type(flow(torch.zeros(3, 1)).sample((5,)))
reveal_type(dgm.Generator(2)())
reveal_type(simulations)
reveal_type(amortised.condition(y=x).sample((5,)))
"""
REVEALED = [
    "pyro_dgm.guides.autoflow.AutoFlow",
    "list[float]",
    "pyro_dgm.diagnostics.khat.KHat",
    "float",
    "pyro_dgm.core.distribution.LearnedDistribution",
    "torch._tensor.Tensor",
    "torch._tensor.Tensor",
    "pyro_dgm.core.distribution.ImplicitDistribution",
    "pyro_dgm.simulation.store.Simulations",
    "dict[str, torch._tensor.Tensor]",
]


def test_a_users_program_passes_a_strict_type_check(tmp_path):
    """Some 20 CPU seconds, once. Planted faults: a call of a family that is Any; ``seed: int`` in the place of ``int | None``."""
    pytest.importorskip("mypy", reason="of the test extra")
    (tmp_path / "program.py").write_text(STRICT)
    (tmp_path / "mypy.ini").write_text("[mypy]\n")
    known = [
        "--strict",
        "--follow-imports=silent",
        "--cache-dir",
        str(ROOT / ".cache/mypy"),
    ]  # silent: as an installed package
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *known, "program.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-1_000:]
    assert re.findall(r'Revealed type is "(?:builtins\.)?(.+)"', done.stdout) == REVEALED
