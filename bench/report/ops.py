"""Tables about kernels: times, errors, and what compilers make of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from report.results import Result, markdown

_SUMS = ("calls", "gflop", "mb", "ours", "torch", "in place")
_FEW_ROWS = 16  # from more on a product multiplies longer than it reads


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


def _products(result: Result) -> str:
    """Products and attention of many rows by phase: ms of all calls in a question; by themselves
    GFLOP/s and the share of the peak, beside torch's."""
    runs, rows = result.data["runs"], []
    header = ["many rows", "calls", "GFLOP"]
    for run in runs:
        header += [f"{run['dtype']}: ms", "GFLOP/s", "of the peak", "torch's GFLOP/s"]
    made = [_grouped(run, lambda op: op["gflop"] and op["rows"] > _FEW_ROWS) for run in runs]
    for name, first in made[0].items():
        row = [name, f"{first['calls']:,.0f}", f"{first['gflop']:,.1f}"]
        for run, groups in zip(runs, made, strict=True):
            group = groups[name]
            rates = [1e3 * group["gflop"] / group[side] for side in ("ours", "torch")]
            share = rates[0] / run["peak_gflops"]
            row += [f"{group['in place']:,.0f}", f"{rates[0]:.0f}", f"{100 * share:.0f} %"]
            row.append(f"{rates[1]:.0f}")
        rows.append(row)
    peaks = (f"{run['peak_gflops']:.0f} in {run['dtype']} ({run['peak_of']})" for run in runs)
    return f"{markdown(header, rows)}\nPeak, GFLOP/s: {', '.join(peaks)}.\n"


def _token(result: Result) -> str:
    """Products and attention of a decoding step of one request, products of one of eight: ms of one
    call, and the rate at which weights, or keys and values, are read."""
    runs, rows = result.data["runs"], []
    header = ["few rows", "MB"]
    for run in runs:
        header += [f"{run['dtype']}: ms", "GB/s", "of reading", "torch's GB/s"]
    made = [
        _grouped(run, lambda op: op["mb"] and op["phase"].endswith(("token", "tokens")))
        for run in runs
    ]
    for name in made[0]:
        row = [name, "/".join(f"{groups[name]['mb']:,.1f}" for groups in made)]
        for run, groups in zip(runs, made, strict=True):
            group = groups[name]
            rates = [group["mb"] / group[side] for side in ("ours", "torch")]
            share = rates[0] / run["read_gb_per_second"]
            row += [f"{group['ours']:.2f}", f"{rates[0]:.1f}", f"{100 * share:.0f} %"]
            row.append(f"{rates[1]:.1f}")
        rows.append(row)
    rates = (f"{run['read_gb_per_second']:.1f} ({run['dtype']})" for run in runs)
    return f"{markdown(header, rows)}\nReading, GB/s: {', '.join(rates)}. Of each op one call.\n"


def _grouped(
    run: dict[str, Any], wanted: Callable[[dict[str, Any]], Any]
) -> dict[str, dict[str, float]]:
    """Sums by phase and name over all calls; of decoding steps, of one call."""
    groups: dict[str, dict[str, float]] = {}
    for op in filter(wanted, run["ops"]):
        name = f"{op['phase']}: {op['name']}"
        group = groups.setdefault(name, dict.fromkeys(_SUMS, 0.0))
        decodes = op["phase"].endswith(("token", "tokens"))
        calls = 1 if decodes else sum(op["calls"])
        if decodes and group["calls"]:
            continue  # attention over more keys, in a later round
        group["calls"] += calls
        group["in place"] += op["ms_in_place"]
        for field in ("gflop", "mb"):
            group[field] += calls * op[field]
        for side in ("ours", "torch"):
            group[side] += calls * op["ms"][side]
    return groups


def _made_of(result: Result) -> str:
    """What phases are made of: measured, the sums of their ops, and the floor, ms."""
    columns = ("ms", "products", "attention", "others", "between", "floor")
    rows = [
        [f"{phase['phase']}, {run['dtype']}", *(f"{phase[column]:,.1f}" for column in columns)]
        for run in result.data["runs"]
        for phase in run["phases"]
    ]
    return markdown(["ms", "measured", *columns[1:]], rows)


