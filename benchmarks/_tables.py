"""How a benchmark is run and shown: command line, JSON, tables in Markdown, verdicts, the page."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _measure import environment, one_thread

Result = Mapping[str, Any]
# A path ("time.func.cpu_ms.median"), perhaps with a format ("error:.0e"), or a function of the entry.
Column = str | Callable[[Mapping[str, Any]], Any]


def shown(value: Any, spec: str = "") -> str:
    """Return a value as a cell: a spread with its ends, what is missing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return f"{value['median']:.2f} ({value['min']:.2f} - {value['max']:.2f})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if spec or isinstance(value, str):
        return format(value, spec)
    if isinstance(value, int):
        return f"{value:,}"
    if value and abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cell(entry: Mapping[str, Any], column: Column) -> str:
    if callable(column):
        return shown(column(entry))
    path, _, spec = column.partition(":")
    value: Any = entry
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return shown(value, spec)


def table(
    entries: Iterable[Mapping[str, Any]], columns: Mapping[str, Column], left: int = 1, title: str = ""
) -> list[str]:
    """Return a table, a row an entry, its first columns set left; nothing of no entries."""
    rows = [[_cell(entry, column) for column in columns.values()] for entry in entries]
    rule = [":--" if position < left else "--:" for position in range(len(columns))]
    lines = [f"| {' | '.join(row)} |" for row in (list(columns), rule, *rows)]
    return ["", *([title, ""] if title else []), *lines] if rows else []


def provenance(result: Mapping[str, Any]) -> str:
    """Say when, on what and how it was measured."""
    place, options = result["environment"], result.get("options", {})
    threads = "one thread" if place["threads"] == 1 else f"{place['threads']} threads"
    known = [
        f"{place['cpu']} ({place['platform']}, {place['cpu_capability']})",
        f"{threads} on one processor" if place["pinned"] else threads,
        *(f"{name} {place[name.lower()]}" for name in ("Python", "torch", "linear_operator", "ntkops")),
        *(options[name] for name in ("dtype", "device") if name in options),
    ]
    count = options.get("repetitions")
    known += [f"{count} repetition{'s' if count > 1 else ''}"] if count else []
    date = f" on {result['date']}" if "date" in result else ""
    return f"Measured{date}: {', '.join(known)}."


def verdict(
    what: str, of: str, found: float | None, *, least: float | None = None, most: float | None = None
) -> dict[str, Any]:
    """Return what is claimed, of what, and whether what was found holds it; None where nothing was found."""
    asked, bound = ("least", least) if most is None else ("most", most)
    assert bound is not None
    held = None if found is None else found <= bound if most is not None else found >= bound
    return {"what": what, "of": of, asked: bound, "found": found, "held": held}


