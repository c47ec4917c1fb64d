"""`vtts-rt bench rounds`: the published loop and vLLM against ours, decoding included.

All sides answer the same question about the same file with the same weights, forced clues and
a fixed number of greedy tokens a round. Runs alternate, and a cold run is cold for all: a fresh
copy of the file, every cache cleared. Loading a model is not measured.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vtts_rt.bench.peer import PublishedLoop, RoundSample
from vtts_rt.bench.setting import (
    OPTIONS,
    QUESTIONS,
    Setting,
    add_setting_flags,
    heading,
    model_and_video,
    strategies_of,
)
from vtts_rt.bench.summary import PHASES, comparisons, print_table, ratios, summary, token_agreement
from vtts_rt.bench.vllm import VllmPeer
from vtts_rt.config import EngineConfig
from vtts_rt.models.qwen2_5_vl import load_model
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.runtime import Runtime
from vtts_rt.types import Parity, SamplingParams, Strategy, VideoMetadata, require

__all__ = ["PHASES", "add_flags", "measure", "print_table", "theme"]

PEERS = {"hf": "transformers loop", "vllm": "vllm loop", "vllm-append": "vllm append"}
SAME = ", same question again"
OTHER = ", another question"
# Random weights soon repeat one token, which every draft guesses; real text is not like that.
NO_DRAFTS: dict[str, dict[str, Any]] = {"without drafts": {"draft_tokens": 0}}
# What else is measured with --ablations -> settings of the engine.
SWITCHES: dict[str, dict[str, Any]] = {
    "without prefix cache": {"prefix_cache": False},
    "without vision cache": {"vision_cache_bytes": 0},
    "without frame store": {"frame_store_bytes": 0},
    "without fetching ahead": {"speculative_fetch": False},
    **NO_DRAFTS,
}
ABLATIONS = {
    **SWITCHES,
    "without any": {name: value for off in SWITCHES.values() for name, value in off.items()},
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `vtts-rt bench rounds`; the second names are those of `vllm bench latency`."""
    add_setting_flags(parser, strategy="official,append")
    add = parser.add_argument
    add("--peer", default="hf", help=f"whom to compare with: none, or of {', '.join(PEERS)}")
    add("--repeats", "--num-iters", type=int, default=3, help="runs of each side")
    add(
        "--ablations",
        action="store_true",
        help="ours also without each cache and overlap",
    )
    add("--vllm-python", type=Path, help="interpreter of vLLM's environment (bench/vllm_env.sh)")
    add("--vllm-compile", action="store_true", help="torch.compile in vLLM instead of eager mode")


