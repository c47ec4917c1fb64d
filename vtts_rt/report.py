"""Tables of README and docs, written from the results of benches and from the sources.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; nothing between the two is
ever typed. Results are files `bench/results/<theme>_<hardware>_<yyyymm>.json`; of one theme and
hardware the newest counts. `modules` lists every source file with its first sentence.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
_NAME = re.compile(r"(?P<theme>[a-z0-9]+)_(?P<hardware>.+)_(?P<month>\d{6})")


@dataclass(frozen=True, slots=True)
class Result:
    """One result file: its parsed JSON and what its name says."""

    path: Path
    theme: str
    hardware: str
    month: str
    data: dict[str, Any]


def load_results(folder: Path, theme: str) -> list[Result]:
    """The newest result of a theme for each hardware, ordered by hardware.

    Raises ValueError for a file that is not a JSON object.
    """
    newest: dict[str, Result] = {}
    for path in sorted(folder.glob(f"{theme}_*.json")):
        name = _NAME.fullmatch(path.stem)
        if name is None or name["theme"] != theme:
            continue
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"report: {path} must be JSON, got {error}") from None
        if not isinstance(data, dict):
            raise ValueError(f"report: {path} must be a JSON object, got {type(data).__name__}")
        known = newest.get(name["hardware"])
        if known is None or known.month < name["month"]:
            newest[name["hardware"]] = Result(path, theme, name["hardware"], name["month"], data)
    return [newest[hardware] for hardware in sorted(newest)]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A pipe table: the first column to the left, the others to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    lines = [header, rule, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _needle(result: Result) -> str:
    rows = [
        [
            str(look["rounds"]),
            f"{100 * look['accuracy']:.1f} %",
            f"{look['span_iou']:.2f}",
            f"{look['box_iou']:.2f}",
            f"{look['visual_tokens']:,.0f}",
            f"{look['ms']:,.0f}",
        ]
        for look in result.data["rounds"]
    ]
    data = result.data
    setting = f"{data['num']} clips from seed {data['seed']}, split {data['split']}"
    header = ["rounds", "accuracy", "span IoU", "box IoU", "visual tokens", "ms a question"]
    return f"{markdown(header, rows)}\n{data['model']}, `{data['strategy']}`, {setting}.\n"


def _rounds(result: Result) -> str:
    """Seconds by round and in all, medians, and each side's share of the first one's time."""
    contenders = result.data["contenders"]
    ratios = {c["name"]: c["time_ratio"] for c in result.data["comparisons"]}
    num_rounds = result.data["setting"]["rounds"]
    rows = [
        [
            name,
            *(f"{look['timings_ms']['total'] / 1e3:.2f}" for look in contender["rounds"]),
            f"{contender['median_latency']:.2f}",
            f"{ratios[name]:.2f}" if name in ratios else "1",
        ]
        for name, contender in contenders.items()
    ]
    header = ["seconds", *(f"round {i + 1}" for i in range(num_rounds)), "all", "share of time"]
    return markdown(header, rows)


def _phases(result: Result) -> str:
    """Milliseconds by phase and what was computed, a line a round."""
    phases = ("decode", "preprocess", "vision", "prefill", "generate")
    counts = ("frames_decoded", "pairs_encoded", "tokens_prefilled", "tokens_reused")
    rows = []
    for name, contender in result.data["contenders"].items():
        for look in contender["rounds"]:
            reuse = look["reuse"] or {
                "frames_decoded": look["num_frames"],
                "pairs_encoded": look["num_frames"] // 2,
                "tokens_prefilled": look["prompt_tokens"],
                "tokens_reused": 0,
            }
            rows.append(
                [
                    f"{name}, {look['index'] + 1}",
                    *(f"{look['timings_ms'][phase]:,.0f}" for phase in phases),
                    *(f"{reuse[count]:,}" for count in counts),
                ]
            )
    return markdown(["ms", *phases, *(count.replace("_", " ") for count in counts)], rows)


def _patchify(result: Result) -> str:
    """Medians, ms, and times as fast as the first one with as many threads."""
    rows = [
        [
            f"{entry['name']}, {entry['num_threads']} threads",
            f"{entry['median_ms']:,.0f}",
            f"{entry['min_ms']:,.0f}",
            f"{entry['max_ms']:,.0f}",
            f"{entry['speedup']:.1f}",
        ]
        for entry in result.data["results"]
    ]
    return markdown(["ms", "median", "least", "most", "times as fast"], rows)


# name of the table -> theme of its results, its text
TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "needle": ("needle", _needle),
    "rounds": ("rounds", _rounds),
    "phases": ("rounds", _phases),
    "patchify": ("patchify", _patchify),
}


def modules(root: Path) -> str:
    """Every source file of a checkout with the first sentence of its docstring or comment."""
    rows = []
    for folder in ("vtts_rt", "kernels", "csrc"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".c", ".cpp") and path.name != "_build_info.py":
                text = path.read_text(encoding="utf-8")
                about = _docstring(text) if path.suffix == ".py" else _comment(text)
                if about:
                    sentence = re.split(r"(?<=\.)\s", about, maxsplit=1)[0].rstrip(".")
                    name = path.relative_to(root).as_posix()
                    rows.append([f"`{name}`", sentence.replace("|", "\\|")])
    return markdown(["file", "what it is"], rows).replace("---:", "---")


def _docstring(text: str) -> str:
    return " ".join((ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].split())


def _comment(text: str) -> str:
    """The comment a C++ file begins with, joined."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("//"):
            break
        lines.append(line.lstrip("/ "))
    return " ".join(lines)