def verdict_table(verdicts: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a row for each claim and bound, with where it is missed."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for one in verdicts:
        groups.setdefault((one["what"], one.get("least"), one.get("most")), []).append(one)
    rows = []
    for (what, least, most), group in groups.items():
        values = [one["found"] for one in group if one["found"] is not None]
        ends = dict.fromkeys(map(shown, (min(values), max(values)))) if values else ()
        missed = [f"{one['of']} ({shown(one['found'])})" for one in group if one["held"] is False]
        failed = f"**no**: {', '.join(missed)}" if len(group) > 1 else "**no**"
        rows.append(
            {
                "what": what,
                "of": group[0]["of"] if len(group) == 1 else f"{len(group)} cases",
                "asked": f"at most {shown(most)}" if least is None else f"at least {shown(least)}",
                "found": " to ".join(ends) or None,
                "held": None if not values else failed if missed else True,
            }
        )
    columns = {"what is claimed": "what", "of": "of", "asked": "asked", "found": "found", "held": "held"}
    return table(rows, columns, left=5, title="Claims, held to these numbers:")


def fill(page: str, name: str, text: str) -> str:
    """Return a page with the text between the comments ``name`` and ``/name`` replaced."""
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = page.partition(first)
    _, closed, after = rest.partition(last)
    if not (found and closed):
        raise ValueError(f"the page needs the comments {first.strip()} and {last}")
    return f"{before}{first}{text.strip()}\n{last}{after}"


# a subject


def say(text: str) -> None:
    """Tell what comes next, apart from what is printed as the result."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Benchmark:
    """One subject: what is measured of it, what is claimed of it, and the tables of its page.

    Attributes:
        name: Of the script, its JSON, and the comments of the page between which the tables stand.
        about: The first line of the help.
        measure: From the options to lists of entries, and whatever else the JSON is to hold.
        tables: From a result to lines of Markdown.
        judge: From a result to verdicts; nothing is written down that could be computed from the entries.
        derive: From a result to what else the JSON holds, computed from its entries.
        parts: Names among which ``--parts`` chooses.
        key: Fields that tell entries apart: those that are not measured again are kept.
        repetitions: How many by default, and how many if quick; None where nothing is repeated.
        memory: Whether peak memory can be left out.
        extra: Further options, as `argparse` takes them.
    """

    name: str
    about: str | None
    measure: Callable[[argparse.Namespace], dict[str, Any]]
    tables: Callable[[Result], list[str]]
    judge: Callable[[Result], Iterable[dict[str, Any]]] = lambda result: ()
    derive: Callable[[Result], dict[str, Any]] = lambda result: {}
    parts: Sequence[str] = ()
    key: tuple[str, ...] = ()
    repetitions: tuple[int, int] | None = None
    memory: bool = False
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(description=(self.about or "").splitlines()[0])
        add = parser.add_argument
        add("--quick", action="store_true", help="small sizes: shows that it runs, measures nothing")
        if self.parts:
            add("--parts", nargs="+", choices=self.parts, help="measure these; --out keeps its others")
        if self.repetitions:
            full, few = self.repetitions
            add("--repetitions", type=int, help=f"how often; {full} by default, {few} if quick")
        if self.memory:
            add("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
        for flag, settings in self.extra.items():
            add(flag, **settings)
        add("--out", type=Path, help="JSON file to write")
        add("--markdown", type=Path, metavar="JSON", help="print the tables of a result, run nothing")
        add("--page", type=Path, help="with --markdown: put the tables into this page")
        return parser

    def options(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Return the options of a command line."""
        options = self._parser().parse_args(arguments)
        if self.parts and options.parts is None:
            options.parts = list(self.parts)
        if self.repetitions:
            options.repetitions = options.repetitions or self.repetitions[options.quick]
        return options

    def run(self, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """Measure, and return what the JSON holds."""
        options, before = self.options(arguments), None
        if self.parts and options.out is not None and options.out.exists():
            before = _read(options.out) if set(options.parts) < set(self.parts) else None
        if before is not None and before.get("options", before).get("quick", False) != options.quick:
            raise SystemExit(f"{options.out} was measured at other sizes (--quick)")
        noted: dict[str, Any] = {"quick": options.quick}
        if self.repetitions:
            noted["repetitions"] = options.repetitions
        started = time.perf_counter()
        with one_thread():
            place = environment()
            found = self.measure(options)
        result = {
            "benchmark": self.name, "date": datetime.now(UTC).strftime("%Y-%m-%d"), "environment": place,
            **found, "options": {**noted, **found.get("options", {})},
        }  # fmt: skip
        if before is not None:
            result = _joined(before, result, self.key)
        result |= self.derive(result)
        result["targets"] = [] if options.quick else list(self.judge(result))
        result["seconds"] = round(time.perf_counter() - started, 1)
        return result

    def markdown(self, result: Result) -> str:
        """Return where it was measured, the tables, and whether what is claimed holds."""
        claims = () if result.get("options", result).get("quick") else self.judge(result)
        return "\n".join([provenance(result), *self.tables(result), *verdict_table(claims)])

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run from the command line: 1 where a claim does not hold."""
        options = self.options(arguments)
        if options.markdown is not None:
            text = self.markdown(_read(options.markdown))
            print(text)
            if options.page is not None:
                page = fill(options.page.read_text(encoding="utf-8"), self.name, text)
                options.page.write_text(page, encoding="utf-8")
            return 0
        result = self.run(arguments)
        print(self.markdown(result))
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return int(any(one["held"] is False for one in result["targets"]))


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _joined(before: Result, fresh: dict[str, Any], key: Sequence[str]) -> dict[str, Any]:
    """Return a fresh result with the entries of an earlier one that were not measured again, each dated."""

    def of(entry: Result) -> tuple[str, ...]:
        return tuple(str(entry.get(name)) for name in key)

    whole: dict[str, Any] = {**before, **fresh}
    for name, entries in before.items():
        told_apart = isinstance(entries, list) and all(isinstance(e, dict) and {*key} & {*e} for e in entries)
        if told_apart and isinstance(fresh.get(name), list):
            again = {of(entry) for entry in fresh[name]}
            kept = [{"date": before.get("date"), **entry} for entry in entries if of(entry) not in again]
            place = {
                identity: i for i, identity in enumerate(dict.fromkeys(map(of, [*entries, *fresh[name]])))
            }
            whole[name] = sorted([*kept, *fresh[name]], key=lambda entry: place[of(entry)])  # noqa: B023
    return whole