def _errors(result: Result) -> str:
    """Largest error of each op, backend and storage type over all cases, beside eager's."""
    rows = [
        [
            f"`{row['op']}`, {row['backend']}",
            row["dtype"],
            str(row["cases"]),
            *(_scientific(row[name]) for name in ("found", "eager", "allowed")),
            row["case"],
        ]
        for row in result.data["results"]
    ]
    header = ["op, backend", "type", "cases", "error", "torch's error", "allowed", "of case"]
    return markdown(header, rows)


def _scientific(value: float) -> str:
    return "0" if value == 0.0 else f"{value:.1e}"


def _kernels(result: Result) -> str:
    """Registers and shared memory by architecture, worst variant of each function; spills."""
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in result.data["results"]:
        grouped.setdefault((row["kernel"], row["function"], row["tool"]), []).append(row)
    rows = []
    for (kernel, function, tool), found in sorted(grouped.items()):
        cells = []
        for arch in (80, 90, 100):
            of_arch = [row for row in found if row["arch"] == arch and "error" not in row]
            registers = max((row["registers"] for row in of_arch), default=0)
            shared = max((row["shared_bytes"] for row in of_arch), default=0)
            cells.append(f"{registers} / {shared / 1024:.1f} KiB")
        spilled = max(row.get("spill_bytes", 0) for row in found)
        variants = len({row["variant"] for row in found})
        name = f"`{kernel}`: `{function}`" if kernel != function else f"`{kernel}`"
        rows.append([f"{name}, {tool}", str(variants), *cells, str(spilled)])
    header = ["kernel", "variants", "sm_80", "sm_90", "sm_100", "spilled bytes"]
    return f"{markdown(header, rows)}{_explained(result)}"


def _explained(result: Result) -> str:
    said = {
        f"`{row['function']}` [{row['variant']}]: {row['explained']}"
        for row in result.data["results"]
        if row.get("spill_bytes") and row["explained"]
    }
    return "".join(["\nSpills:\n\n", *(f"- {text}\n" for text in sorted(said))]) if said else ""


def _ops(result: Result) -> str:
    """Microseconds of each backend and of torch, and how near to the machine's limits."""
    data = result.data
    rows = []
    for row in data["results"]:
        times = row["median_us"]
        ours = min((n for n in times if n not in ("eager", "torch", "reference")), key=times.get)
        base = min(times[name] for name in times if name != ours) if len(times) > 1 else times[ours]
        rows.append(
            [
                f"`{row['op']}`: {row['case']}, {row['dtype']}",
                ours,
                f"{times[ours]:,.1f}",
                f"{base / times[ours]:.2f}",
                f"{row['gb_per_second'][ours]:,.0f}" if row["num_bytes"] else "",
                f"{100 * row['share_of_copy'][ours]:.0f} %" if row["num_bytes"] else "",
                f"{row['gflops'][ours]:,.0f}" if row["num_flops"] else "",
            ]
        )
    header = ["op and shape", "backend", "us", "times as fast as the next", "GB/s"]
    rates = ", ".join(f"{rate:,.0f} GFLOP/s {name}" for name, rate in data["matmul_gflops"].items())
    limits = f"A copy runs at {data['copy_gb_per_second']:,.0f} GB/s, torch's product at {rates}."
    return f"{markdown([*header, 'of a copy', 'GFLOP/s'], rows)}\n{limits}\n"


