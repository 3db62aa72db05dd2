"""A page for each example, and one with all of them: text from the example, picture and seconds from thumbnails.py.

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
INTRODUCTION = """# Gallery

Programs of a hundred lines, from `examples/` in the repository. Each runs by itself, `python examples/NAME.py`, and leaves
its pictures in `out/`; with `--smoke` it takes a few seconds. The seconds here are those of one thread, imports included.
"""


def on_files(files: Files, *, config: MkDocsConfig) -> None:
    """Add the pages."""
    examples = sorted((ROOT / "examples").glob("[0-9]*.py"))
    files.append(File.generated(config, "gallery.md", content="\n".join([INTRODUCTION, *cards(examples)])))
    for example in examples:
        files.append(File.generated(config, f"gallery/{example.stem}.md", content=page(example)))


def cards(examples: list[pathlib.Path]) -> list[str]:
    """A card for each example."""
    inside = [card(example) for example in examples]
    return ['<div class="grid cards" markdown>', "", *inside, "</div>"]


def card(example: pathlib.Path) -> str:
    """Picture, first sentence and seconds."""
    name = example.stem
    shown = f"    [![]({picture(name)})](gallery/{name}.md)\n\n" if picture(name) else ""
    return f"-   [**{title(name)}**](gallery/{name}.md)\n\n{shown}    {said(example).splitlines()[0]}{took(name)}\n"


def page(example: pathlib.Path) -> str:
    """The whole text, the picture and the source."""
    name = example.stem
    shown = f"![What the example draws](../{picture(name)})\n\n" if picture(name) else ""
    source = example.read_text().split('"""', 2)[2].strip()
    return f"# {title(name)}\n\n{text(said(example))}{took(name)}\n\n{shown}`examples/{name}.py`:\n\n```python\n{source}\n```\n"


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


def took(name: str) -> str:
    """What it cost, in brackets."""
    seconds = PICTURES / "seconds.json"
    known = json.loads(seconds.read_text()) if seconds.exists() else {}
    return f" ({known[name]} CPU seconds)" if name in known else ""
