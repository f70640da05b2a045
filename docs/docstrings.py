"""Build extension: what the API pages need to know of the source.

The section title "Example" means the same as "Examples", a block of code. A displayed formula, written
``.. math::``, is one. A function whose module has its name is the function, as it is for whoever imports it.
"""

from __future__ import annotations

import html
import re
import textwrap
from typing import Any

from griffe import Alias, Extension, Module, Object

_TITLE = re.compile(r"^(\s*)Example:(?=\s*$)", re.MULTILINE)
_DISPLAY = re.compile(
    r"^([ \t]*)\.\. math::(.*(?:\n(?:\1[ \t]+.*|[ \t]*(?=\n\1[ \t]+\S)))*)",
    re.MULTILINE,
)


def _displayed(found: re.Match[str]) -> str:
    """Turn a directive into a block that Markdown leaves alone."""
    first, *more = found[2].split("\n")
    formula = html.escape(
        "\n".join([first.strip(), textwrap.dedent("\n".join(more))]).strip(),
        quote=False,
    )
    lines = [line for line in formula.splitlines() if line.strip()]
    block = (
        "\n".join([rf'<div class="formula">\[{lines[0]}', *lines[1:]])
        + r"\]</div>"
    )
    return textwrap.indent(block, found[1])


class Docstrings(Extension):
    """Give every docstring what the parser knows, and every public name what it stands for."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of one module, class, function or attribute."""
        _rewrite(obj)

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Put functions in the place of the modules that have their names."""
        _uncover(pkg)


def _rewrite(obj: Object) -> None:
    if obj.docstring is not None:
        text = _TITLE.sub(r"\1Examples:", obj.docstring.value)
        obj.docstring.value = _DISPLAY.sub(_displayed, text)


def _uncover(module: Module) -> None:
    for part in list(module.modules.values()):
        if not part.is_alias:
            _uncover(part)
    names = list(map(str, module.exports or ()))
    covering = {}  # modules that have the name of what is imported from them
    for name in names:
        member = module.members.get(name)
        if member is None or member.is_alias or not member.is_module:
            continue
        if module.imports.get(name) == f"{member.path}.{name}":
            covering[member.path] = member
    for member in (
        covering.values()
    ):  # out of the tree, where nobody calls on_object for what it holds
        for holder in (member, *member.classes.values()):
            for inside in holder.members.values():
                if not inside.is_alias:
                    _rewrite(inside)
    for name in names:
        source, _, inside = module.imports.get(name, "").rpartition(".")
        if source in covering:
            found = covering[source].members[inside]
            module.members[name] = Alias(
                name,
                found.final_target if found.is_alias else found,
                parent=module,
            )
        elif (
            name in module.members and module.members[name].is_alias
        ):  # it may know the module already
            target = module.members[name].target_path
            module.members[name] = Alias(name, target, parent=module)
