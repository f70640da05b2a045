"""The page of the trace-estimation paper: its claims beside what was measured, tables, figures 1 to 4."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["claims", "draw", "judge", "markdown"]

Result = Mapping[str, Any]
Points = Sequence[Mapping[str, float]]
Claim = tuple[str, str, str, bool]  # the claim, the paper's figure, what was measured, whether it holds
_NAMES = {"frobenius_norm": "norm", "effective_rank": "effective rank"}
_PRODUCTS = {"frobenius_norm": 2, "effective_rank": 3, "alignment": 6}  # times n that the exact value takes


def _problem(result: Result, name: str) -> Mapping[str, Any] | None:
    return next((p for p in result["problems"] if p["name"] == name), None)


def _entry(problem: Mapping[str, Any], quantity: str, method: str, by: str) -> Mapping[str, Any]:
    """Return a curve, or one without points."""
    wanted = (quantity, method, by)
    found = (e for e in problem["curves"] if (e["quantity"], e["method"], e["by"]) == wanted)
    return next(found, {"points": [], "slope": None})


def _points(problem: Mapping[str, Any], quantity: str, method: str, by: str) -> Points:
    points: Points = _entry(problem, quantity, method, by)["points"]
    return points


def _first(points: Points, error: float) -> Mapping[str, float] | None:
    """Return the first point from which on every median error is small enough."""
    found = None
    for point in reversed(points):
        if point["error"] > error:
            break
        found = point
    return found


def _at(points: Points, m: int) -> Mapping[str, float] | None:
    return next((p for p in points if p["m"] == m), None)


# what ntkops has to reach


def judge(result: Result) -> list[dict[str, Any]]:
    """Return the targets with what was measured."""
    found: list[dict[str, Any]] = []

    def add(what: str, sense: str, bound: float, measured: float) -> None:
        holds = measured <= bound if sense == "<=" else measured >= bound
        found.append(
            {"what": what, "bound": bound, "sense": sense, "measured": measured, "holds": bool(holds)}
        )

    for name, quantity, method, passes, bound in (
        ("mlp", "trace", "sketch", 60, 1e-3), ("mlp", "frobenius_norm", "sketch", 60, 1e-3),
        ("mlp", "effective_rank", "sketch", 60, 1e-3), ("digits", "trace", "sketch", 320, 1e-3),
        ("digits", "alignment", "stratified", 64, 1e-3), ("digits", "alignment", "sketch", 64, 1e-3),
        ("mlp", "frobenius_norm", "stratified", 2, 2e-2), ("mlp", "effective_rank", "stratified", 2, 2e-2),
        ("digits", "frobenius_norm", "stratified", 2, 1e-2),
        ("digits", "effective_rank", "stratified", 2, 1e-2),
    ):  # fmt: skip
        problem = _problem(result, name)
        if problem is not None:
            points = _points(problem, quantity, method, "ntkops")
            errors = [point["error"] for point in points if point["passes"] <= passes]
            what = f"{_NAMES.get(quantity, quantity)}, {method}, {passes} passes or fewer"
            if errors:
                add(f"{problem['title']}: {what}", "<=", bound, min(errors))
    gru, mlp = _problem(result, "gru32"), _problem(result, "mlp")
    if gru is not None:
        sided = [_first(_points(gru, "trace", m, "ntkops"), 1e-2) for m in ("rhutch", "fhutch")]
        own = _first(_points(gru, "trace", "auto", "ntkops"), 1e-2)
        best = min((p["passes"] for p in sided if p is not None), default=None)
        if best is not None:
            what = f"{gru['title']}: passes of auto to 1e-2 (one-sided: {best:.0f})"
            add(what, "<=", best, own["passes"] if own is not None else float("inf"))
    for quantity in ("trace", "frobenius_norm", "effective_rank") if mlp is not None else ():
        own = _at(_points(mlp, quantity, "stratified", "ntkops"), 2)
        other = _points(mlp, quantity, "hutch++", "paper")
        if own is not None and other:
            name = _NAMES.get(quantity, quantity)
            what = f"{name}, time of the paper's Hutch++ over 2 stratified passes, same error"
            reached = _first(other, own["error"]) or other[-1]
            ratio = float(f"{reached['seconds'] / own['seconds']:.4g}")
            add(f"{mlp['title']}: {what}", ">=", 15, ratio)
    return found


# claims


def claims(result: Result) -> list[dict[str, str]]:
    """Return the paper's claims, what was measured, and the verdict."""
    made = (_speedups, _mlp_claims, _gru_claims, _classifier_claims, _rates, _identities)
    return [
        {"claim": claim, "paper": paper, "measured": text, "verdict": "holds" if holds else "fails"}
        for make in made
        for claim, paper, text, holds in make(result)
    ]


