"""How results show themselves: as aligned text, and in a notebook as small tables, every text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

__all__ = ["facts_html", "table_html", "table_text"]


def table_text(rows: Iterable[Sequence[str]]) -> str:
    """Return rows as lines whose columns are aligned on the right."""
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def table_html(header: Sequence[object], rows: Iterable[Sequence[object]], title: str = "") -> str:
    """Return a table with a header.

    Args:
        header: One text a column.
        rows: Their cells; what is no text is shown as ``str`` shows it.
        title: A line above it.

    Returns:
        HTML without scripts and styles of its own: a notebook's apply.
    """
    lines = ["<table>"]
    if title:
        lines.append(f"<caption>{_escaped(title)}</caption>")
    lines.append("<thead>" + _row(header, "th") + "</thead><tbody>")
    lines += [_row(row, "td") for row in rows]
    return "\n".join([*lines, "</tbody></table>"])


def facts_html(title: str, facts: Mapping[str, object]) -> str:
    """Return a table of two columns under a title, what is None left out.

    Args:
        title: What it is about.
        facts: Name and value of each row.

    Returns:
        HTML.
    """
    rows = [
        f"<tr><th scope='row'>{_escaped(name)}</th><td>{_escaped(value)}</td></tr>"
        for name, value in facts.items()
        if value is not None
    ]
    return "\n".join([f"<table><caption>{_escaped(title)}</caption><tbody>", *rows, "</tbody></table>"])


def _escaped(value: object) -> str:
    from html import escape  # which no import of the package needs

    return escape(str(value))


def _row(cells: Sequence[object], kind: str) -> str:
    return "<tr>" + "".join(f"<{kind}>{_escaped(cell)}</{kind}>" for cell in cells) + "</tr>"
