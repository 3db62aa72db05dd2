"""The README's first example runs as pasted and ends in the number it promises; files and names in the pages exist."""

import importlib
import pathlib
import re

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
    thing = importlib.import_module("pyro_dgm")
    for i, part in enumerate(name.split(".")):
        if not hasattr(thing, part):
            try:
                importlib.import_module("pyro_dgm." + ".".join(name.split(".")[: i + 1]))
            except ImportError as error:
                assert "needs the extra" in str(error)
                return
        thing = getattr(thing, part)
