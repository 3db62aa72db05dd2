"""A page for each example, and one with all of them: text from the example; picture, output and seconds from thumbnails.py.

A hook of mkdocs.
"""

import ast
import json
import pathlib

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[2]
NAMES = {word.lower(): word for word in ("AVB", "GAN", "I", "Lotka", "MNIST", "Markov", "VAE", "Volterra")}
PICTURES = ROOT / "docs/assets/gallery"
FIRST = "06_four_families"
INTRODUCTION = """# Gallery

Programs of a hundred lines, from `examples/` in the repository. Each runs by itself, `python examples/NAME.py`, and leaves
its pictures in `out/`; with `--smoke` it takes a few seconds. The seconds here are CPU seconds of one thread, imports included.

## Four families side by side

The same 8 x 8 digits by a flow, a continuous flow, a VAE and a GAN ([the program](gallery/06_four_families.md), [how each is
judged](theory/evaluation.md)). No family answers everything:

| family | density of an image | draws | code of an image | cannot say |
|---|---|---|---|---|
| flow (`MAF`) | exact | pixel by pixel | 64 numbers | what an image consists of |
| continuous flow | exact, by a solver | by a solver | 64 numbers | the same, nor anything fast |
| `VAE` | a bound, with its error | one pass | 16 numbers | the exact density |
| `Generator` | a slow bound | one pass | none | whether a kind of image is missing |
"""


def on_files(files: Files, *, config: MkDocsConfig) -> None:
    """Add the pages."""
    examples = sorted((ROOT / "examples").glob("[0-9]*.py"))
    files.append(File.generated(config, "gallery.md", content=overview(examples)))
    for example in examples:
        files.append(File.generated(config, f"gallery/{example.stem}.md", content=page(example)))


def overview(examples: list[pathlib.Path]) -> str:
    """The four families first, then a card for each example."""
    shown = f"\n![Draws of the four families]({picture(FIRST)})\n{smoked(FIRST)}" if picture(FIRST) else ""
    cards = ['<div class="grid cards" markdown>', "", *[card(example) for example in examples], "</div>"]
    return "\n".join([INTRODUCTION + shown, "## All programs", "", *cards])


def card(example: pathlib.Path) -> str:
    """Picture, first sentence and seconds."""
    name = example.stem
    shown = f"    [![]({picture(name)})](gallery/{name}.md)\n\n" if picture(name) else ""
    return f"-   [**{title(name)}**](gallery/{name}.md)\n\n{shown}    {said(example).splitlines()[0]}{took(name)}\n"


def page(example: pathlib.Path) -> str:
    """The whole text, the picture, what it printed, and the source."""
    name = example.stem
    shown = f"![What the example draws](../{picture(name)})\n{smoked(name)}\n" if picture(name) else ""
    printed = (
        f"It prints:\n\n``` {{ .text .printed }}\n{run(name)['printed']}\n```\n\n" if run(name).get("printed") else ""
    )
    source = example.read_text().split('"""', 2)[2].strip()
    code = f"`examples/{name}.py`:\n\n```python\n{source}\n```\n"
    return f"# {title(name)}\n\n{text(said(example))}{took(name)}\n\n{shown}{printed}{code}"


def said(example: pathlib.Path) -> str:
    """The example's docstring, without the line that says how it is called."""
    lines = ast.get_docstring(ast.parse(example.read_text())).splitlines()
    return "\n".join(line for line in lines if not line.startswith("python examples/")).strip()


def text(said: str) -> str:
    """Indented formulas as a block of text; double backticks are code in Markdown too."""
    return "\n".join(f"    {line}" if line.startswith("    ") else line for line in said.splitlines())


def title(name: str) -> str:
    """``02_hard_posteriors`` as "Hard posteriors", with the names that are not words."""
    words = " ".join(NAMES.get(word, word) for word in name[3:].split("_"))
    return words[0].upper() + words[1:]


def picture(name: str) -> str:
    """Where the picture of an example lies in the docs; empty where there is none."""
    return f"assets/gallery/{name}.webp" if (PICTURES / f"{name}.webp").exists() else ""


def run(name: str) -> dict:
    """``seconds``, ``smoke`` and ``printed`` of its last run; empty where it was not run."""
    runs = PICTURES / "runs.json"
    return json.loads(runs.read_text()).get(name, {}) if runs.exists() else {}


def took(name: str) -> str:
    """What it cost, in brackets."""
    if not run(name):
        return ""
    return f" ({run(name)['seconds']} CPU seconds{', with `--smoke`' if run(name)['smoke'] else ''})"


def smoked(name: str) -> str:
    """A line below the picture of a run of a few steps."""
    return (
        "\n*Of a run with `--smoke`: a few steps, to show what is drawn. Its numbers mean nothing.*\n"
        if run(name).get("smoke")
        else ""
    )
