"""Build extension: the section title "Example" means the same as "Examples", a block of code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_TITLE = re.compile(r"^(\s*)Example:(?=\s*$)", re.MULTILINE)


class Examples(Extension):
    """Give every docstring the title that the parser knows."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of one module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _TITLE.sub(r"\1Examples:", obj.docstring.value)