def _speedups(result: Result) -> Iterator[Claim]:
    for name, label, levels in (
        ("mlp", "Fig. 1A, MLP", ((1e-2, 80.0), (1e-5, 30.0))),
        ("gru", "Fig. 1B, GRU", ((1e-2, 10_000.0), (1e-5, 70.0))),
    ):
        problem = _problem(result, name)
        if problem is None:
            continue
        products = problem["n"] * problem["column_s"]
        for error, paper in levels:
            what = f"{label}: speedup at error {error:.0e}"
            found = [
                (point["seconds"], method)
                for method in ("hutch++", "rhutch", "fhutch")
                if (point := _first(_points(problem, "trace", method, "paper"), error)) is not None
            ]
            if found:
                seconds, method = min(found)
                speed = products / seconds
                yield what, f"{paper:,.0f}x", f"{speed:,.0f}x ({method})", speed >= paper / 2
            else:
                last = _points(problem, "trace", "hutch++", "paper")[-1]
                text = f"not reached: Hutch++ at m = {last['m']} has a median error of {last['error']:.1e}"
                yield what, f"{paper:,.0f}x", text, False
        exact = problem["exact_s"]["trace"]
        text = f"from layer structure {products / exact:,.0f}x faster: {exact:.3g} s"
        yield f"{label}: the exact trace takes n products", "1x", text, products <= 2 * exact


def _mlp_claims(result: Result) -> Iterator[Claim]:
    problem = _problem(result, "mlp")
    if problem is None:
        return
    point = _first(_points(problem, "trace", "hutch++", "paper"), 1e-6)
    text = "not reached"
    if point is not None:
        text = (
            f"{point['passes'] / 2:.0f} products; the effective rank of this kernel is "
            f"{problem['exact']['effective_rank']:.0f}, so that the sketch spans all of it"
        )
    claim = "Fig. 2: Hutch++ reaches 1e-6 with about 600 products"
    yield claim, "600", text, point is not None and point["passes"] / 2 <= 900
    many, few = (_at(_points(problem, "trace", method, "paper"), 60) for method in ("hutch++", "rhutch"))
    if few and many:
        text = (
            f"m = 60: RHutch {few['error']:.1e} in {few['seconds']:.2g} s, Hutch++ {many['error']:.1e} in "
            f"{many['seconds']:.2g} s"
        )
        holds = few["error"] <= many["error"] or few["seconds"] < 0.5 * many["seconds"]
        yield "Fig. 2: below 100 samples RHutch is the most accurate in the same time", "yes", text, holds


