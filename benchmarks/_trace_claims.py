"""The claims of the trace-estimation paper beside what was measured, and what ntkops has to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["claims", "judge", "markdown"]

Result = Mapping[str, Any]
Points = Sequence[Mapping[str, float]]
_NAMES = {"frobenius_norm": "norm", "effective_rank": "effective rank"}


def _problem(result: Result, name: str) -> Mapping[str, Any] | None:
    return next((p for p in result["problems"] if p["name"] == name), None)


def _points(problem: Mapping[str, Any], quantity: str, method: str, by: str) -> Points:
    for entry in problem["curves"]:
        if (entry["quantity"], entry["method"], entry["by"]) == (quantity, method, by):
            return entry["points"]
    return []


def _slope(problem: Mapping[str, Any], quantity: str, method: str, by: str) -> float | None:
    for entry in problem["curves"]:
        if (entry["quantity"], entry["method"], entry["by"]) == (quantity, method, by):
            return entry["slope"]
    return None


def _first(points: Points, error: float) -> Mapping[str, float] | None:
    """Return the first point from which on every median error is small enough."""
    found = None
    for point in reversed(points):
        if point["error"] > error:
            break
        found = point
    return found


def _fastest(problem: Mapping[str, Any], error: float) -> tuple[str, float] | None:
    """Return which of the paper's estimators reaches an error soonest, and its seconds."""
    found = []
    for method in ("hutch++", "rhutch", "fhutch"):
        point = _first(_points(problem, "trace", method, "paper"), error)
        if point is not None:
            found.append((method, point["seconds"]))
    return min(found, key=lambda pair: pair[1]) if found else None


# what ntkops has to reach


def _best_within(points: Points, passes: float) -> float | None:
    errors = [point["error"] for point in points if point["passes"] <= passes]
    return min(errors) if errors else None


def judge(result: Result) -> list[dict[str, Any]]:
    """Return the targets with what was measured.

    Args:
        result: A result with its problems.

    Returns:
        What is claimed, the bound, the figure and whether it holds.
    """
    found: list[dict[str, Any]] = []

    def at_most(what: str, bound: float, measured: float | None) -> None:
        if measured is not None:
            found.append({"what": what, "bound": bound, "sense": "<=", "measured": measured,
                          "holds": measured <= bound})  # fmt: skip

    wanted = [
        ("mlp", "trace", "sketch", 60, 1e-3),
        ("mlp", "frobenius_norm", "sketch", 60, 1e-3),
        ("mlp", "effective_rank", "sketch", 60, 1e-3),
        ("digits", "trace", "sketch", 320, 1e-3),
        ("digits", "alignment", "stratified", 64, 1e-3),
        ("digits", "alignment", "sketch", 64, 1e-3),
        ("mlp", "frobenius_norm", "stratified", 2, 2e-2),
        ("mlp", "effective_rank", "stratified", 2, 2e-2),
        ("digits", "frobenius_norm", "stratified", 2, 1e-2),
        ("digits", "effective_rank", "stratified", 2, 1e-2),
    ]
    for name, quantity, method, passes, bound in wanted:
        problem = _problem(result, name)
        if problem is not None:
            points = _points(problem, quantity, method, "ntkops")
            what = f"{_NAMES.get(quantity, quantity)}, {method}, {passes} passes or fewer"
            at_most(f"{problem['title']}: {what}", bound, _best_within(points, passes))
    gru = _problem(result, "gru32")
    if gru is not None:
        sided = [_first(_points(gru, "trace", m, "ntkops"), 1e-2) for m in ("rhutch", "fhutch")]
        own = _first(_points(gru, "trace", "auto", "ntkops"), 1e-2)
        best = min((p["passes"] for p in sided if p is not None), default=None)
        if best is not None:
            at_most(
                f"{gru['title']}: passes of auto to 1e-2 (one-sided: {best:.0f})",
                best,
                own["passes"] if own is not None else float("inf"),
            )
    mlp = _problem(result, "mlp")
    for quantity in ("trace", "frobenius_norm", "effective_rank") if mlp is not None else ():
        ratio = _time_ratio(mlp, quantity)
        if ratio is not None:
            what = (
                f"{mlp['title']}: {_NAMES.get(quantity, quantity)}, time of the paper's Hutch++ over 2 "
                "stratified passes, same error"
            )
            found.append({"what": what, "bound": 15, "sense": ">=", "measured": ratio, "holds": ratio >= 15})
    return found


