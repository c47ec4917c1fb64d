"""Three rounds, the vision tower and a prefill at released shapes, against transformers.

One set of random weights serves both sides on one device; the video is an array in memory, so that
no decoder is measured. Runs alternate; a cold run is cold for both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from op_cases.case import bench_dtype
from shapes import SHAPES, Twins, bytes_per_step, make_twins
from timing import median_seconds

from vtts_rt.bench import script
from vtts_rt.bench.frames import ArrayReader
from vtts_rt.bench.model import moving_frames
from vtts_rt.bench.peer import PublishedLoop, RoundSample
from vtts_rt.bench.rounds import PEERS, Run, samples
from vtts_rt.bench.setting import (
    OPTIONS,
    QUESTIONS,
    Setting,
    add_compute_flags,
    add_output_flags,
    check_compute,
    heading,
)
from vtts_rt.bench.summary import comparisons, sentence, summary
from vtts_rt.config import PARITIES, EngineConfig
from vtts_rt.models.attention import PagedKV, plan_calls, tensors_of, upload, with_tensors
from vtts_rt.models.base import ForwardBatch
from vtts_rt.models.registry import DTYPES
from vtts_rt.perception.strategy import find_strategy
from vtts_rt.runtime import Runtime
from vtts_rt.types import require

VIDEO_FPS = 8.0  # frames a second of the array; 60 s of 640x360 are 330 MB


def add_flags(parser: argparse.ArgumentParser) -> None:
    """See `--help`."""
    add = parser.add_argument
    add_compute_flags(
        parser,
        threads=torch.get_num_threads(),
        dtype_help="default: float32 on a CPU, else bfloat16",
    )
    add("--shape", default="7b", help=f"one of {', '.join(SHAPES)}")
    add("--strategy", default="official,append", help="ours, comma-separated")
    add("--rounds", type=int, default=3)
    add("--max-tokens", type=int, default=32, help="generated in every round")
    add("--repeats", type=int, default=3, help="runs of each side")
    add("--seconds", type=float, default=60.0, help="of video")
    add("--height", type=int, default=360, help="px; the width is 16 / 9 of it")
    add("--pairs", type=int, default=16, help="frame pairs of the vision tower's pass")
    add("--prefill", type=int, default=4096, help="tokens of the prefill")
    add("--parity", choices=PARITIES, default="release", help="whose numbers, on both sides")
    add_output_flags(parser)


def theme(args: argparse.Namespace) -> str:
    return f"device{args.shape}"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The result's JSON; arguments as `--help` says."""
    for name in ("rounds", "max_tokens", "repeats", "pairs", "prefill"):
        require("bench", name, getattr(args, name), getattr(args, name) >= 1, ">= 1")
    for name in args.strategy.split(","):
        find_strategy(name, "bench")
    check_compute(args)
    args.model = None
    dtype = DTYPES[args.dtype] if args.dtype else bench_dtype(args.device)
    twins = make_twins(args.shape, dtype, args.device)
    with torch.inference_mode():
        parts = {
            "vision": _vision(twins, args),
            "prefill": _prefill(twins, args),
        }
    runs = _rounds(twins, args)
    flags = (
        "device",
        "dtype",
        "shape",
        "parity",
        "strategy",
        "rounds",
        "max_tokens",
        "repeats",
        "seconds",
    )
    return {
        **heading("device", args, [*flags, "seconds", "height", "pairs", "prefill", "threads"]),
        "model_id": f"qwen2_5_vl-random-{args.shape}",
        "dtype": str(dtype).removeprefix("torch."),
        "attention_of_the_loop": "sdpa",
        "tokenizer_size": len(twins.hf_tokenizer),
        "decode_bytes": bytes_per_step(twins.model),
        "parts": parts,
        "contenders": {name: summary(found) for name, found in runs.items()},
        "comparisons": comparisons(
            runs,
            [(s, PEERS["hf"].label, PEERS["hf"].same_work(s)) for s in args.strategy.split(",")],
        ),
    }


def _vision(twins: Twins, args: argparse.Namespace) -> dict[str, Any]:
    """Features of frame pairs from patch rows, 20 x 36 patches each as of 280 x 504 px."""
    geometry = twins.model.geometry
    height, width = geometry.grid_hw((280, 504))
    rows = torch.randn(args.pairs * height * width, geometry.row_size).to(
        args.device, twins.model.dtype
    )
    grids = [(1, height, width)] * args.pairs
    grid = torch.tensor([(args.pairs, height, width)], device=args.device)
    sides = {
        "transformers": lambda: twins.hf_model.model.visual(rows, grid_thw=grid),
        "vtts_rt": lambda: twins.model.visual(rows, grids),
    }
    tokens = len(rows) // geometry.patches_per_token
    return {"pairs": args.pairs, "tokens": tokens, **_sides(sides, args)}