def table(name: str, root: Path) -> str:
    """The text between the two markers of table `name` in the checkout `root`.

    Raises ValueError for an unknown name or a result that lacks a value the table needs.
    """
    if name == "modules":
        return f"\n{modules(root)}\n"
    if name not in TABLES:
        known = ", ".join([*TABLES, "modules"])
        raise ValueError(f"report: table must be one of {known}, got {name!r}")
    theme, render = TABLES[name]
    results = load_results(root / "bench" / "results", theme)
    if not results:
        return f"No result of `{theme}` in bench/results yet.\n"
    parts = []
    for result in results:
        try:
            parts.append(f"\n{render(result)}\n{_source(result)}\n")
        except (KeyError, TypeError) as error:
            raise ValueError(f"report: {result.path} lacks a value: {error!r}") from None
    return "".join(parts)


def _source(result: Result) -> str:
    """One line: file, commit and versions behind a table."""
    data = result.data
    facts = [f"`{result.path.name}`"]
    if machine := data.get("hardware"):
        threads = f", {machine['threads']} threads" if "threads" in machine else ""
        facts.append(f"{machine.get('gpu') or machine['cpu']}{threads}")
    if commit := data.get("commit"):
        facts.append(f"commit {commit[:10]}{'+' if commit.endswith('+') else ''}")
    facts += [f"{name} {version}" for name, version in data.get("versions", {}).items()]
    return f"Generated from {', '.join(facts)}."


def update(text: str, root: Path) -> str:
    """`text` with every marked table rewritten from the checkout `root`."""
    return _BLOCK.sub(lambda block: f"{block[1]}{table(block[2], root)}{block[3]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the tables; with --check, only say which files are out of date (status 1)."""
    parser = argparse.ArgumentParser(prog="vtts-rt report", description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(), help="a checkout (default: here)")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if out of date")
    args = parser.parse_args(argv)
    readme = args.root / "README.md"
    if not readme.is_file():
        raise ValueError(f"report: root must be a checkout with a README.md, got {args.root}")
    stale = []
    for path in (readme, *sorted((args.root / "docs").glob("*.md"))):
        before = path.read_text(encoding="utf-8")
        after = update(before, args.root)
        if after != before:
            stale.append(path)
            if not args.check:
                path.write_text(after, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'out of date' if args.check else 'written'}")
    return 1 if args.check and stale else 0