def _gru_claims(result: Result) -> Iterator[Claim]:
    for name, reading in (("gru", "as its code runs it"), ("gru_printed", "as the text says")):
        problem = _problem(result, name)
        if problem is None:
            continue
        one = _first(_points(problem, "trace", "fhutch", "paper"), 1e-2)
        text = f"m = {one['m']}, {one['seconds']:.2g} s" if one else "not reached"
        holds = one is not None and one["seconds"] <= 0.2
        yield f"Fig. 3 ({reading}): FHutch reaches 1e-2 in less than 0.1 s", "< 0.1 s", text, holds
        exact = problem["exact_s"]["trace"]
        text = (
            f"n products: {problem['n'] * problem['column_s']:,.0f} s (extrapolated); from layer structure "
            f"{exact:.2g} s"
        )
        yield f"Fig. 3 ({reading}): the exact trace takes 1558 s", "1558 s", text, exact >= 1558 / 2
    problem = _problem(result, "gru")
    if problem is not None:
        points = _points(problem, "trace", "hutch++", "paper")
        point, last = _first(points, 1e-4), points[-1]
        text = (
            f"{point['seconds']:.2g} s"
            if point
            else f"{last['error']:.1e} at m = {last['m']} after {last['seconds']:.2g} s; the first lucky "
            "crossing is not a median"
        )
        yield "Fig. 3: Hutch++ reaches 1e-4 in about 10 s", "10 s", text, point is not None


def _classifier_claims(result: Result) -> Iterator[Claim]:
    problem = _problem(result, "classifier")
    if problem is None:
        return
    shares = {"frobenius_norm": "7.5 %", "effective_rank": "25 %", "alignment": "7.5 %"}
    for quantity, count in _PRODUCTS.items():
        points = _points(problem, quantity, "hutch++", "paper")
        exact = count * problem["n"] * problem["column_s"]
        label, sixty, last = _NAMES.get(quantity, quantity), _at(points, 60), points[-1]
        if sixty is not None:
            claim = f"Fig. 4: {label} to 1e-2 with m = 60, in 1 % of the time of the exact value"
            text = f"{sixty['error']:.1e}, {100 * sixty['seconds'] / exact:.1f} %"
            holds = sixty["error"] <= 1.2e-2 and sixty["seconds"] <= 0.02 * exact
            yield claim, "1e-2, 1 %", text, holds
        text = (
            f"{last['error']:.1e} after {100 * last['seconds'] / exact:.1f} %; exact from layer structure in "
            f"{100 * problem['exact_s'][quantity] / exact:.1f} %"
        )
        yield (
            f"Fig. 4: {label} to 1e-4",
            f"in {shares[quantity]} of the exact time",
            text,
            last["error"] <= 1e-4,
        )


def _rates(result: Result) -> Iterator[Claim]:
    for name, method, claim, paper, low, high in (
        ("digits", "hutch++", "Section 2: the error of Hutch++ falls like 1/m or faster", "slope -1",
         -float("inf"), -0.8),
        ("gru32", "rhutch", "Section 3: one-sided errors fall like 1/sqrt(m)", "slope -1/2", -0.9, -0.2),
    ):  # fmt: skip
        problem = _problem(result, name)
        found = None if problem is None else _entry(problem, "trace", method, "paper")["slope"]
        if problem is not None and found is not None:
            yield claim, paper, f"slope {found:.2f} ({problem['title']})", low <= found <= high
    whole, mlp = result.get("hutch_at_n"), _problem(result, "mlp")
    if whole and mlp is not None:
        text = (
            f"{whole['ratio']:.2f}, with {whole['products']} products for m = n = {mlp['n']}: the code makes "
            "0.75 m"
        )
        claim = "Appendix: Hutch++ at m = n costs 0.8 to 1.2 of the exact trace"
        yield claim, "0.8-1.2", text, 0.8 <= whole["ratio"] <= 1.2


def _identities(result: Result) -> Iterator[Claim]:
    for problem in result["problems"]:
        if problem["exact"].get("identity"):
            left, right = problem["exact"]["identity"]
            claim = f"Section 3.3: effective rank = n cos²(K, I) ({problem['title']})"
            yield claim, "equal", f"{left:.8g} and {right:.8g}", abs(left - right) <= 1e-9 * left


