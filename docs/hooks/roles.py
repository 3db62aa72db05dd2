"""Sphinx roles of the docstrings as Markdown: formulas for KaTeX, names as links into the reference.

A griffe extension. A name of the package that does not exist is an error of the build; one that is not public is shown as code.
"""

import re
import textwrap

import griffe

LOG = griffe.get_logger("pyro_dgm.roles")
ROLE = re.compile(r":(class|func|meth|attr|mod):`(~?)([^`]+)`")
INLINE = re.compile(r":math:`([^`]+)`")
BLOCK = re.compile(r"^( *)\.\. math::(.*)\n((?:\1 +\S.*\n|[ ]*\n)*)", re.M)
PROMPTS = re.compile(r"^(>>> (?:.+\n)+)", re.M)  # outside of a section; griffe knows those inside
LINES = re.compile(r"^( +)\| ", re.M)


class Roles(griffe.Extension):
    """Rewrites every docstring once all modules are read, so that names can be looked up where they stand."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        self.public = public(pkg)
        for place in objects(pkg):
            if place.docstring:
                place.docstring.value = self.markdown(place.docstring.value, place)

    def markdown(self, text: str, place: griffe.Object) -> str:
        """A docstring in Markdown: names, formulas, references as a list, ``Example`` as the section that griffe knows."""
        text = BLOCK.sub(block, text + "\n")
        text = INLINE.sub(lambda m: rf"\({' '.join(m[1].split())}\)", text)
        text = ROLE.sub(lambda m: self.link(place, m[3], bool(m[2])), text)
        text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.M)
        return LINES.sub(r"\1- ", PROMPTS.sub(r"```pycon\n\1```\n", text))

    def link(self, place: griffe.Object, name: str, short: bool) -> str:
        """A cross-reference where the name stands in the reference, and code where it does not."""
        shown = name.rpartition(".")[2] if short else name
        path = resolved(place, name)
        if path is None:
            if name.startswith("pyro_dgm"):
                LOG.warning("%s: the docstring names %s, which does not exist", place.path, name)
            return f"`{shown}`"
        known = path in self.public or path.rpartition(".")[0] in self.public
        return f"[`{shown}`][{path}]" if known else f"`{shown}`"


def block(found: re.Match) -> str:
    """A ``.. math::`` directive, on its line or below it, as a displayed formula."""
    indent, first, below = found[1], found[2].strip(), textwrap.dedent(found[3]).strip()
    formula = "\n".join(filter(None, [first, below]))
    return "\n" + textwrap.indent(f"\\[\n{formula}\n\\]", indent) + "\n\n"


def objects(place: griffe.Object) -> list[griffe.Object]:
    """A module or class and all that is defined in it; what it imports is left to its own home."""
    own = [m for m in place.members.values() if not m.is_alias]
    return [place, *(o for m in own for o in objects(m))]


def public(pkg: griffe.Module) -> set[str]:
    """Where the names of the package and of its rooms are defined; each is told the names by which it is reached."""
    found = set()
    for room in [pkg, *(m for m in pkg.modules.values() if not m.is_alias)]:
        for name in room.exports or []:
            if home := defined(room, name):
                pkg.modules_collection[home].aliases[f"{room.path}.{name}"] = room[name]
                found.add(home)
    return found


def defined(scope: griffe.Object, name: str) -> str | None:
    """The path at which what a scope calls by this name is defined; None for what is not of the package.

    Beside ``fit`` there is a file ``fit.py``, which griffe finds in its place: the function in it is meant.
    """
    try:
        found = scope[name]
        last = name.rpartition(".")[2]
        inside = found.is_module and last in found.members
        return (found[last] if inside else found).canonical_path
    except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
        return None


def resolved(place: griffe.Object, name: str) -> str | None:
    """The path at which a name of a docstring is defined, seen from there outwards."""
    scope = place
    while scope is not None:
        if found := defined(scope, name):
            return found
        scope = scope.parent
    return defined(place.package, name.removeprefix("pyro_dgm."))
