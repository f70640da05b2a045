"""What the making of operators took, as tables in Markdown, and whether it is what is claimed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from _tables import _grid, _number, _range, _threads

__all__ = ["judge", "markdown"]

LARGE = ("resnet18", "vit", "gpt", "gpt2")
PASSES = {"make": 2, "same_linearization": 0, "cross": 0, "differentiate": 1}
STEPS = {"make": 3.5, "differentiate": 3.0}
SHORT = {"make": 3.0, "same_module": 1.0, "same_linearization": 0.2}  # milliseconds, of the perceptron
SCORE = 2.5
SHARES = {10: 0.2, 2: 0.4, 1: 0.6}

_WAYS = {
    "make": "made",
    "same_module": "again, same module",
    "same_linearization": "again, same linearisation",
    "cross": "K.cross(x)",
    "differentiate": "first product by differentiation adds",
}


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Say of each target how much it may be, and how much it is."""
    return [
        {"what": what, "of": of, "most": _short(most), "found": found, "held": found <= most}
        for what, of, most, found in _targets(result)
    ]


def _targets(result: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    for entry in result["networks"]:
        name = entry["model"]
        for way, most in PASSES.items():
            yield f"forward passes, {_WAYS[way]}", name, most, entry["passes"][way]
        if name in LARGE:
            for way, most in STEPS.items():
                yield (
                    f"training steps of four samples, {_WAYS[way]}",
                    name,
                    most,
                    _median(entry["steps"][way]),
                )
            yield from _memory_targets(entry)
        if name == "mlp":
            for way, most in SHORT.items():
                yield f"milliseconds, {_WAYS[way]}", name, most, entry["time"][way]["cpu_ms"]["median"]
    yield "times torch.func in a search", "30 networks", SCORE, _median(result["score"]["ratio"])
    for entry in result["rows"]:
        most = SHARES[entry["outputs"]]
        if entry["model"] == "cnn" and entry["outputs"] == 1:
            most = max(most, _median(entry["pass_share"]))  # one pass more, on convolutions
        title = f"{entry['title']}, {entry['outputs']} outputs"
        yield "row check, of forward and backward passes", title, most, _median(entry["share"])


def _memory_targets(entry: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    """One copy of the selected parameters above the snapshot and the passes of four samples, then two."""
    found = entry["memory_mb"]
    if any(value is None for value in found.values()):
        return
    passes = found["step"]  # with gradients, which are one copy
    above = found["make"] - entry["selected_mb"]  # the snapshot
    yield f"MB above model and snapshot, {_WAYS['make']}", entry["model"], passes, above
    most = passes + entry["selected_mb"]
    yield f"MB, {_WAYS['differentiate']}", entry["model"], most, found["differentiate"]


def _median(found: Mapping[str, Any]) -> float:
    median: float = found["cpu"]["median"]
    return median


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables of a result in Markdown."""
    place, load, score = result["environment"], result["load"], result["score"]
    networks = result["networks"]
    lines = [
        f"Measured on {result['date']}: {place['cpu']} ({place['platform']}, {place['cpu_capability']}), "
        f"{_threads(place)}, Python {place['python']}, torch {place['torch']}, ntkops {place['ntkops']}, "
        f"{result['options']['dtype']}; load average {load['before']} before and {load['after']} after on "
        f"{load['cpus']} processors.",
        "",
        "Forward passes:",
        "",
        *_grid(("Network", *_WAYS.values()), [_passes(entry) for entry in networks], left=1),
        "",
        "CPU milliseconds (medians), and in training steps of four samples (smallest and largest):",
        "",
        *_grid(
            (
                "Network",
                "N",
                "P",
                "selected",
                "step",
                "made",
                "same module",
                "same linearisation",
                "made, in steps",
                "differentiation adds, in steps",
            ),
            [_times(entry) for entry in networks],
            left=1,
        ),
        "",
        "Peak memory in MB above what was resident before:",
        "",
        *_grid(
            (
                "Network",
                "selected parameters",
                "step of four",
                "made, with the snapshot",
                "first product by differentiation",
            ),
            [_memory(entry) for entry in networks if entry["memory_mb"]["make"] is not None],
            left=1,
        ),
        "",
        f"A search: condition numbers of the traced kernels of {score['networks']} random convolutional "
        f"networks on {score['samples']} images take {_ms(score['time'], 'ntkops')} ms, by torch.func "
        f"{_ms(score['time'], 'func')} ms: {_range(score['ratio']['cpu'])} times as much.",
        "",
        "The row check, as a share of a forward pass and the backward passes for O outputs:",
        "",
        *_grid(
            (
                "Network",
                "N",
                "O",
                "passes, ms",
                "kernel, new samples",
                "known samples",
                "check",
                "one pass",
            ),
            [_row(entry) for entry in result["rows"]],
            left=1,
        ),
    ]
    if result["targets"]:
        lines += ["", "What it may take:", "", *_verdicts(result["targets"])]
    return "\n".join(lines)


def _passes(entry: Mapping[str, Any]) -> Sequence[str]:
    return entry["title"], *(str(entry["passes"][way]) for way in _WAYS)


def _times(entry: Mapping[str, Any]) -> Sequence[str]:
    ways = ("step", "make", "same_module", "same_linearization")
    times = [_ms(entry["time"], way) for way in ways]
    steps = [_range(entry["steps"][way]["cpu"]) for way in STEPS]
    sizes = [f"{entry[key]:,}" for key in ("parameters", "selected")]
    return entry["title"], str(entry["samples"]), *sizes, *times, *steps


def _ms(times: Mapping[str, Any], name: str) -> str:
    return _number(times[name]["cpu_ms"]["median"])


def _memory(entry: Mapping[str, Any]) -> Sequence[str]:
    found = entry["memory_mb"]
    values = [entry["selected_mb"], *(found[what] for what in ("step", "make", "differentiate"))]
    return entry["title"], *(f"{value:.0f}" for value in values)


def _row(entry: Mapping[str, Any]) -> Sequence[str]:
    times = [_ms(entry["time"], way) for way in ("passes", "new", "known")]
    shares = [f"{100 * _median(entry[key]):.0f} %" for key in ("share", "pass_share")]
    return entry["title"], str(entry["samples"]), str(entry["outputs"]), *times, *shares


def _verdicts(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say of each kind of target where it is missed."""
    lines = []
    for what in dict.fromkeys(target["what"] for target in targets):
        same = [target for target in targets if target["what"] == what]
        missed = [f"{t['of']} ({t['found']:.3g}, at most {t['most']:.3g})" for t in same if not t["held"]]
        bars = sorted({target["most"] for target in same})
        bar = f"at most {bars[0]:.3g}: " if len(bars) == 1 else ""
        lines.append(f"- {what}: {bar}{'missed on ' + ', '.join(missed) if missed else 'held everywhere'}.")
    return lines
