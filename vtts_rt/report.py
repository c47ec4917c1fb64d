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
_OTHER = ", another question"  # contenders of the ablations, asked while warm
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
            f"{_tokens(contender) / contender['median_latency']:.1f}",
        ]
        for name, contender in contenders.items()
    ]
    header = ["seconds", *(f"round {i + 1}" for i in range(num_rounds)), "all", "share of time"]
    return markdown([*header, "tokens/s"], rows) + _vllm(result)


def _tokens(contender: dict[str, Any]) -> int:
    return sum(look["completion_tokens"] for look in contender["rounds"])


def _vllm(result: Result) -> str:
    """How vLLM ran, where it did."""
    about = result.data.get("vllm")
    if not about:
        return ""
    mode = "compiled" if about["compiled"] else "eager mode"
    preloaded = " and ".join(about["ld_preload"]) or "nothing"
    versions = f"torch {about['torch']}, transformers {about['transformers']}"
    return (
        f"\nvLLM {about['vllm']} ({versions}) in an environment of its own: {mode}, "
        f"{about['threads']} threads, {preloaded} preloaded, prefix caching "
        f"{'on' if about['enable_prefix_caching'] else 'off'}.\n"
    )


def _ablations(result: Result) -> str:
    """Seconds, medians: a cold question, another one about the same video, shares of the first."""
    contenders = result.data["contenders"]
    cold = {n: c for n, c in contenders.items() if f"{n}{_OTHER}" in contenders}
    base: dict[str, tuple[float, float]] = {}
    rows = []
    for name, contender in cold.items():
        times = (contender["median_latency"], contenders[f"{name}{_OTHER}"]["median_latency"])
        full = base.setdefault(name.split(" ")[0], times)
        shares = (f"{time / first:.2f}" for time, first in zip(times, full, strict=True))
        rows.append([name, *(f"{time:.2f}" for time in times), *shares])
    header = ["seconds", "cold", "another question", "cold, of the first", "another, of the first"]
    return markdown(header, rows)


def _served(level: dict[str, Any], name: str) -> list[str]:
    return [
        name,
        str(level["max_concurrency"]),
        str(level["num_prompts"]),
        f"{level['duration']:.1f}",
        f"{level['output_throughput']:.1f}",
        f"{level['median_ttft_ms'] / 1e3:.2f}",
        f"{level['median_tpot_ms']:.0f}",
        f"{level['median_e2el_ms'] / 1e3:.2f}",
        f"{level['reuse']['pairs_encoded']:,}",
        f"{level['reuse']['tokens_prefilled']:,}",
    ]


_SERVED = ["askers", "questions", "s", "tokens/s", "TTFT s", "TPOT ms", "E2EL s"]
_SERVED += ["pairs encoded", "tokens prefilled"]


def _serve(result: Result) -> str:
    """Closed-loop askers on several videos, a line for each number of them; medians."""
    rows = [_served(level, f"`{level['strategy']}`") for level in result.data["sweep"]]
    videos = result.data["setting"]["num_videos"]
    return f"{markdown([f'{videos} videos', *_SERVED], rows)}"


def _one_video(result: Result) -> str:
    """Askers about one video, together and each alone; medians."""
    rows, said = [], []
    for part in result.data["one_video"]:
        rows.append(_served(part["shared"], f"`{part['strategy']}`, together"))
        rows.append(_served(part["separate"], f"`{part['strategy']}`, each alone and cold"))
        said.append(f"{part['time_ratio']:.2f} with `{part['strategy']}`")
    together = f"Together over alone: {', '.join(said)}."
    return f"{markdown(['one video', *_SERVED], rows)}\n{together}\n"