def _time_ratio(problem: Mapping[str, Any], quantity: str) -> float | None:
    """Return how much longer the paper's Hutch++ takes for the error of two stratified passes."""
    own = next((p for p in _points(problem, quantity, "stratified", "ntkops") if p["m"] == 2), None)
    other = _points(problem, quantity, "hutch++", "paper")
    if own is None or not other:
        return None
    reached = _first(other, own["error"]) or other[-1]
    return float(f"{reached['seconds'] / own['seconds']:.4g}")


# claims


def claims(result: Result) -> list[dict[str, str]]:
    """Return the paper's claims, what was measured, and the verdict.

    Args:
        result: A result with its problems.

    Returns:
        Rows of claim, paper, measured, verdict.
    """
    rows: list[dict[str, str]] = []
    for make in (_speedups, _mlp_claims, _gru_claims, _classifier_claims, _rates, _identities):
        rows += make(result)
    return rows


def _row(claim: str, paper: str, measured: str, holds: bool) -> dict[str, str]:
    return {"claim": claim, "paper": paper, "measured": measured, "verdict": "holds" if holds else "fails"}


def _speedups(result: Result) -> list[dict[str, str]]:
    rows = []
    for name, label, levels in (
        ("mlp", "Fig. 1A, MLP", ((1e-2, 80.0), (1e-5, 30.0))),
        ("gru", "Fig. 1B, GRU", ((1e-2, 10_000.0), (1e-5, 70.0))),
    ):
        problem = _problem(result, name)
        if problem is None:
            continue
        products = problem["n"] * problem["column_s"]
        for error, paper in levels:
            fastest = _fastest(problem, error)
            if fastest is None:
                last = _points(problem, "trace", "hutch++", "paper")[-1]
                text = f"not reached: Hutch++ at m = {last['m']} has a median error of {last['error']:.1e}"
                rows.append(_row(f"{label}: speedup at error {error:.0e}", f"{paper:,.0f}x", text, False))
                continue
            speed = products / fastest[1]
            rows.append(
                _row(
                    f"{label}: speedup at error {error:.0e}",
                    f"{paper:,.0f}x",
                    f"{speed:,.0f}x ({fastest[0]})",
                    speed >= paper / 2,
                )
            )
        exact = problem["exact_s"]["trace"]
        rows.append(
            _row(
                f"{label}: the exact trace takes n products",
                "1x",
                f"from layer structure {products / exact:,.0f}x faster: {exact:.3g} s",
                products <= 2 * exact,
            )
        )
    return rows


def _mlp_claims(result: Result) -> list[dict[str, str]]:
    problem = _problem(result, "mlp")
    if problem is None:
        return []
    point = _first(_points(problem, "trace", "hutch++", "paper"), 1e-6)
    rank = problem["exact"]["effective_rank"]
    rows = [
        _row(
            "Fig. 2: Hutch++ reaches 1e-6 with about 600 products",
            "600",
            f"{point['passes'] / 2:.0f} products; the effective rank of this kernel is {rank:.0f}, so that "
            "the sketch spans all of it"
            if point
            else "not reached",
            point is not None and point["passes"] / 2 <= 900,
        )  # fmt: skip
    ]
    at = {
        method: next((p for p in _points(problem, "trace", method, "paper") if p["m"] == 60), None)
        for method in ("hutch++", "rhutch")
    }
    if all(at.values()):
        few, many = at["rhutch"], at["hutch++"]
        rows.append(
            _row(
                "Fig. 2: below 100 samples RHutch is the most accurate in the same time",
                "yes",
                f"m = 60: RHutch {few['error']:.1e} in {few['seconds']:.2g} s, Hutch++ {many['error']:.1e} "
                f"in {many['seconds']:.2g} s",
                few["error"] <= many["error"] or few["seconds"] < 0.5 * many["seconds"],
            )
        )
    return rows


