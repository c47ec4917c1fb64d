"""`vtts-rt bench serve`: concurrent requests, on several videos and on one.

Closed loop: each of C clients sends its next question when it has its answer. Every measured part
begins cold: files not seen before, caches cleared. Field names are those of `vllm bench serve`;
TTFT is that of the first round, from the question on, opening the file included. With drafts,
which are off by default, tokens come several at a time: there is no inter-token latency then.

With --peer vLLM's offline engine answers the same questions, all submitted at once. Runs alternate;
of each side the one of median duration is reported.
"""

from __future__ import annotations

import argparse
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from vtts_rt.bench.footage import turned
from vtts_rt.bench.peer import RoundSample
from vtts_rt.bench.rounds import (
    PEERS,
    Peer,
    add_peer_flags,
    asked_alike,
    peers_of,
    samples,
    vllm_peer,
    words_of,
)
from vtts_rt.bench.setting import (
    OPTIONS,
    Setting,
    add_setting_flags,
    check_compute,
    dtype_of,
    heading,
    model_and_video,
    question,
    strategies_of,
    video_name,
)
from vtts_rt.config import EngineConfig, RuntimeConfig
from vtts_rt.perception.prompts import PromptTemplates
from vtts_rt.perception.strategy import find_strategy
from vtts_rt.runtime import Runtime
from vtts_rt.types import ReuseStats, StrategyName, VideoMetadata, require


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `vtts-rt bench serve`; names of `vllm bench serve` where it has them."""
    add_setting_flags(parser, strategy="append")
    add = parser.add_argument
    add(
        "--max-concurrency",
        "--concurrency",
        default="1,2,4,8",
        help="concurrent requests, comma-separated, or none",
    )
    add("--num-prompts", type=int, default=8, help="questions asked at each concurrency")
    add("--num-videos", type=int, default=4, help="files they are about")
    add("--repeats", "--num-iters", type=int, default=1, help="runs at each concurrency")
    add_peer_flags(parser, "none")
    add(
        "--one-video",
        type=int,
        default=8,
        help="requests about one file at once, against as many separate cold ones; 0: leave out",
    )


def theme(args: argparse.Namespace) -> str:
    """What its result is filed under."""
    if args.peer not in ("", "none"):
        dtype = dtype_of(args, args.model) if args.model else args.dtype or "float32"
        return "concurrent" if dtype == "float32" else f"concurrent{dtype}"
    return "serve" if _levels(args) else "onevideo"


def _levels(args: argparse.Namespace) -> list[int]:
    return [int(text) for text in args.max_concurrency.split(",") if text not in ("", "none")]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the result (the JSON file's content); arguments as `--help` says."""
    strategies, peers, levels = strategies_of(args), peers_of(args), _levels(args)
    counts = {name: [getattr(args, name)] for name in ("num_prompts", "num_videos", "repeats")}
    for name, values in {"max_concurrency": levels, **counts}.items():
        for value in values:
            require("bench", name, value, value >= 1, ">= 1")
    low = 0 if levels else 1
    require("bench", "one_video", args.one_video, args.one_video >= low, f">= {low}")
    if peers:
        require("bench", "peer", args.peer, "hf" not in peers, "none, or on vLLM")
        rule = f"num_prompts ({args.num_prompts}) beside a peer, which is asked all at once"
        require("bench", "max_concurrency", levels, levels == [args.num_prompts], rule)
    check_compute(args)
    folder, video, metadata = model_and_video(args)
    setting = Setting.of(args, metadata.duration_seconds)
    with ExitStack() as stack:
        files = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runtime = Runtime.from_pretrained(
            folder,
            dtype=dtype_of(args, folder),
            device=args.device,
            engine=EngineConfig(draft_tokens=args.draft_tokens),
            config=RuntimeConfig(threads=args.threads),
        )
        stack.enter_context(runtime)
        resolved = runtime.perception(setting.perception(strategies[0]))
        # A peer recognises frames by their pixels: videos that count as different differ in them.
        shares = [number / args.num_videos for number in range(args.num_videos if peers else 1)]
        folder_of = args.cache_dir if args.video is None else files
        videos = [turned(video, share, folder_of) if share else video for share in shares]
        # Code, threads and allocator, not caches.
        brief = replace(setting, rounds=1, max_tokens=2, clues=[])
        bench = _Bench(runtime, videos, files, brief, args.draft_tokens > 0)
        bench.ask(bench.copy(), 0, strategies[0])
        numbers, about = (args.num_prompts, args.num_videos), None
        sides: dict[str, Any] = {s: partial(bench.serve, s, *numbers) for s in strategies}
        if peers:
            vllm = stack.enter_context(vllm_peer(args, folder, dtype_of(args, folder)))
            about = vllm.about
            for name in peers:
                ask = partial(bench.serve_peer, vllm, PEERS[name], words_of(folder), metadata)
                ask(1, 1, 1)
                sides[PEERS[name].label] = partial(ask, *numbers)
        bench.setting = setting
        sweep: list[dict[str, Any]] = []
        for level in levels:
            runs = [[ask(level) for ask in sides.values()] for _ in range(args.repeats)]
            sweep += map(_median, zip(*runs, strict=True))
        sweep.sort(key=lambda part: list(sides).index(part["strategy"]))
        one_video = []
        if args.one_video:
            layouts = [(strategy, True) for strategy in strategies]
            layouts += [(name, False) for name in strategies if find_strategy(name).continues]
            one_video = [bench.one_video(*layout, args.one_video) for layout in layouts]
    flags = ["strategy", "rounds", "max_tokens", "device", "dtype", "threads", "footage", "video"]
    flags += ["model", "parity", "draft_tokens", "max_concurrency", "num_prompts", "num_videos"]
    flags += ["one_video", "repeats", "peer", "vllm_compile"]
    return {
        **heading("serve", args, flags),
        "backend": "vtts_rt",
        "dtype": dtype_of(args, folder),
        "setting": {
            **setting.as_dict(video_name(args), metadata, resolved),
            "num_videos": args.num_videos,
            "draft_tokens": args.draft_tokens,
            "unmeasured": "loading the models; a warm-up of one round and two tokens a side",
        },
        "vllm": about,
        "sweep": sweep,
        "comparisons": _compared(sweep, strategies, peers),
        "one_video": one_video,
    }


