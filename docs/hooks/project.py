"""What the site says of the project: its version, how to cite it, and ``llms.txt``, a list of all pages for programs that read.

A hook of mkdocs. ``{{ version }}`` and ``{{ bibtex }}`` in a page are replaced, and ``[@key; @other]`` by works of paper.bib.
"""

import pathlib
import re
from html import unescape

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[2]
SAID: dict[str, tuple[str, str]] = {}  # page: title and first sentence


def on_config(config: MkDocsConfig) -> None:
    """The version stands at the foot of every page."""
    config.copyright = f"pyro_dgm {version()}. {config.copyright}"
    SAID.clear()


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill in what is known of the project, and the references of the paper."""
    return cited(markdown.replace("{{ version }}", version()).replace("{{ bibtex }}", bibtex()))


def on_page_content(html: str, *, page: Page, **_: object) -> None:
    """Remember what the page says first."""
    said = re.search(r"<p>(.*?)</p>", html, re.S)
    plain = " ".join(unescape(re.sub(r"<[^>]+>", "", said[1])).split()) if said else ""
    SAID[page.url] = (page.title, re.split(r"(?<=[.?]) ", plain)[0])


def on_post_build(config: MkDocsConfig) -> None:
    """Write ``llms.txt``: see https://llmstxt.org."""
    base = config.site_url or ""
    pages = [f"- [{title}]({base}{url}): {said}" for url, (title, said) in SAID.items()]
    text = "\n".join(
        [f"# {config.site_name}", "", f"> {config.site_description}", "", example(), "", "## Pages", "", *pages, ""]
    )
    (pathlib.Path(config.site_dir) / "llms.txt").write_text(text)


def version() -> str:
    """The version of the package, without importing it."""
    return re.search(r'__version__ = "(.+)"', (ROOT / "pyro_dgm/__init__.py").read_text())[1]


def bibtex() -> str:
    """CITATION.cff as an entry for BibTeX."""
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    authors = " and ".join(
        f"{{{a['name']}}}" if "name" in a else f"{a['family-names']}, {a['given-names']}" for a in cff["authors"]
    )
    fields = {
        "title": f"{{{cff['title']}}}",
        "author": authors,
        "version": str(cff["version"]),
        "license": cff["license"],
    }
    return "\n".join([f"@{cff['type']}{{pyro_dgm,", *(f"  {key} = {{{value}}}," for key, value in fields.items()), "}"])


def cited(markdown: str) -> str:
    """``[@key; @other]`` as links to a list of references, which is added."""
    works = references()
    found = re.findall(r"\[(@\w+(?:; @\w+)*)\]", markdown)
    for keys in found:
        links = "; ".join(f"[{works[key][0]}](#{key.lower()})" for key in re.findall(r"@(\w+)", keys))
        markdown = markdown.replace(f"[{keys}]", f"({links})")
    used = sorted(set(re.findall(r"@(\w+)", " ".join(found))))
    listed = [f'- <a id="{key.lower()}"></a>{works[key][1]}' for key in used]
    return "\n".join([markdown, "## References", "", *listed, ""]) if used else markdown


def references() -> dict[str, tuple[str, str]]:
    """Each key of paper.bib with its short name, "Yao et al. 2018", and its line in a list."""
    text = (ROOT / "docs/project/paper.bib").read_text()
    works = {}
    for key, body in re.findall(r"^@\w+\{(\w+),\n(.*?)^\}", text, re.M | re.S):
        fields = {
            name: re.sub(r"[{}]", "", value).replace("--", "-")
            for name, value in re.findall(r"(\w+) = \{((?:[^{}]|\{[^{}]*\})*)\}", body)
        }
        names = [name.split(",")[0] for name in fields["author"].split(" and ")]
        who = f"{names[0]} et al." if len(names) > 2 or names[-1] == "others" else " and ".join(names)
        where = ", ".join(
            fields[part] for part in ("journal", "booktitle", "volume", "pages", "note") if part in fields
        )
        works[key] = (f"{who} {fields['year']}", f"{who} ({fields['year']}). {fields['title']}. {where}.")
    return works


def example() -> str:
    """The README's first code."""
    return re.search(r"```python\n.*?```", (ROOT / "README.md").read_text(), re.S)[0]
