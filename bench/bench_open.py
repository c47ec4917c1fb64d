"""Opening two-hour files: unknown and known, against one sequential read of them.

    python bench/bench_open.py [--seconds S] [--runs N] [--cache-dir DIR] [--result-dir DIR]

Every run is a process of its own, and contenders alternate: a plain loop of reads, the same through
the hash that names a content, opening without an index cache (the hash, and the index from the
file's tables) and with one that knows the file. With the right to drop the page cache every run
reads from the disk ("cold"); else all are warm. Two files of as many packets: opening costs some by
the packet, reading by the byte.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

from vtts_rt.bench.encodings import encode
from vtts_rt.bench.model import moving_frames
from vtts_rt.bench.setting import add_compute_flags, origin, results_name, write_result

ROOT = Path(__file__).resolve().parents[1]
FPS, CYCLE = 30, 300
SIZES = ((720, 1280), (360, 640))  # height, width
DROP = Path("/proc/sys/vm/drop_caches")
CONTENDERS = ("one read", "one read, hashed", "open", "open, indexed before")
CHILD = """
import sys, time
from pathlib import Path
from vtts_rt.video import container, open_video, media  # loaded beforehand
kind, path = sys.argv[1], Path(sys.argv[2])
began, cpu = time.perf_counter(), time.process_time()
if kind == "one read":
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while file.readinto(buffer):
            pass
elif kind == "one read, hashed":
    opener = lambda: path.open("rb")
    container.content_hash(opener, path.stat().st_size, lambda: None)
else:
    open_video(path).close()
print(time.perf_counter() - began, time.process_time() - cpu)
"""


def repeated(clip: Path, path: Path, cycles: int) -> Path:
    """A long file out of a short one: the packets of its video over and over, with times that go
    on; nothing is encoded again. The container of `clip` must store decode times where frames are
    reordered (MP4 does, Matroska does not)."""
    import av

    with av.open(str(clip)) as source, av.open(str(path), "w") as container:
        template = source.streams.video[0]
        packets = [packet for packet in source.demux(template) if packet.size]
        unit, rate = template.time_base, template.average_rate
        assert unit is not None and rate is not None
        first = min(packet.dts for packet in packets)
        stream = container.add_stream_from_template(template)
        for cycle in range(cycles):
            shift = int(Fraction(cycle * len(packets)) / rate / unit) - first
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.stream, copy.time_base = stream, unit
                copy.pts, copy.dts = packet.pts + shift, packet.dts + shift
                copy.is_keyframe = packet.is_keyframe
                container.mux(copy)
    return path


def seconds(kind: str, path: Path, cache: Path, cold: bool) -> tuple[float, float]:
    """Of one run: wall clock and CPU."""
    if cold:
        os.sync()
        DROP.write_text("3")
    known = str(cache) if kind == "open, indexed before" else "off"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, kind, str(path)],
        env={**os.environ, "VTTS_RT_CACHE_DIR": known},
        capture_output=True,
        text=True,
        check=True,
    )
    wall, cpu = map(float, done.stdout.split())
    return wall, cpu


def measured(path: Path, num_runs: int) -> list[dict[str, Any]]:
    """Medians of every contender, warm and, where that can be had, cold."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        seconds("open, indexed before", path, cache, cold=False)  # from here on it is known
        for cold in (False, *((True,) if os.access(DROP, os.W_OK) else ())):
            runs: dict[str, list[tuple[float, float]]] = {kind: [] for kind in CONTENDERS}
            for _ in range(num_runs):
                for kind, found in runs.items():
                    found.append(seconds(kind, path, cache, cold))
            for kind, found in runs.items():
                wall, cpu = (statistics.median(part) for part in zip(*found, strict=True))
                rows.append({"name": kind, "cold": cold, "seconds": wall, "cpu_seconds": cpu})
                temperature = "cold" if cold else "warm"
                print(f"{path.name} {temperature} {kind:22} {wall:7.3f} s, CPU {cpu:.3f} s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=7200, help="of the file")
    parser.add_argument("--runs", type=int, default=5)
    add_compute_flags(parser, devices=("cpu",), dtypes=(), threads=None)
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache/vtts_rt/bench")
    parser.add_argument("--result-dir", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args()
    rows, files = [], []
    for height, width in SIZES:
        path = args.cache_dir / f"open-{args.seconds}s-{width}x{height}.mp4"
        if not path.is_file():
            frames = moving_frames(CYCLE, (height, width))
            name = f"open-short-{width}x{height}.mp4"
            short = encode(args.cache_dir / name, frames, "h264", source_fps=FPS, gop=60)
            repeated(short, path, args.seconds * FPS // CYCLE)
        files.append({"height": height, "width": width, "bytes": path.stat().st_size})
        rows += [{"height": height, **row} for row in measured(path, args.runs)]
    report = {
        "theme": "open",
        **origin(threads=1),
        "setting": {
            "duration_seconds": args.seconds,
            "source_fps": FPS,
            "files": files,
            "runs": args.runs,
        },
        "results": rows,
    }
    write_result(args.result_dir / results_name("open"), report)


if __name__ == "__main__":
    main()