def _median(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run of median duration, with the durations of all."""
    ordered = sorted(runs, key=lambda run: run["duration"])
    return {**ordered[(len(runs) - 1) // 2], "durations": [run["duration"] for run in runs]}


def _compared(
    sweep: list[dict[str, Any]], strategies: list[StrategyName], peers: list[str]
) -> list[dict[str, Any]]:
    """Questions a second of ours over a peer's, which has answered as many in as many tokens."""
    rates = {part["strategy"]: part["request_throughput"] for part in sweep}
    return [
        {
            "name": name,
            "baseline": PEERS[peer].label,
            "same_work": PEERS[peer].same_work(name),
            "throughput_ratio": rates[name] / rates[PEERS[peer].label],
        }
        for peer in peers
        for name in strategies
    ]


@dataclass(slots=True)
class _Asked:
    """One answered question of any side. seconds: from asking to its end; ttft: to its first
    token; gaps: between its tokens, none where a side does not tell."""

    rounds: Sequence[RoundSample]
    seconds: float
    ttft: float
    gaps: list[float]


class _Bench:
    """videos: files that questions are about, each of other frames; copies of them in turn.
    setting: of the questions from now on."""

    def __init__(
        self, runtime: Runtime, videos: list[Path], files: Path, setting: Setting, drafts: bool
    ) -> None:
        self._runtime = runtime
        self._videos = [(video.read_bytes(), video.suffix) for video in videos]
        self._files = files
        self.setting = setting
        self._drafts = drafts
        self._copies = count()

    def copy(self, number: int = 0) -> Path:
        """A file of the same frames and another content, so that nothing of it is known.

        An MP4 box `free` at the end, which readers skip, tells the copies apart.
        """
        content, suffix = self._videos[number % len(self._videos)]
        mark = next(self._copies)
        path = self._files / f"copy-{mark}{suffix}"
        path.write_bytes(content + struct.pack(">I4sQ", 16, b"free", mark))
        return path

    def ask(self, video: Path, number: int, strategy: StrategyName) -> _Asked:
        """Ask question `number` about a file."""
        times: list[float] = []

        def note(event: Any) -> None:
            if event.type == "token":
                times.append(time.perf_counter())

        began = time.perf_counter()
        answer = self._runtime.ask(
            str(video),
            question(number),
            options=OPTIONS,
            perception=self.setting.perception(strategy),
            sampling=self.setting.sampling,
            assume_clues=self.setting.clues,
            on_event=note,
        )
        seconds = time.perf_counter() - began
        gaps = [later - sooner for sooner, later in zip(times, times[1:], strict=False)]
        return _Asked(samples(answer), seconds, times[0] - began, gaps)

    def serve_peer(
        self,
        vllm: Any,
        peer: Peer,
        words: PromptTemplates,
        metadata: VideoMetadata,
        num_prompts: int,
        num_videos: int,
        concurrency: int,
    ) -> dict[str, Any]:
        """As `serve`, by vLLM, which gets all questions at once."""
        vllm.forget()
        videos = [self.copy(number) for number in range(num_videos)]
        began = time.perf_counter()
        answers = vllm.ask_together(
            [videos[number % num_videos] for number in range(num_prompts)],
            [question(number) for number in range(num_prompts)],
            metadata=metadata,
            **asked_alike(self._runtime, self.setting, peer.strategy, words),
        )
        duration = time.perf_counter() - began
        asked = []
        for rounds in answers:
            seconds = sum(look.timings.total for look in rounds) / 1e3
            asked.append(_Asked(rounds, seconds, rounds[0].timings.ttft / 1e3, []))
        result = _served(asked, concurrency, duration, drafts=True)
        result["reuse"]["pairs_encoded"] = vllm.pairs_encoded
        return self._told({"strategy": peer.label, "num_videos": num_videos, **result}, videos)

    def serve(
        self, strategy: StrategyName, num_prompts: int, num_videos: int, concurrency: int
    ) -> dict[str, Any]:
        """`num_prompts` questions, `concurrency` at once, cold; the files in turn."""
        self._runtime.clear_caches()
        videos = [self.copy(number) for number in range(num_videos)]
        before = self._runtime.stats()["scheduler"]
        began = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as clients:
            futures = [
                clients.submit(self.ask, videos[number % num_videos], number, strategy)
                for number in range(num_prompts)
            ]
            asked = [future.result() for future in futures]
        result = {
            "strategy": strategy,
            "num_videos": num_videos,
            **_served(asked, concurrency, time.perf_counter() - began, self._drafts),
        }
        after = self._runtime.stats()["scheduler"]
        result["steps"] = after["steps"] - before["steps"]
        result["preemptions"] = after["preemptions"] - before["preemptions"]
        return self._told(result, videos)

    @staticmethod
    def _told(result: dict[str, Any], videos: list[Path]) -> dict[str, Any]:
        """Print what a run took and delete its files."""
        said = f"{result['duration']:.2f} s, {result['output_throughput']:.1f} tokens/s"
        name = f"{result['strategy']}, {result['max_concurrency']} at once, {len(videos)} videos"
        print(f"{name}: {said}", file=sys.stderr)
        for path in videos:
            path.unlink()
        return result

    def one_video(
        self, strategy: StrategyName, text_first: bool, num_requests: int
    ) -> dict[str, Any]:
        """Requests about one file, together, against each alone and cold, one after the other."""
        self.setting = replace(self.setting, text_first=text_first)
        name = strategy if text_first else f"{strategy}, video first"
        shared = self.serve(strategy, num_requests, 1, num_requests)
        alone = []
        for number in range(num_requests):
            self._runtime.clear_caches()
            path = self.copy()
            alone.append(self.ask(path, number, strategy))
            path.unlink()
        separate = _served(alone, 1, sum(asked.seconds for asked in alone), self._drafts)
        print(f"{name}, {num_requests} alone: {separate['duration']:.2f} s", file=sys.stderr)
        return {
            "strategy": name,
            "num_requests": num_requests,
            "shared": shared,
            "separate": separate,
            "time_ratio": shared["duration"] / separate["duration"],
        }


def _served(asked: list[_Asked], concurrency: int, duration: float, drafts: bool) -> dict[str, Any]:
    """Fields of `vllm bench serve` (duration in seconds, tokens and requests a second, ms), those
    of ITL only without drafts."""
    rounds = [look for a in asked for look in a.rounds]
    inputs = [sum(r.prompt_tokens for r in a.rounds) for a in asked]
    outputs = [sum(len(r.token_ids) for r in a.rounds) for a in asked]
    reuse = sum((r.reuse for r in rounds if r.reuse is not None), ReuseStats())
    per_token = [
        (r.timings.total - r.timings.ttft) / 1e3 / (len(r.token_ids) - 1)
        for r in rounds
        if len(r.token_ids) > 1
    ]
    return {
        "max_concurrency": concurrency,
        "num_prompts": len(asked),
        "completed": len(asked),
        "duration": duration,
        "total_input_tokens": sum(inputs),
        "total_output_tokens": sum(outputs),
        "request_throughput": len(asked) / duration,
        "output_throughput": sum(outputs) / duration,
        "total_token_throughput": (sum(inputs) + sum(outputs)) / duration,
        **_statistics("ttft", [a.ttft for a in asked]),
        **_statistics("tpot", per_token),
        **({} if drafts else _statistics("itl", [gap for a in asked for gap in a.gaps])),
        **_statistics("e2el", [a.seconds for a in asked]),
        "round_ttft_ms": [
            statistics.median(a.rounds[index].timings.ttft for a in asked)
            for index in range(len(asked[0].rounds))
        ],
        "input_lens": inputs,
        "output_lens": outputs,
        "ttfts": [a.ttft for a in asked],
        "reuse": reuse.as_dict(),
    }


def _statistics(name: str, seconds: list[float]) -> dict[str, float]:
    ms = [1e3 * value for value in seconds] or [0.0]
    return {
        f"mean_{name}_ms": statistics.fmean(ms),
        f"median_{name}_ms": statistics.median(ms),
        f"std_{name}_ms": statistics.pstdev(ms),
        f"p99_{name}_ms": float(np.percentile(ms, 99)),
    }


def print_table(result: dict[str, Any]) -> None:
    """The result for people."""
    from rich.console import Console
    from rich.table import Table

    machine = result["hardware"]
    title = f"{result['model_id']}, {result['dtype']}, {machine['cpu']}"
    table = Table("", title=f"{title}, {machine['threads']} threads")
    for name in ("concurrency", "videos", "s", "tokens/s", "TTFT ms", "p99", "TPOT ms", "E2EL ms"):
        table.add_column(name, justify="right")
    parts = list(result["sweep"])
    for part in result["one_video"]:
        parts += [part["shared"], {**part["separate"], "strategy": part["strategy"] + " alone"}]
    for level in parts:
        table.add_row(
            level["strategy"],
            str(level["max_concurrency"]),
            str(level.get("num_videos", 1)),
            f"{level['duration']:.2f}",
            f"{level['output_throughput']:.1f}",
            f"{level['median_ttft_ms']:.0f}",
            f"{level['p99_ttft_ms']:.0f}",
            f"{level['median_tpot_ms']:.1f}",
            f"{level['median_e2el_ms']:.0f}",
        )
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)
    for found in result["comparisons"]:
        ratio = f"{found['throughput_ratio']:.2f} times the questions a second"
        console.print(f"{found['name']} against {found['baseline']}: {ratio}")
    for part in result["one_video"]:
        ratio = f"{part['time_ratio']:.2f} of the time of {part['num_requests']} alone"
        console.print(
            f"{part['strategy']}: {part['num_requests']} requests on one video take {ratio}"
        )
