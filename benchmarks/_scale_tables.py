"""What scaling took, as tables for the page, and which targets are met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from _scale_stream import LIVE_BLOCKS, SKETCH_BLOCKS, SKETCH_COLUMNS, state_block_mb

__all__ = ["TARGETS", "judge", "markdown"]

TARGETS = {"memory": 0.10, "speedup": 1.6, "payload": 1.1, "seconds": 60.0, "difference": 1e-5}
Entries = Sequence[Mapping[str, Any]]


def _grows(small: float, large: float) -> float:
    return abs(large - small) / small


def apart_from_blocks(entry: Mapping[str, Any], blocks: int = SKETCH_BLOCKS) -> float:
    """Return the peak of a sketch without its blocks over the states, in MB."""
    return float(entry["peak_mb"]) - blocks * state_block_mb(entry["samples"])


def growth(result: Mapping[str, Any]) -> dict[str, float | None]:
    """Return by how much peaks differ between the two numbers of samples that are compared."""
    small, large = result["options"]["compared"]
    found: dict[str, float | None] = {}
    for what in ("trace, exact", "trace, stratified", "norm, sketch"):
        pair = {run["samples"]: run for run in result["streams"] if run["what"] == what}
        known = small in pair and large in pair and pair[large]["peak_mb"] is not None
        if not known:
            found[what] = None
        elif what == "norm, sketch":
            for blocks, name in ((SKETCH_BLOCKS, what), (LIVE_BLOCKS, f"{what}, live blocks")):
                found[name] = _grows(*(apart_from_blocks(pair[count], blocks) for count in (small, large)))
        else:
            found[what] = _grows(pair[small]["peak_mb"], pair[large]["peak_mb"])
    return {what: None if value is None else float(f"{value:.3g}") for what, value in found.items()}


def judge(result: Mapping[str, Any]) -> dict[str, bool]:
    """Return which targets are met."""
    grown, limit = growth(result), TARGETS["memory"]
    two = [entry for entry in result["ranks"] if entry["ranks"] == 2]
    several = [entry for entry in result["ranks"] if entry["ranks"] > 1]
    flat = {what: value is not None and value < limit for what, value in grown.items()}
    return {
        "memory of the exact trace flat in N": flat["trace, exact"],
        "memory of the sketch flat in N, apart from its blocks": flat["norm, sketch"],
        "products: 2 ranks on 2 cores against 1 on 1": all(e["speedup"] >= TARGETS["speedup"] for e in two),
        "products: the same numbers": all(e["difference"] <= TARGETS["difference"] for e in several),
        "products: bytes given to sums, against P k numbers": all(
            e["all_bytes"] <= TARGETS["payload"] * e["asked"] for e in several
        ),
        "killed rank: the others raise in time": all(
            k["raised"] == ["RankFailedError"] and k["seconds"] <= TARGETS["seconds"] for k in result["kill"]
        ),
        "killed rank: the run that goes on has the same bits": all(k["same_bits"] for k in result["kill"]),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables of a result for docs/scale.md."""
    place = result["environment"]
    lines = [
        f"Measured on {result['date']}: {place['cpu']} ({place['platform']}, {place['cpu_capability']}), "
        f"{result['options']['cores']} cores, one thread a process, each process on one core, Python "
        f"{place['python']}, torch {place['torch']}, ntkops {place['ntkops']}, float32. No GPU: not run.",
        *([result["options"]["note"]] if result["options"].get("note") else []),
        "",
        *_streams(result),
        "",
        *_ranks(result["ranks"]),
        "",
        *_kill(result["kill"]),
        "",
        "| what was asked | held |",
        "|:--|:--|",
        *(f"| {what} | {'yes' if met else 'no'} |" for what, met in result["met"].items()),
        "",
        *_validation(result),
        "",
        *(line for sheet in result["sheets"] for line in _sheet(sheet)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _streams(result: Mapping[str, Any]) -> list[str]:
    lines = [
        "### Streamed images",
        "",
        "CNN with 6,282 parameters and 10 outputs on N images 3 x 32 x 32, one process on one core. Medians "
        "over fresh processes; opening is making the operator, which reads everything once and checks it. "
        "Times are process CPU time; the JSON has the clock's, too.",
        "",
        "| what | N | runs | opening, s | CPU s | us a sample | peak, MB | of these before, MB |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for run in result["streams"]:
        each = 1e6 * run["cpu_s"] / run["samples"]
        cells = [
            run["what"],
            f"{run['samples']:,}",
            str(len(run["all_cpu_s"])),
            _number(run["opening_s"]),
            _number(run["cpu_s"]),
            f"{each:,.0f}",
            _megabytes(run["peak_mb"]),
            _megabytes(run["start_mb"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    small, large = result["options"]["compared"]
    grown = {what: "-" if v is None else f"{100 * v:.1f} %" for what, v in result["growth"].items()}
    block = state_block_mb(large)
    lines += [
        "",
        f"Peaks at N = {large:,} differ from those at N = {small:,} by {grown['trace, exact']} (exact "
        f"trace), {grown['trace, stratified']} (stratified trace), and {grown['norm, sketch']} (sketch with "
        f"m = {SKETCH_COLUMNS}, without its {SKETCH_BLOCKS} blocks N·O x m in float32, of {block:.0f} MB "
        f"each at the larger N). {LIVE_BLOCKS} of these blocks hold something: probes, images, and in an "
        "inner product two float64 copies of twice the size; two are freed pieces that the allocator "
        f"keeps. Without the {LIVE_BLOCKS} alone the difference is {grown.get('norm, sketch, live blocks')}.",
    ]
    return lines


def _ranks(entries: Entries) -> list[str]:
    lines = [
        "### Products over ranks",
        "",
        "K V for k columns by several ranks (gloo), each on a core of its own, or sharing one where there "
        "are more ranks than cores (marked *). Seconds are those of the slowest rank; speed-up is against 1 "
        "rank on 1 core, median and range; difference is the largest relative one of vᵀ K v; bytes are all "
        "that a rank gives to `all_reduce` in a product, flags included, against P · k · 4.",
        "",
        "| network | N | P | k | ranks | s | speed-up | sum over ranks, s | MB given | against P k "
        "| difference | peak a rank, MB |",
        "|:--|--:|--:|--:|:--|--:|:--|--:|--:|--:|--:|--:|",
    ]
    for entry in entries:
        spread = f"{entry['speedup']:.2f} ({min(entry['speedups']):.2f} - {max(entry['speedups']):.2f})"
        shared = "*" if entry["ranks"] > entry["cores"] else ""
        cells = [
            entry["network"].upper(),
            f"{entry['samples']:,}",
            f"{entry['parameters']:,}",
            str(entry["k"]),
            f"{entry['ranks']}{shared}",
            _number(entry["s"]),
            "1" if entry["ranks"] == 1 else spread,
            "-" if entry["ranks"] == 1 else f"{entry['all_reduce_s']:.2g}",
            f"{entry['all_bytes'] / 1e6:.2f}",
            f"{entry['all_bytes'] / entry['asked']:.4f}",
            "-" if entry["ranks"] == 1 else f"{entry['difference']:.0e}",
            _megabytes(entry["peak_mb"] or None),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _kill(entries: Entries) -> list[str]:
    first = entries[0]
    seconds = ", ".join(f"{entry['seconds']:.2g}" for entry in entries)
    same = "the same bits as" if all(entry["same_bits"] for entry in entries) else "OTHER bits than"
    return [
        "### A rank that dies",
        "",
        f"One of {first['ranks']} ranks is killed (SIGKILL) after step {first['killed_after']} of conjugate "
        f"gradients on {first['samples'] * 10:,} rows, {len(entries)} times. The others raised "
        f"`{'`, `'.join(first['raised'])}` after {seconds} s. Started again, the solve went on from its file "
        f"to {same} a solve that was not interrupted.",
    ]


def _validation(result: Mapping[str, Any]) -> list[str]:
    machine = result["machine"]
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s ({name.upper()})" for name, rate in machine["rate"].items())
    both = ", ".join(f"{ratio:.2f} ({name.upper()})" for name, ratio in machine["two_cores"].items())
    draws = ", ".join(f"{1e9 * s:.1f} ns ({kind})" for kind, s in machine["drawing"].items())
    lines = [
        "### The cost model held to these numbers",
        "",
        f"Measured on one core: {rates} in plain backward passes over a batch; two "
        f"processes that do this on both cores, and exchange nothing, reach {both} times that; {draws} for a "
        "random number, "
        f"{machine['wire'] / 1e9:.2g} GB/s of a sum over 2 ranks. From these and the operations that torch "
        "counts the model predicts:",
        "",
        "| what | N | ranks | predicted, s | measured, s | measured / predicted |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for entry in result["validation"]:
        cells = [entry["what"], f"{entry['samples']:,}", str(entry["ranks"])]
        cells += [_number(entry["predicted_s"]), _number(entry["measured_s"]), f"{entry['ratio']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _sheet(sheet: Mapping[str, Any]) -> list[str]:
    work, machine = sheet["workload"], sheet["machine"]
    counts = [entry["ranks"] for entry in sheet["rows"][0]["on"]]
    heads = " | ".join(f"{count} GPU{'s' if count > 1 else ''}" for count in counts)
    lines = [
        f"### Predicted: {work['title']}",
        "",
        f"N = {work['samples']:,}, O = {work['outputs']:,}, P = {work['parameters']:,}; a sample takes "
        f"{work['forward'] / 1e9:,.1f} GFLOP forward, {work['pull'] / 1e9:,.1f} for a column of Jᵀv and "
        f"{work['push'] / 1e9:,.1f} for one of J p beyond that, and keeps "
        f"{work['kept_bytes'] / 1e6:,.0f} MB; {work['batch']} samples and {work['chunk']} columns a pass. "
        f"{machine['title']}: {machine['rate'] / 1e12:,.0f} TFLOP/s reached "
        f"({100 * machine['fraction']:.0f} % of the peak), ring of {machine['wire']['8'] / 1e9:.0f} GB/s "
        f"among 8 and {machine['wire']['64'] / 1e9:.0f} GB/s among 64.",
        "",
        f"| wanted | method | {heads} | GB a GPU | drawing probes | sent a rank |",
        "|:--|:--|" + "--:|" * (len(counts) + 3),
    ]
    best = _chosen(sheet["rows"])
    for row in sheet["rows"]:
        times = []
        for entry in row["on"]:
            text = _human(entry["seconds"])
            if not entry["fits"]:
                text = f"no: {entry['largest']}"
            elif not entry["feasible"]:
                text = f"no: {text}"
            elif (row["quantity"], entry["ranks"], row["method"]) in best:
                text = f"**{text}**"
            times.append(text)
        memory = " / ".join(_gigabytes(entry["device_gb"]) for entry in row["on"])
        last = row["on"][-1]
        cells = [row["quantity"], row["method"], *times, memory, _human(last["drawing_s"])]
        lines.append(f"| {' | '.join(cells)} | {_sent(last['sent_gb'])} |")
    return [*lines, ""]


def _chosen(rows: Entries) -> set[tuple[str, int, str]]:
    """Return the cheapest feasible methods: those of one output only where there is no other."""
    best: dict[tuple[str, int], tuple[bool, float, str]] = {}
    for row in rows:
        for entry in row["on"]:
            key, found = (row["quantity"], entry["ranks"]), (row["single"], entry["seconds"], row["method"])
            if entry["feasible"] and (key not in best or found < best[key]):
                best[key] = found
    return {(*key, method) for key, (_, _, method) in best.items()}


def _human(seconds: float) -> str:
    if seconds < 0.5:
        return "-"
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h"), (3.2e7, 86_400, "days")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    years = seconds / 3.156e7
    if years < 10:
        return f"{years:.1f} years"
    return f"{years:,.0f} years" if years < 1e5 else f"{years:.0e} years"


def _gigabytes(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _sent(value: float) -> str:
    return "-" if value < 1e-3 else f"{value:,.2g} GB" if value < 100 else f"{value:,.0f} GB"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