def _soak(result: Result) -> str:
    """Resident memory over many mixed requests."""
    data = result.data
    header = ["requests", "minutes", "MB loaded", "MB warm", "MB at most", "budgets, MB"]
    numbers = ("loaded_rss_mb", "warm_rss_mb", "peak_rss_mb", "budget_mb")
    row = [
        f"{data['num_prompts']:,}",
        f"{data['duration'] / 60:.1f}",
        *(f"{data[number]:.1f}" for number in numbers),
        f"{data['slope_mb_per_100_requests']:+.2f}",
    ]
    ended = ", ".join(f"{num} {name}" for name, num in data["outcomes"].items())
    return f"{markdown([*header, 'MB per 100 requests'], [row])}\nHow they ended: {ended}.\n"


def _phases(result: Result) -> str:
    """Milliseconds by phase and what was computed, a line a round."""
    phases = ("decode", "preprocess", "vision", "prefill", "generate", "ttft")
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
                    *(_ms(look["timings_ms"].get(phase)) for phase in phases),
                    *(f"{reuse[count]:,}" for count in counts),
                ]
            )
    return markdown(["ms", *phases, *(count.replace("_", " ") for count in counts)], rows)


def _ms(value: float | None) -> str:
    """Older results lack the time to the first token."""
    return "" if value is None else f"{value:,.0f}"


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


def _linear(result: Result) -> str:
    """GFLOP/s of torch and of the native kernel by shape, medians."""
    rows = [
        [
            f"{entry['about']}: {entry['rows']:,} x {entry['channels']:,} x {entry['outputs']:,}",
            *(f"{entry['gflops'][backend]:.0f}" for backend in ("torch", "cpu")),
            f"{entry['speedup']:.2f}",
        ]
        for entry in result.data["results"]
    ]
    return markdown(["GFLOP/s", "torch", "native", "times as fast"], rows)


def _kept(result: Result) -> str:
    """What later rounds keep of the round before: a line for each strategy and duration."""
    lines: dict[str, list[str]] = {}
    header = ["kept of the round before"]
    for entry in result.data["kept"]:
        line = lines.setdefault(f"`{entry['strategy']}`, {entry['duration_seconds']} s", [])
        line += [f"{100 * entry[share]:.1f} %" for share in ("frames", "pairs", "prefix")]
        line.append(f"{entry['tokens']:,.0f}")
        if len(lines) == 1:
            number = entry["round"]
            header += [f"round {number}: frames", "pairs", "prefix", "prompt tokens"]
    rows = [[name, *line] for name, line in lines.items()]
    return f"{markdown(header, rows)}\nMeans over {result.data['plans']} random clues each.\n"


def _strategies(result: Result) -> str:
    """Accuracy by strategy and number of rounds; tokens and time are those of the last column."""
    runs = result.data["accuracy"]
    rows = [
        [
            f"`{run['strategy']}`",
            *(f"{100 * look['accuracy']:.1f} %" for look in run["rounds"]),
            f"{run['rounds'][-1]['visual_tokens']:,.0f}",
            f"{run['rounds'][-1]['ms']:,.0f}",
        ]
        for run in runs
    ]
    counts = [f"{look['rounds']} round{'s' * (look['rounds'] > 1)}" for look in runs[0]["rounds"]]
    setting = f"{result.data['num']} clips from seed {result.data['seed']}"
    header = ["accuracy", *counts, "visual tokens", "ms a question"]
    return f"{markdown(header, rows)}\n{runs[0]['model']}, {setting}, split {runs[0]['split']}.\n"


# name of the table -> theme of its results, its text
TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "needle": ("needle", _needle),
    "rounds": ("rounds", _rounds),
    "phases": ("rounds", _phases),
    "rounds5": ("rounds5", _rounds),
    "ablations": ("ablations", _ablations),
    "serve": ("serve", _serve),
    "onevideo": ("onevideo", _one_video),
    "soak": ("soak", _soak),
    "patchify": ("patchify", _patchify),
    "linear": ("linear", _linear),
    "kept": ("strategies", _kept),
    "strategies": ("strategies", _strategies),
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