def _prefill(twins: Twins, args: argparse.Namespace) -> dict[str, Any]:
    """A prompt of text tokens through the language model, its last hidden state."""
    language, config, num = twins.model.language, twins.model.config.language, args.prefill
    device = torch.device(args.device)
    ids = torch.arange(num, device=device) % config.vocab_size
    embeds = language.embed_tokens(ids)
    positions = torch.arange(num, device=device).expand(3, num).contiguous()
    page_size = EngineConfig().page_size
    num_pages = -(-num // page_size)
    pages = torch.zeros(
        (config.num_hidden_layers, 2, num_pages, page_size, config.num_key_value_heads)
        + (config.head_dim,),
        dtype=twins.model.dtype,
        device=device,
    )
    calls = plan_calls([range(num_pages)], [num], [num], page_size)
    calls = with_tensors(calls, iter(upload(tensors_of(calls), device)))
    kv = PagedKV(pages, torch.arange(num, device=device), calls)
    last = torch.tensor([num - 1], device=device)
    batch = ForwardBatch(ids, None, positions, [0, num], kv, last)
    sides = {
        "transformers": lambda: twins.hf_model.model.language_model(
            inputs_embeds=embeds[None], position_ids=positions[:, None], use_cache=True
        ),
        "vtts_rt": lambda: language(batch),
    }
    return {"tokens": num, **_sides(sides, args)}


def _sides(sides: dict[str, Callable[[], Any]], args: argparse.Namespace) -> dict[str, Any]:
    seconds = median_seconds(sides, args.device, max(3, args.repeats))
    return {
        "median_ms": {name: 1e3 * median for name, median in seconds.items()},
        "speedup": seconds["transformers"] / seconds["vtts_rt"],
    }


def _rounds(twins: Twins, args: argparse.Namespace) -> dict[str, list[Run]]:
    """Cold runs by side, alternating; the first round of each, not measured, warms code up."""
    setting = Setting.of(args, args.seconds)
    height, width = args.height, args.height * 16 // 9
    num_frames = round(args.seconds * VIDEO_FPS)
    video = np.stack(list(moving_frames(num_frames, (height, width))))
    loop = PublishedLoop(twins.hf_model, twins.hf_tokenizer)
    runs: dict[str, list[Run]] = {}
    with Runtime(twins.model, twins.tokenizer, engine=EngineConfig(draft_tokens=0)) as runtime:

        def published(setting: Setting) -> list[RoundSample]:
            return loop.ask(
                ArrayReader(video, VIDEO_FPS),
                QUESTIONS[0],
                options=OPTIONS,
                perception=runtime.perception(setting.perception("official")),
                clues=setting.parsed_clues,
                max_tokens=setting.max_tokens,
            )

        def ours(strategy: Any) -> Callable[[Setting], list[RoundSample]]:
            def ask(setting: Setting) -> list[RoundSample]:
                runtime.clear_caches()
                return samples(
                    runtime.ask(
                        video,
                        QUESTIONS[0],
                        source_fps=VIDEO_FPS,
                        options=OPTIONS,
                        perception=setting.perception(strategy),
                        sampling=setting.sampling,
                        assume_clues=setting.clues,
                    )
                )

            return ask

        sides = {PEERS["hf"].label: published}
        sides |= {strategy: ours(strategy) for strategy in args.strategy.split(",")}
        for side in sides.values():
            side(replace(setting, rounds=1, max_tokens=4, clues=[]))
        for _ in range(args.repeats):
            for name, side in sides.items():
                began = time.perf_counter()
                rounds = side(setting)
                runs.setdefault(name, []).append(Run(time.perf_counter() - began, rounds))
                print(f"{name}: {runs[name][-1].seconds:.2f} s", file=sys.stderr)
    return runs


def print_table(result: dict[str, Any]) -> None:
    for name, part in result["parts"].items():
        times = ", ".join(f"{side} {ms:.1f} ms" for side, ms in part["median_ms"].items())
        print(f"{name}, {part['tokens']} tokens: {times}, {part['speedup']:.2f} times as fast")
    for name, contender in result["contenders"].items():
        later = statistics.median(look["tpot_ms"] for look in contender["rounds"])
        print(f"{name}: {contender['median_latency']:.2f} s, {later:.1f} ms a token")
    for comparison in result["comparisons"]:
        print(sentence(comparison))


if __name__ == "__main__":
    sys.exit(script(sys.modules[__name__]))