def _gru_claims(result: Result) -> list[dict[str, str]]:
    rows = []
    for name, reading in (("gru", "as its code runs it"), ("gru_printed", "as the text says")):
        problem = _problem(result, name)
        if problem is None:
            continue
        one = _first(_points(problem, "trace", "fhutch", "paper"), 1e-2)
        rows.append(
            _row(
                f"Fig. 3 ({reading}): FHutch reaches 1e-2 in less than 0.1 s",
                "< 0.1 s",
                f"m = {one['m']}, {one['seconds']:.2g} s" if one else "not reached",
                one is not None and one["seconds"] <= 0.2,
            )
        )
        rows.append(
            _row(
                f"Fig. 3 ({reading}): the exact trace takes 1558 s",
                "1558 s",
                f"n products: {problem['n'] * problem['column_s']:,.0f} s (extrapolated); from layer "
                f"structure {problem['exact_s']['trace']:.2g} s",
                problem["exact_s"]["trace"] >= 1558 / 2,
            )
        )
    problem = _problem(result, "gru")
    if problem is not None:
        point = _first(_points(problem, "trace", "hutch++", "paper"), 1e-4)
        last = _points(problem, "trace", "hutch++", "paper")[-1]
        rows.append(
            _row(
                "Fig. 3: Hutch++ reaches 1e-4 in about 10 s",
                "10 s",
                f"{point['seconds']:.2g} s"
                if point
                else f"{last['error']:.1e} at m = {last['m']} after {last['seconds']:.2g} s; the first lucky "
                "crossing is not a median",
                point is not None,
            )  # fmt: skip
        )
    return rows


def _classifier_claims(result: Result) -> list[dict[str, str]]:
    problem = _problem(result, "classifier")
    if problem is None:
        return []
    rows = []
    products = {"frobenius_norm": 2, "effective_rank": 3, "alignment": 6}
    for quantity, count in products.items():
        points = _points(problem, quantity, "hutch++", "paper")
        exact = count * problem["n"] * problem["column_s"]
        sixty = next((p for p in points if p["m"] == 60), None)
        label = _NAMES.get(quantity, quantity)
        if sixty is not None:
            rows.append(
                _row(
                    f"Fig. 4: {label} to 1e-2 with m = 60, in 1 % of the time of the exact value",
                    "1e-2, 1 %",
                    f"{sixty['error']:.1e}, {100 * sixty['seconds'] / exact:.1f} %",
                    sixty["error"] <= 1.2e-2 and sixty["seconds"] <= 0.02 * exact,
                )
            )
        last = points[-1]
        share = {"frobenius_norm": "7.5 %", "alignment": "7.5 %", "effective_rank": "25 %"}[quantity]
        rows.append(
            _row(
                f"Fig. 4: {label} to 1e-4",
                f"in {share} of the exact time",
                f"{last['error']:.1e} after {100 * last['seconds'] / exact:.1f} %; exact from layer "
                f"structure in {100 * problem['exact_s'][quantity] / exact:.1f} %",
                last["error"] <= 1e-4,
            )
        )
    return rows


def _rates(result: Result) -> list[dict[str, str]]:
    rows = []
    digits, gru = _problem(result, "digits"), _problem(result, "gru32")
    if digits is not None:
        found = _slope(digits, "trace", "hutch++", "paper")
        if found is not None:
            rows.append(
                _row(
                    "Section 2: the error of Hutch++ falls like 1/m or faster",
                    "slope -1",
                    f"slope {found:.2f} ({digits['title']})",
                    found <= -0.8,
                )
            )
    if gru is not None:
        found = _slope(gru, "trace", "rhutch", "paper")
        if found is not None:
            rows.append(
                _row(
                    "Section 3: one-sided errors fall like 1/sqrt(m)",
                    "slope -1/2",
                    f"slope {found:.2f} ({gru['title']})",
                    -0.9 <= found <= -0.2,
                )
            )
    whole = result.get("hutch_at_n")
    if whole:
        rows.append(
            _row(
                "Appendix: Hutch++ at m = n costs 0.8 to 1.2 of the exact trace",
                "0.8-1.2",
                f"{whole['ratio']:.2f}, with {whole['products']} products for m = n = "
                f"{_problem(result, 'mlp')['n']}: the code makes 0.75 m",
                0.8 <= whole["ratio"] <= 1.2,
            )
        )
    return rows