# tables


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = [":--", *["--:"] * (len(head) - 1)]
    return ["| " + " | ".join(head) + " |", "|" + "|".join(rule) + "|",
            *("| " + " | ".join(row) + " |" for row in rows), ""]  # fmt: skip


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _head(result: Result) -> str:
    """Say where and when; networks that were measured later say so themselves."""
    place = result["environment"]
    later = [p for p in result["problems"] if p.get("measured", result["date"]) != result["date"]]
    text = (
        f"Measured on {result['date']}: {place['cpu']} ({place['platform']}), {place['threads']} "
        f"thread, Python {place['python']}, torch {place['torch']}, ntkops {place['ntkops']}, float32, "
        "exact values in float64."
    )
    return text + "".join(f" {p['title']}: measured on {p['measured']}, ntkops {p['ntkops']}." for p in later)


def markdown(result: Result) -> str:
    """Return the tables of a result in Markdown."""
    lines = [_head(result), ""]
    if result["claims"]:
        rows = [[r["claim"], r["paper"], r["measured"], r["verdict"]] for r in result["claims"]]
        lines += ["### Claim by claim", "", *_grid(("claim", "paper", "measured", "verdict"), rows)]
    if result["targets"]:
        signs = {"<=": "at most", ">=": "at least"}
        rows = [
            [t["what"], f"{signs[t['sense']]} {t['bound']:g}", f"{t['measured']:.3g}",
             "yes" if t["holds"] else "no"]
            for t in result["targets"]
        ]  # fmt: skip
        lines += ["### What ntkops has to reach", "", *_grid(("what", "bound", "measured", "holds"), rows)]
    for problem in result["problems"]:
        lines += _problem_lines(problem)
    return "\n".join(lines).rstrip()


def _problem_lines(problem: Mapping[str, Any]) -> list[str]:
    exact = ", ".join(
        f"{_NAMES.get(name, name)} {value:.6g} in {_time(problem['exact_s'][name])}"
        for name, value in problem["exact"].items()
        if name in problem["exact_s"]
    )
    accuracy = "" if problem["accuracy"] is None else f" Test accuracy {100 * problem['accuracy']:.1f} %."
    levels, rows = (1e-1, 1e-2, 1e-3, 1e-4), []
    for entry in problem["curves"]:
        found = [_first(entry["points"], level) for level in levels]
        cells = [f"{p['passes']:.0f} ({_time(p['seconds'])})" if p else "-" for p in found]
        name, slope = _NAMES.get(entry["quantity"], entry["quantity"]), entry["slope"]
        rows.append(
            [name, f"{entry['method']}, {entry['by']}", *cells, "-" if slope is None else f"{slope:.2f}"]
        )
    text = (
        f"n = {problem['n']:,}, P = {problem['parameters']:,}.{accuracy} Exact, from layer structure: "
        f"{exact}. One product as the paper's code makes it: {_time(problem['column_s'])}. Passes (and CPU "
        "time) from which on the median error stays below:"
    )
    head = ("quantity", "estimator", *(f"{level:.0e}" for level in levels), "slope")
    return [f"### {problem['title']}", "", text, "", *_grid(head, rows)]


# figures

# One colour and marker for a method, whoever's it is: the paper's are dashed, ours are solid.
_METHODS = ("hutch++", "rhutch", "fhutch", "sketch", "xtrace", "ntk-hutch++", "stratified", "auto", "reverse")


def _curves(
    ax: Any, problem: Mapping[str, Any], quantity: str, axis: str, marker: Callable[..., str]
) -> None:
    for entry in (e for e in problem["curves"] if e["quantity"] == quantity):
        position, points = _METHODS.index(entry["method"]), entry["points"]
        x, colour = [point[axis] for point in points], f"C{position}"
        ax.plot(
            x, [point["error"] for point in points], label=f"{entry['method']} ({entry['by']})", lw=1.5,
            color=colour, marker=marker(position), ms=4, ls="--" if entry["by"] == "paper" else "-",
        )  # fmt: skip
        low, high = [max(p["low"], 1e-9) for p in points], [p["high"] for p in points]
        ax.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    ax.set(xscale="log", yscale="log", ylabel="relative error (median, quartiles)")
    ax.grid(alpha=0.3)


