"""Tables about training: accuracy by rounds and model, baselines, strategies, curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from report.results import Result, markdown


def _percent(line: dict[str, Any]) -> str:
    """A share with its interval."""
    return f"{100 * line['accuracy']:.1f} ({100 * line['low']:.1f}–{100 * line['high']:.1f})"


def _points(found: dict[str, Any]) -> str:
    """A paired difference in points, with its interval."""
    values = (100 * found[name] for name in ("difference", "low", "high"))
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*values)


def _setting(result: Result) -> str:
    data = result.data
    return (
        f"{data['num']:,} graded clips from seed {data['seed']}, split {data['split']}, "
        f"{data['dtype']}; accuracy in %, 95 % intervals (Wilson; of differences, paired)."
    )


_LOOK = ["accuracy", "span IoU", "box IoU", "visual tokens", "ms a question"]


def _look(line: dict[str, Any]) -> list[str]:
    return [
        _percent(line),
        f"{line['span_iou']:.2f}",
        f"{line['box_iou']:.2f}",
        f"{line['visual_tokens']:,.0f}",
        f"{line['ms']:,.0f}",
    ]


def _models(result: Result) -> str:
    """Every model by rounds, what each added round brought, and accuracy by level."""
    looks: list[list[str]] = []
    steps: list[list[str]] = []
    levels: list[list[str]] = []
    for name, found in result.data["models"].items():
        looks += [[f"{name}, {line['rounds']}", *_look(line)] for line in found["rounds"]]
        steps += [
            [name, f"{step['fewer']} to {step['more']}", _points(step)] for step in found["steps"]
        ]
        for level, own in found["levels"].items():
            shares = [f"{100 * share:.1f}" for share in own["accuracy"]]
            levels.append([f"{name}, {level} ({own['num']:,})", *shares])
    counts = [str(line["rounds"]) for line in found["rounds"]]
    return "\n".join(
        [
            markdown(["model, rounds", *_LOOK], looks),
            markdown(["model", "rounds", "gain in points"], steps),
            markdown(["accuracy after rounds", *counts], levels),
            _setting(result) + "\n",
        ]
    )


def _side(name: str, rounds: int) -> str:
    return f"{name}, {rounds} round{'s' * (rounds != 1)}"


def _compared(result: Result) -> str:
    """Models against those before them, and rounds against as many frames in one look."""
    data = result.data
    wide = [
        [f"one round, {k} times the frames", *_look(w["rounds"][0])]
        for k, w in data["wide"].items()
    ]
    rows = [
        [
            f"{_side(c['more'], c['rounds_more'])} against {_side(c['less'], c['rounds_less'])}",
            _points(c),
        ]
        for c in data["comparisons"]
    ]
    tables = [markdown(["baseline", *_LOOK], wide)] if wide else []
    tables.append(markdown(["compared", "gain in points"], rows))
    return "\n".join([*tables, _setting(result) + "\n"])


def _strategies(result: Result) -> str:
    rows = [
        [f"`{name}`, {line['rounds']}", *_look(line)]
        for name, found in result.data["strategies"].items()
        for line in found["rounds"]
    ]
    nums = {found["num"] for found in result.data["strategies"].values()}
    only = f" Of the first {max(nums):,} clips." if nums else ""
    return f"{markdown(['strategy, rounds', *_LOOK], rows)}\n{_setting(result)}{only}\n"


def _curves(result: Result) -> str:
    tables = []
    for name, lines in result.data["curves"].items():
        keys = list(dict.fromkeys(key for line in lines for key in line if key != "step"))
        rows = [[f"{line['step']:,}", *_values(line, keys)] for line in lines]
        tables.append(markdown([f"{name}, step", *keys], rows))
    return "\n".join(tables)


def _values(line: dict[str, float], keys: Sequence[str]) -> list[str]:
    return [f"{line[key]:.3f}" if key in line else "" for key in keys]


def _grpo(result: Result) -> str:
    """An iteration of GRPO by phase."""
    data, setting = result.data, result.data["setting"]
    phases = [[name.replace("_", " "), f"{value:.3f}"] for name, value in data["seconds"].items()]
    counts = (
        f"{value:,.0f} {name.replace('_', ' ')}" for name, value in data["of_a_group"].items()
    )
    return (
        f"{markdown(['phase', 'seconds'], phases)}\n"
        f"`{setting['model']}`, needle, {setting['groups']} groups of {setting['members']} a step, "
        f"{setting['rounds']} rounds, {data['tokens_said']:.0f} tokens a member; medians of "
        f"{setting['steps'] - 1} steps. Of a group: {', '.join(counts)}.\n"
    )


TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "training": ("training", _models),
    "training-compared": ("training", _compared),
    "training-strategies": ("training", _strategies),
    "training-curves": ("training", _curves),
    "grpo": ("grpo", _grpo),
}
