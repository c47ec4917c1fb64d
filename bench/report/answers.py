"""Tables about questions: accuracy, rounds, concurrent requests, memory over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from report.results import Result, markdown

# Endings of the names of contenders: asked again, asked something else, both while warm; drafts on.
_AGAIN, _OTHER, _DRAFTS = ", same question again", ", another question", " with drafts"


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
    model = f"{data['model']} in {data['dtype']}" if "dtype" in data else data["model"]
    return f"{markdown(header, rows)}\n{model}, `{data['strategy']}`, {setting}.\n"


def _rounds(result: Result) -> str:
    """Seconds of all rounds, medians, in each dtype, beside the first side's; then ours against
    each peer in words."""
    runs = result.data["runs"]
    header = ["seconds"]
    for run in runs:
        header += [run["dtype"], "times as fast"]
    rows = []
    for name in runs[0]["contenders"]:
        row = [name]
        for run in runs:
            base, *_ = (c["median_latency"] for c in run["contenders"].values())
            seconds = run["contenders"][name]["median_latency"]
            row += [f"{seconds:.2f}", f"{base / seconds:.2f}"]
        rows.append(row)
    compared = zip(*(run["comparisons"] for run in runs), strict=True)
    said = "".join(f"- {_compared(found, runs)}\n" for found in compared)
    return f"{markdown(header, rows)}\n{said}{_vllm(result)}"


def _compared(found: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> str:
    """One of ours against one peer, in every dtype; found: the comparison of each run."""
    first = found[0]
    kinds = [run["dtype"] for run in runs]
    ratios = ", ".join(f"{c['speedup']:.2f} in {k}" for c, k in zip(found, kinds, strict=True))
    differing = [
        f"{d} in {k}" for c, k in zip(found, kinds, strict=True) for d in c["differences"] or ()
    ]
    if not first["same_work"]:
        work = "same spans, but other frames and another prompt"
    else:
        work = (
            f"not the same work: {'; '.join(differing)}" if differing else "same frames and prompts"
        )
    alone = [c.get("first_round_speedup") for c in found]
    if all(alone):
        ratios += "; the first round alone " + ", ".join(
            f"{ratio:.2f} in {kind}" for ratio, kind in zip(alone, kinds, strict=True)
        )
    return f"`{first['name']}` against the {first['baseline']}, times as fast: {ratios} ({work})."


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
    rows = []
    for run in result.data["runs"]:
        contenders = run["contenders"]
        cold = {n: c for n, c in contenders.items() if f"{n}{_OTHER}" in contenders}
        base: dict[str, tuple[float, float]] = {}
        for name, contender in cold.items():
            again = contenders[f"{name}{_OTHER}"]
            times = (contender["median_latency"], again["median_latency"])
            full = base.setdefault(name.split(" ")[0], times)
            shares = (f"{time / first:.2f}" for time, first in zip(times, full, strict=True))
            rows.append([f"{name}, {run['dtype']}", *(f"{time:.2f}" for time in times), *shares])
    header = ["seconds", "cold", "another question", "cold, of the first", "another, of the first"]
    return markdown(header, rows)


def _served(level: dict[str, Any], name: str, setting: dict[str, Any]) -> list[str]:
    # With drafts tokens come several at a time: no time of one token.
    tpot = "" if setting["draft_tokens"] else f"{level['median_tpot_ms']:.0f}"
    return [
        name,
        str(level["max_concurrency"]),
        str(level["num_prompts"]),
        f"{level['duration']:.1f}",
        f"{level['output_throughput']:.1f}",
        f"{level['median_ttft_ms'] / 1e3:.2f}",
        tpot,
        f"{level['median_e2el_ms'] / 1e3:.2f}",
        f"{level['reuse']['pairs_encoded']:,}",
        f"{level['reuse']['tokens_prefilled']:,}",
    ]


_SERVED = ["concurrency", "questions", "s", "tokens/s", "TTFT s", "TPOT ms", "E2EL s"]
_SERVED += ["pairs encoded", "tokens prefilled"]


def _serve(result: Result) -> str:
    """Concurrent requests on several videos, a line for each number of them; medians."""
    setting = result.data["setting"]
    rows = [_served(level, f"`{level['strategy']}`", setting) for level in result.data["sweep"]]
    table = markdown([f"{setting['num_videos']} videos", *_SERVED], rows)
    return f"{table}\n{_how_served(result)}\n"


def _how_served(result: Result) -> str:
    drafts = result.data["setting"]["draft_tokens"]
    said = f"drafts of up to {drafts} tokens" if drafts else "no drafts"
    return f"{result.data['setting']['video']} video, {result.data['dtype']}, {said}."


def _concurrent(result: Result) -> str:
    """Questions put at once, ours and vLLM; of each side the run of median duration."""
    data, rows = result.data, []
    for part in data["sweep"]:
        low, high = min(part["durations"]), max(part["durations"])
        rows.append(
            [
                f"{part['strategy']}, {part['num_prompts']} on {part['num_videos']} videos",
                f"{part['duration']:.1f}",
                f"{low:.1f} to {high:.1f}",
                f"{part['request_throughput']:.3f}",
                f"{part['output_throughput']:.1f}",
                f"{part['median_ttft_ms'] / 1e3:.1f}",
                f"{part['reuse']['pairs_encoded']:,}",
                f"{part['reuse']['tokens_prefilled']:,}",
            ]
        )
    header = ["questions at once", "s", "least to most", "questions/s", "tokens/s", "TTFT s"]
    said = "".join(
        f"- `{c['name']}` answers {c['throughput_ratio']:.2f} times as many questions a second as "
        f"the {c['baseline']}{'' if c['same_work'] else ' (other frames and another prompt)'}.\n"
        for c in data["comparisons"]
    )
    table = markdown([*header, "pairs encoded", "tokens prefilled"], rows)
    return f"{table}\n{said}\n{_how_served(result)}\n{_vllm(result)}"


def _one_video(result: Result) -> str:
    """Requests about one video, together and each alone; medians."""
    rows, said, setting = [], [], result.data["setting"]
    for part in result.data["one_video"]:
        rows.append(_served(part["shared"], f"`{part['strategy']}`, together", setting))
        alone = f"`{part['strategy']}`, each alone and cold"
        rows.append(_served(part["separate"], alone, setting))
        said.append(f"{part['time_ratio']:.2f} with `{part['strategy']}`")
    together = f"Together over alone: {', '.join(said)}."
    return f"{markdown(['one video', *_SERVED], rows)}\n{together} {_how_served(result)}\n"


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
    """Milliseconds by phase and what was computed, a line a round, of cold runs without drafts."""
    phases = ("decode", "preprocess", "vision", "prefill", "generate", "total", "ttft")
    counts = ("frames_decoded", "pairs_encoded", "tokens_prefilled", "tokens_reused")
    rows = []
    for run in result.data["runs"]:
        for name, contender in run["contenders"].items():
            if name.endswith((_AGAIN, _DRAFTS)):
                continue
            for look in contender["rounds"]:
                reuse = look["reuse"] or {
                    "frames_decoded": look["num_frames"],
                    "pairs_encoded": (look["num_frames"] + 1) // 2,
                    "tokens_prefilled": look["prompt_tokens"],
                    "tokens_reused": 0,
                }
                rows.append(
                    [
                        f"{name}, {run['dtype']}, {look['index'] + 1}",
                        *(f"{look['timings_ms'][phase]:,.0f}" for phase in phases),
                        *(f"{reuse[count]:,}" for count in counts),
                    ]
                )
    return markdown(["ms", *phases, *(count.replace("_", " ") for count in counts)], rows)


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
    "needlebfloat16": ("needlebfloat16", _needle),
    "rounds": ("rounds", _rounds),
    "phases": ("rounds", _phases),
    "rounds5": ("rounds5", _rounds),
    "ablations": ("ablations", _ablations),
    "serve": ("serve", _serve),
    "onevideo": ("onevideo", _one_video),
    "concurrent": ("concurrent", _concurrent),
    "concurrentbfloat16": ("concurrentbfloat16", _concurrent),
    "soak": ("soak", _soak),
    "kept": ("strategies", _kept),
    "strategies": ("strategies", _strategies),
}