def theme(args: argparse.Namespace) -> str:
    """What its result is filed under; results are compared only with those of their theme."""
    if args.ablations:
        return "ablations"
    return "rounds" if args.rounds == 3 else f"rounds{args.rounds}"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the result (the JSON file's content); arguments as `--help` says."""
    strategies = strategies_of(args)
    peers = [name for name in args.peer.split(",") if name not in ("", "none")]
    for name in peers:
        require("bench", "peer", name, name in PEERS, f"none, or of {', '.join(PEERS)}")
    for name in ("repeats", "threads", "max_tokens"):
        require("bench", name, getattr(args, name), getattr(args, name) >= 1, ">= 1")
    on_vllm = [name for name in peers if name.startswith("vllm")]
    python = args.vllm_python
    require("bench", "vllm_python", python, not on_vllm or python is not None, "set for vllm")
    torch.set_num_threads(args.threads)
    folder, video, metadata = model_and_video(args)
    setting = Setting.of(args, metadata.duration_seconds)
    engine = EngineConfig(threads=args.threads, draft_tokens=args.draft_tokens)
    with ExitStack() as stack:
        contenders = []
        if "hf" in peers:
            contenders.append(
                _hf(PublishedLoop.from_pretrained(folder, dtype=getattr(torch, args.dtype)))
            )
        vllm: VllmPeer | None = None
        if on_vllm:
            vllm = VllmPeer(
                folder, python, dtype=args.dtype, threads=args.threads, compiled=args.vllm_compile
            )
            stack.enter_context(vllm)
            contenders += [_vllm(vllm, name, metadata) for name in on_vllm]
        model = load_model(folder, dtype=getattr(torch, args.dtype), device="cpu")
        tokenizer = Tokenizer.from_pretrained(folder)
        full = stack.enter_context(Runtime(model, tokenizer, engine=engine))
        contenders += [_ours(full, strategy) for strategy in strategies]
        others = ABLATIONS if args.ablations else NO_DRAFTS if args.draft_tokens else {}
        for name, changed in others.items():
            runtime = Runtime(model, tokenizer, engine=replace(engine, **changed))
            stack.enter_context(runtime)
            contenders += [_ours(runtime, strategy, name) for strategy in strategies]
        ours = [contender.name for contender in contenders[len(peers) :]]
        follow_up = OTHER if args.ablations else SAME
        runs = _alternate(contenders, video, setting, args.repeats, follow_up)
        agreement = []
        if vllm is not None:
            agreement = _agreement(full, video, setting, runs)
    flags = ["peer", "strategy", "rounds", "max_tokens", "repeats", "threads", "dtype", "video"]
    flags += ["model", "draft_tokens", "ablations", "vllm_compile"]
    return {
        **heading("rounds", args, flags),
        "dtype": args.dtype,
        "setting": {
            **setting.as_dict("synthetic" if args.video == "synthetic" else video.name, metadata),
            "repeats": args.repeats,
            "draft_tokens": args.draft_tokens,
            "unmeasured": "loading the models; a warm-up of one round and two tokens a side",
        },
        "vllm": None if vllm is None else vllm.about,
        "contenders": {name: summary(samples) for name, samples in runs.items()},
        "comparisons": comparisons(runs),
        "ratios": ratios(runs, [PEERS[name] for name in peers], ours, SAME),
        "token_agreement": agreement,
    }


# -- the sides --------------------------------------------------------------------------------

Ask = Callable[[Path, Setting, str], list[RoundSample]]


@dataclass(slots=True)
class Run:
    """One question from opening the file to the last token, seconds, and its rounds."""

    seconds: float
    rounds: list[RoundSample]


@dataclass(slots=True)
class _Contender:
    """ask: rounds of one question about a file; forget: make the next question a cold one, None
    for a side that keeps nothing."""

    name: str
    ask: Ask
    forget: Callable[[], None] | None = None

    def run(self, video: Path, setting: Setting, question: str = QUESTIONS[0]) -> Run:
        began = time.perf_counter()
        rounds = self.ask(video, setting, question)
        return Run(time.perf_counter() - began, rounds)


def _hf(loop: PublishedLoop) -> _Contender:
    def ask(video: Path, setting: Setting, question: str) -> list[RoundSample]:
        return loop.ask(
            video,
            question,
            options=OPTIONS,
            perception=setting.perception("official"),
            clues=setting.parsed_clues,
            max_tokens=setting.max_tokens,
        )

    return _Contender(PEERS["hf"], ask)


def _vllm(peer: VllmPeer, name: str, metadata: VideoMetadata) -> _Contender:
    strategy: Strategy = "append" if name == "vllm-append" else "official"

    def ask(video: Path, setting: Setting, question: str) -> list[RoundSample]:
        return peer.ask(
            video,
            question,
            metadata=metadata,
            options=OPTIONS,
            perception=setting.perception(strategy, "release"),
            clues=setting.parsed_clues,
            max_tokens=setting.max_tokens,
        )

    return _Contender(PEERS[name], ask, peer.forget)


def _ours(runtime: Runtime, strategy: Strategy, ablation: str = "") -> _Contender:
    def ask(video: Path, setting: Setting, question: str) -> list[RoundSample]:
        return ask_ours(runtime, video, setting, question, strategy)

    name = f"{strategy} {ablation}".strip()
    return _Contender(name, ask, runtime.clear_caches)


def ask_ours(
    runtime: Runtime,
    video: Path,
    setting: Setting,
    question: str,
    strategy: Strategy,
    parity: Parity = "transformers",
) -> list[RoundSample]:
    """The rounds of one question asked of a Runtime."""
    answer = runtime.ask(
        str(video),
        question,
        options=OPTIONS,
        perception=setting.perception(strategy, parity),
        sampling=SamplingParams(max_tokens=setting.max_tokens, ignore_eos=True),
        assume_clues=setting.clues,
    )
    return [
        RoundSample(r.token_ids, list(r.frames), r.prompt_tokens, r.timings, r.reuse)
        for r in answer.rounds
    ]


def _alternate(
    contenders: list[_Contender], video: Path, setting: Setting, repeats: int, follow_up: str
) -> dict[str, list[Run]]:
    """Runs by name, one of each contender after the other: cold, then for those that keep
    something a warm one, the same question or another one about the same file.

    A copy of the file for each cold run: content hashes are remembered by file identity, and a
    cold run must pay for them.
    """
    runs: dict[str, list[Run]] = {}
    again = QUESTIONS[0] if follow_up == SAME else QUESTIONS[1]

    def note(name: str, run: Run) -> None:
        runs.setdefault(name, []).append(run)
        print(f"run {len(runs[name])}/{repeats} {name}: {run.seconds:.2f} s", file=sys.stderr)

    for contender in contenders:  # code, threads and allocator, not caches
        contender.run(video, Setting(rounds=1, max_tokens=2, clues=[]))
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for contender in contenders:
                path = Path(folder) / f"{repeat}-{contender.name}{video.suffix}"
                shutil.copyfile(video, path)
                if contender.forget is not None:
                    contender.forget()
                note(contender.name, contender.run(path, setting))
                if contender.forget is not None:
                    note(contender.name + follow_up, contender.run(path, setting, again))
                path.unlink()
    return runs


def _agreement(
    runtime: Runtime, video: Path, setting: Setting, runs: dict[str, list[Run]]
) -> list[dict[str, Any]]:
    """vLLM's tokens beside ours at the same positions (parity "release"), not measured."""
    found = []
    pairs: list[tuple[str, Strategy]] = [("vllm", "official"), ("vllm-append", "append")]
    for name, strategy in pairs:
        if PEERS[name] in runs:
            ours = ask_ours(runtime, video, setting, QUESTIONS[0], strategy, "release")
            theirs = runs[PEERS[name]][0].rounds
            found.append(token_agreement(PEERS[name], theirs, f"{strategy}, parity release", ours))
    return found
