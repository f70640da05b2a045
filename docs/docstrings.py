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
_DISPLAY = re.compile(r"^([ \t]*)\.\. math::(.*(?:\n(?:\1[ \t]+.*|[ \t]*(?=\n\1[ \t]+\S)))*)", re.MULTILINE)


def _displayed(found: re.Match[str]) -> str:
    """Turn a directive into a block that Markdown leaves alone."""
    first, *more = found[2].split("\n")
    formula = html.escape("\n".join([first.strip(), textwrap.dedent("\n".join(more))]).strip(), quote=False)
    lines = [line for line in formula.splitlines() if line.strip()]
    block = "\n".join([rf'<div class="formula">\[{lines[0]}', *lines[1:]]) + r"\]</div>"
    return textwrap.indent(block, found[1])


class Docstrings(Extension):
    """Give every docstring what the parser knows, and every public name what it stands for."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of one module, class, function or attribute."""
        if obj.docstring is not None:
            text = _TITLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = _DISPLAY.sub(_displayed, text)

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Put functions in the place of the modules that have their names."""
        _uncover(pkg)


def _uncover(module: Module) -> None:
    for part in list(module.modules.values()):
        if not part.is_alias:
            _uncover(part)
    for name in map(str, module.exports or ()):
        member = module.members.get(name)
        if member is None:
            continue
        if member.is_alias:  # it may know the module already
            module.members[name] = Alias(name, member.target_path, parent=module)
        elif member.is_module and module.imports.get(name) == f"{member.path}.{name}":
            inside = member.members[name]
            module.members[name] = inside.final_target if inside.is_alias else inside
