"""Pages that say ``run: true`` are run when the site is built, and what they print and draw stands below their code.

A hook of mkdocs. Results are kept in ``.cache/pages`` until the page's code or the package changes. An error in a page
is an error of the build.
"""

import base64
import hashlib
import json
import pathlib
import re
import subprocess
import sys

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[2]
CODE = re.compile(r"^```python\n(.*?)^```\n", re.M | re.S)


def on_page_markdown(markdown: str, *, page: Page, config: dict, files: Files) -> str:
    """The page with its results, and a last line that says what they cost."""
    if not page.meta.get("run"):
        return markdown
    found = results(page.file.src_uri, CODE.findall(markdown))
    each = iter(found["results"])
    shown = CODE.sub(lambda code: code[0] + below(next(each), page, config, files), markdown + "\n")
    return f"{shown}\n*The code of this page ran when the site was built, in {found['seconds']:.0f} CPU seconds.*\n"


def results(page: str, blocks: list[str]) -> dict:
    """What the blocks of a page print and draw: kept from an earlier build, or run now."""
    kept = ROOT / ".cache/pages" / f"{fingerprint(blocks)}.json"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "docs/hooks/execute.py"), str(kept)]
        done = subprocess.run(command, input=json.dumps(blocks), capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise PluginError(f"{page}: its code fails.\n{done.stderr[-3_000:]}")
    return json.loads(kept.read_text())


def fingerprint(blocks: list[str]) -> str:
    """Changes with the code of the page, of the package and of what runs it."""
    sources = [*sorted((ROOT / "pyro_dgm").rglob("*.py")), ROOT / "docs/hooks/execute.py"]
    text = json.dumps(blocks).encode() + b"".join(file.read_bytes() for file in sources)
    return hashlib.sha256(text).hexdigest()[:24]


def below(result: dict, page: Page, config: dict, files: Files) -> str:
    """What stands below a block: its text, and its figures as files of the site."""
    text = result["text"].rstrip()
    shown = f"\n``` {{ .text .printed }}\n{text}\n```\n" if text else ""
    for figure in result["figures"]:
        content = base64.b64decode(figure)
        name = f"assets/run/{hashlib.sha256(content).hexdigest()[:16]}.png"
        files.append(File.generated(config, name, content=content))
        up = "../" * page.file.src_uri.count("/")
        shown += f"\n![What the code above draws]({up}{name})\n"
    return shown
