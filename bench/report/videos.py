"""Tables about video files: decoders, feeds, opening, and answers across decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from report.results import Result, markdown


def _video(result: Result) -> str:
    """Of every case a line: ms and ms of CPU time by decoder, the fastest peer, seeing again."""
    data = result.data
    names = list(dict.fromkeys(row["name"] for row in data["results"]))
    cases: dict[tuple[str, int, str], dict[str, dict[str, Any]]] = {}
    for row in data["results"]:
        cases.setdefault(_case(row), {})[row["name"]] = row
    shares = {_case(found): found for found in data["comparisons"]}
    rows = []
    for (codec, gop, pattern), by_name in cases.items():
        share = shares.get((codec, gop, pattern))
        rows.append(
            [
                f"{_CODECS[codec]}, GOP {gop}, {pattern}",
                *(_times(by_name.get(name)) for name in names),
                f"{share['time_ratio']:.2f} of {share['peer']}" if share else "",
                f"{by_name['pyav']['again_speedup']:,.0f}",
            ]
        )
    header = ["ms / CPU ms", *names, "pyav's time", "seen again: times as fast"]
    setting = data["setting"]
    clip = f"{setting['duration_seconds']} s of {setting['width']}x{setting['height']} px"
    left_out = "".join(f" {name} took no part: {why}." for name, why in data["absent"].items())
    versions = ", ".join(f"{name} {version}" for name, version in data["peers"].items())
    peers = f" Peers: {versions}." if versions else ""
    return f"{markdown(header, rows)}\nFiles of {clip}.{peers}{left_out}\n"


_CODECS = {"h264": "H.264", "vp9": "VP9", "mjpeg": "MJPEG"}


def _case(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["codec"], row["gop"], row["pattern"]


def _times(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['median_ms']:,.0f} / {row['cpu_ms']:,.0f}"


def _differences(result: Result) -> str:
    """Absolute differences from PyAV's RGB by decoder and codec."""
    rows = [
        [
            f"{row['decoder']}, {_CODECS[row['codec']]}",
            f"{row['num_frames']:,}",
            *(str(row[name]) for name in ("max", "p999")),
            f"{row['mean']:.2f}",
        ]
        for row in result.data["differences"]
    ]
    return markdown(["levels of 255", "frames", "most", "99.9 % are at most", "mean"], rows)


def _agreement(result: Result) -> str:
    """Shares of clips on which both decoders lead to the same, and accuracy with each."""
    rows = [
        [
            _CODECS[row["codec"]],
            *(f"{100 * row[f'same_{what}']:.1f} %" for what in ("answer", "clues", "text")),
            *(f"{100 * row['accuracy'][name]:.1f} %" for name in ("pyav", "dali")),
        ]
        for row in result.data["results"]
    ]
    header = ["codec", "same answer", "same clues", "same text", "right by pyav", "right by dali"]
    first = result.data["results"][0]
    clips = f"{first['num']} clips of each codec from seed {first['seed']}"
    return f"{markdown(header, rows)}\n{result.data['model']}, {clips}.\n"


def _feed(result: Result) -> str:
    """Of every contender: how busy its consumer is, and what it gives to one that takes no time."""
    data = result.data
    rows = [
        [
            row["name"],
            f"{100 * row['busy']:.1f} %",
            f"{row['first_wait_ms']:,.0f}",
            f"{row['samples_per_second']:,.1f}",
            str(row["decodes_per_sample"]),
        ]
        for row in data["results"]
    ]
    header = ["samples from", "consumer busy", "ms to the first", "samples/s", "decodes a sample"]
    left_out = "".join(f" {name} took no part: {why}." for name, why in data["absent"].items())
    # Results filed before the bench left the command line name it otherwise.
    command = data["command"].replace("vtts-rt bench feed", "python bench/bench_feed.py")
    return f"{markdown(header, rows)}\n`{command}`.{left_out}\n"


def _open(result: Result) -> str:
    """Opening long files beside reading them, from the disk and from memory."""
    setting = result.data["setting"]
    times = {(r["height"], r["name"], r["cold"]): r["seconds"] for r in result.data["results"]}
    rows = []
    for file in setting["files"]:
        clip = f"{file['width']}x{file['height']}, {file['bytes'] / 1e6:,.0f} MB"
        for name in dict.fromkeys(row["name"] for row in result.data["results"]):
            found = (times.get((file["height"], name, cold)) for cold in (True, False))
            rows.append([f"{clip}: {name}", *("" if t is None else f"{t:.2f}" for t in found)])
    hours = setting["duration_seconds"] / 3600
    table = markdown(["seconds", "from the disk", "from memory"], rows)
    return f"{table}\nFiles of {hours:g} h at {setting['source_fps']:g} fps.\n"


# name of the table -> theme of its results, its text
TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "video": ("video", _video),
    "differences": ("video", _differences),
    "agreement": ("agreement", _agreement),
    "feed": ("feed", _feed),
    "open": ("open", _open),
}