def _identities(result: Result) -> list[dict[str, str]]:
    rows = []
    for problem in result["problems"]:
        identity = problem["exact"].get("identity")
        if identity:
            left, right = identity
            rows.append(
                _row(
                    f"Section 3.3: effective rank = n cos²(K, I) ({problem['title']})",
                    "equal",
                    f"{left:.8g} and {right:.8g}",
                    abs(left - right) <= 1e-9 * left,
                )
            )
    return rows


# tables


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "|".join([":--", *["--:"] * (len(head) - 1)]) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _curve_rows(problem: Mapping[str, Any], levels: Sequence[float]) -> list[list[str]]:
    rows = []
    for entry in problem["curves"]:
        cells = []
        for level in levels:
            point = _first(entry["points"], level)
            cells.append(f"{point['passes']:.0f} ({_time(point['seconds'])})" if point else "-")
        who = "paper" if entry["by"] == "paper" else "ntkops"
        slope = "-" if entry["slope"] is None else f"{entry['slope']:.2f}"
        rows.append(
            [_NAMES.get(entry["quantity"], entry["quantity"]), f"{entry['method']}, {who}", *cells, slope]
        )
    return rows


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _head(result: Result) -> str:
    place = result["environment"]
    return (
        f"Measured on {result['date']}: {place['cpu']} ({place['platform']}), {place['threads']} "
        f"thread, Python {place['python']}, torch {place['torch']}, ntkops {place['ntkops']}, float32, "
        "exact values in "
        f"float64, classifier on {result['options']['data']}."
    )


def markdown(result: Result) -> str:
    """Return the tables of a result in Markdown.

    Args:
        result: A result, new or read from JSON.

    Returns:
        Claims, targets, and the passes to each error.
    """
    lines = [_head(result), ""]
    if result["claims"]:
        rows = [[r["claim"], r["paper"], r["measured"], r["verdict"]] for r in result["claims"]]
        lines += ["### Claim by claim", "", *_grid(("claim", "paper", "measured", "verdict"), rows), ""]
    if result["targets"]:
        rows = [
            [
                t["what"],
                f"{_sign(t['sense'])} {t['bound']:g}",
                f"{t['measured']:.3g}",
                "yes" if t["holds"] else "no",
            ]
            for t in result["targets"]
        ]
        lines += [
            "### What ntkops has to reach",
            "",
            *_grid(("what", "bound", "measured", "holds"), rows),
            "",
        ]
    levels = (1e-1, 1e-2, 1e-3, 1e-4)
    for problem in result["problems"]:
        lines += _problem_lines(problem, levels)
    return "\n".join(lines).rstrip()


def _sign(sense: str) -> str:
    return {"<=": "at most", ">=": "at least"}[sense]


def _problem_lines(problem: Mapping[str, Any], levels: Sequence[float]) -> list[str]:
    exact = ", ".join(
        f"{_NAMES.get(name, name)} {value:.6g} in {_time(problem['exact_s'][name])}"
        for name, value in problem["exact"].items()
        if name in problem["exact_s"]
    )
    column: Callable[[float], str] = _time
    accuracy = "" if problem["accuracy"] is None else f" Test accuracy {100 * problem['accuracy']:.1f} %."
    return [
        f"### {problem['title']}",
        "",
        f"n = {problem['n']:,}, P = {problem['parameters']:,}.{accuracy} Exact, from layer structure: "
        f"{exact}. One product as the paper's code makes it: {column(problem['column_s'])}. "
        "Passes (and CPU time) "
        "from which on the median error stays below:",
        "",
        *_grid(
            ("quantity", "estimator", *(f"{level:.0e}" for level in levels), "slope"),
            _curve_rows(problem, levels),
        ),
        "",
    ]