def _quantization(result: Result) -> str:
    """Decoding steps, ms, and accuracy by rounds, of 8-bit weights beside float32."""
    data = result.data
    names = list(dict.fromkeys(entry["name"] for entry in data["decode"]))
    steps: dict[tuple[int, int], dict[str, float]] = {}
    for entry in data["decode"]:
        case = steps.setdefault((entry["sequences"], entry["rows"]), {})
        case[entry["name"]] = entry["median_ms"]
    rows = [
        [
            f"{sequences} sequence{'s' if sequences > 1 else ''} of {count}",
            *(f"{times[name]:.1f}" for name in names),
            *(f"{times[names[0]] / times[name]:.2f}" for name in names[1:]),
        ]
        for (sequences, count), times in steps.items()
    ]
    header = ["ms a step", *names, *(f"{name}: times as fast" for name in names[1:])]
    looks = [entry["rounds"] for entry in data["accuracy"][0]["rounds"]]
    accuracies = [
        [entry["name"], *(f"{100 * look['accuracy']:.1f} %" for look in entry["rounds"])]
        for entry in data["accuracy"]
    ]
    by_rounds = [f"{count} round{'s' if count > 1 else ''}" for count in looks]
    first = data["accuracy"][0]
    clips = f"{first['model']}, `{first['strategy']}`, {first['num']} clips from seed"
    return (
        f"{markdown(header, rows)}\n{markdown(['accuracy', *by_rounds], accuracies)}\n"
        f"{clips} {first['seed']}, split {first['split']}.\n"
    )


def _processor(result: Result) -> str:
    """patchify and patch_embed where the frames are, against the first of their group."""
    rows = [
        [
            row["name"],
            f"{row['median_ms']:,.2f}",
            f"{row['speedup']:,.1f}",
            f"{row['gb_per_second']:,.0f}",
            f"{100 * row['share_of_copy']:.0f} %",
            f"{100 * row['share_of_product_rate']:.0f} %" if row["share_of_product_rate"] else "",
        ]
        for row in result.data["results"]
    ]
    header = ["ms", "median", "times as fast", "GB/s", "of a copy", "of a product's rate"]
    return markdown(header, rows)


def _device(result: Result) -> str:
    """Rounds, tower and prefill against transformers, one line each."""
    data = result.data
    rows = [
        [f"{name}, {part['tokens']:,} tokens", *_pair(part["median_ms"]), f"{part['speedup']:.2f}"]
        for name, part in data["parts"].items()
    ]
    loop, *ours = data["contenders"].items()
    speedups = {entry["name"]: entry["speedup"] for entry in data["comparisons"]}
    for name, contender in ours:
        times = {"transformers": loop[1], "vtts_rt": contender}
        ms = {side: 1e3 * found["median_latency"] for side, found in times.items()}
        rows.append([f"all rounds, `{name}`", *_pair(ms), f"{speedups[name]:.2f}"])
    table = markdown(["ms", "transformers", "vtts_rt", "times as fast"], rows)
    return f"{table}\n{data['model_id']}, {data['dtype']}.\n"


def _pair(ms: dict[str, float]) -> tuple[str, str]:
    return f"{ms['transformers']:,.1f}", f"{ms['vtts_rt']:,.1f}"


def _decode(result: Result) -> str:
    """Milliseconds of a decoding step and shares of the floor."""
    rows = [
        [
            f"{row['sequences']} x {row['keys']:,} keys, {row['way']}",
            f"{row['ms_per_step']:.2f}",
            f"{row['floor_ms']:.2f}",
            f"{100 * row['share_of_floor']:.0f} %",
            f"{100 * row['share_of_floor_with_kv']:.0f} %",
        ]
        for row in result.data["results"]
    ]
    return markdown(["step", "ms", "floor, ms", "of the floor", "with keys and values"], rows)


# name of the table -> theme of its results, its text
TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "patchify": ("patchify", _patchify),
    "products": ("phases", _products),
    "token": ("phases", _token),
    "floor": ("phases", _made_of),
    "quantization": ("quantization", _quantization),
    "errors": ("errors", _errors),
    "kernels": ("kernels", _kernels),
    "ops": ("ops", _ops),
    "processor": ("processor", _processor),
    "device7b": ("device7b", _device),
    "device3b": ("device3b", _device),
    "decode7b": ("decode7b", _decode),
    "decode3b": ("decode3b", _decode),
}