def _exact_line(ax: Any, problem: Mapping[str, Any], quantity: str, products: float) -> None:
    ax.axvline(problem["exact_s"][quantity], color="black", lw=1.2, label="exact, layer structure")
    ax.axvline(products, color="black", lw=1.2, ls=":", label="exact, n products (extrapolated)")


def draw(result: Result, folder: Path) -> None:
    """Draw the figures whose networks are in the result."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from ntkops.plotting._axes import line_style, marker

    def saved(figure: Any, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"trace_figure{name}.png", dpi=130)
        plt.close(figure)

    def panels(count: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
        size = (width, height)
        figure, axes = plt.subplots(1, count, figsize=size, layout="constrained", squeeze=False, **options)
        return figure, axes[0]

    both = [p for p in (_problem(result, name) for name in ("mlp", "gru")) if p is not None]
    if both:
        figure, axes = panels(len(both), 5.5 * len(both), 4)
        for ax, problem in zip(axes, both, strict=True):
            products = problem["n"] * problem["column_s"]
            for position, by in enumerate(("paper", "ntkops")):
                points = [
                    (point["error"], products / point["seconds"])
                    for entry in problem["curves"]
                    if entry["quantity"] == "trace" and entry["by"] == by
                    for point in entry["points"]
                ]
                best = sorted((e, max(s for f, s in points if f <= e)) for e, _ in points)
                label = "the paper's estimators, best of three" if by == "paper" else "ntkops, best estimator"
                ax.step(*zip(*best, strict=True), where="post", label=label, **line_style(position))
            ax.axhline(products / problem["exact_s"]["trace"], color="black", lw=1.2, label="ntkops, exact")
            ax.axhline(1, color="grey", lw=0.8)
            ax.set(xscale="log", yscale="log", title=problem["title"], xlabel="median relative error")
            ax.set_ylabel("times faster than n products")
            ax.invert_xaxis()
            ax.grid(alpha=0.3)
            ax.legend(fontsize=8)
        saved(figure, "1")
    for name, number in (("mlp", "2"), ("gru", "3"), ("gru_printed", "3b")):
        problem = _problem(result, name)
        if problem is None:
            continue
        figure, (left, right) = panels(2, 13, 4.2, sharey=True)
        _curves(left, problem, "trace", "passes", marker)
        _curves(right, problem, "trace", "seconds", marker)
        _exact_line(right, problem, "trace", problem["n"] * problem["column_s"])
        left.set_xlabel("passes (vjp + jvp)")
        right.set(xlabel="CPU seconds", ylabel="")
        figure.legend(*right.get_legend_handles_labels(), fontsize=8, loc="outside right center")
        figure.suptitle(f"trace: {problem['title']}")
        saved(figure, number)
    for name, number in (("classifier", "4"), ("digits", "4_digits")):
        problem = _problem(result, name)
        shown = [q for q in ("frobenius_norm", "alignment", "effective_rank")
                 if problem is not None and q in problem["exact_s"]]  # fmt: skip
        if problem is None or not shown:
            continue
        figure, axes = panels(len(shown), 4.2 * len(shown) + 2, 4, sharey=True)
        for ax, quantity in zip(axes, shown, strict=True):
            _curves(ax, problem, quantity, "seconds", marker)
            products = _PRODUCTS[quantity] * problem["n"] * problem["column_s"]
            _exact_line(ax, problem, quantity, products)
            title = {"frobenius_norm": "Frobenius norm"}.get(quantity, _NAMES.get(quantity, quantity))
            ax.set(xlabel="CPU seconds", title=title)
            if ax is not axes[0]:
                ax.set_ylabel("")
        figure.legend(*axes[-1].get_legend_handles_labels(), fontsize=8, loc="outside right center")
        figure.suptitle(problem["title"])
        saved(figure, number)
