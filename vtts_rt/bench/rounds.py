"""`vtts-rt bench rounds`: the published loop and vLLM against ours, decoding included.

All sides answer the same question about the same file with the same weights, pixel budgets, forced
clues and a fixed number of greedy tokens a round. Runs alternate, and a cold run is cold for all: a
fresh copy of the file, every cache cleared. Loading a model is not measured.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vtts_rt.bench.peer import PublishedLoop, RoundSample
from vtts_rt.bench.setting import (
    OPTIONS,
    QUESTIONS,
    Setting,
    add_setting_flags,
    check_compute,
    heading,
    model_and_video,
    strategies_of,
    video_name,
)
from vtts_rt.bench.summary import PHASES, Run, comparisons, print_table, summary
from vtts_rt.checkout import source_module
from vtts_rt.config import EngineConfig, RuntimeConfig
from vtts_rt.models.checkpoint import load_extras
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.registry import DTYPES, load_model
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.perception.prompts import PromptTemplates, load_prompts, prompts_from_dict
from vtts_rt.perception.strategy import find_strategy
from vtts_rt.rounds.results import Answer
from vtts_rt.runtime import Runtime
from vtts_rt.types import StrategyName, VideoMetadata, require

__all__ = ["PHASES", "Run", "add_flags", "measure", "print_table", "theme"]


class Peer(NamedTuple):
    """label: in results. strategy: shows what the peer shows: equal frames, sizes and prompts."""

    label: str
    strategy: StrategyName

    def same_work(self, strategy: StrategyName) -> bool:
        return find_strategy(strategy) is find_strategy(self.strategy)


PEERS = {
    "hf": Peer("transformers loop", "official"),
    "vllm": Peer("vllm loop", "official"),
    "vllm-append": Peer("vllm append", "append"),
}
SAME = ", same question again"
OTHER = ", another question"
# Random weights soon repeat one token, which every draft guesses; real text is not like that. So
# no comparison rests on drafts: what they save has rows of its own.
DRAFTS = "with drafts"
# What is measured with --ablations -> settings of the engine or of the runtime.
SWITCHES: dict[str, dict[str, Any]] = {
    "without prefix cache": {"prefix_cache": False},
    "without vision cache": {"vision_cache_bytes": 0},
    "without frame store": {"frame_store_bytes": 0},
    "without fetching ahead": {"speculative_fetch": False},
}
ABLATIONS = {
    **SWITCHES,
    "without any": {name: value for off in SWITCHES.values() for name, value in off.items()},
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `vtts-rt bench rounds`; the second names are those of `vllm bench latency`."""
    drafts = EngineConfig().draft_tokens
    add_setting_flags(parser, strategy="official,append", draft_tokens=drafts, several_dtypes=True)
    add = parser.add_argument
    add("--repeats", "--num-iters", type=int, default=3, help="runs of each side")
    add(
        "--ablations",
        action="store_true",
        help="ours also without each cache and overlap",
    )
    add_peer_flags(parser, "hf")


def add_peer_flags(parser: argparse.ArgumentParser, default: str) -> None:
    """--peer, which `peers_of` reads, and how vLLM runs."""
    add = parser.add_argument
    add("--peer", default=default, help=f"whom to compare with: none, or of {', '.join(PEERS)}")
    add("--vllm-python", type=Path, help="interpreter of vLLM's environment (bench/vllm_env.sh)")
    add("--vllm-compile", action="store_true", help="torch.compile in vLLM instead of eager mode")


def peers_of(args: argparse.Namespace) -> list[str]:
    """--peer, checked. ValueError for an unknown one, RuntimeError where vLLM's interpreter is
    missing."""
    peers = [name for name in args.peer.split(",") if name not in ("", "none")]
    for name in peers:
        require("bench", "peer", name, name in PEERS, f"none, or of {', '.join(PEERS)}")
    if any(name.startswith("vllm") for name in peers) and args.vllm_python is None:
        environment = source_module("the peers on vLLM", "vllm_peer.py").ENVIRONMENT
        raise RuntimeError(f"bench: --vllm-python is missing: {environment}")
    return peers


def vllm_peer(args: argparse.Namespace, folder: Path, dtype: str) -> Any:
    """A `VllmPeer` (bench/vllm_peer.py) as the flags say; a context manager."""
    return source_module("the peers on vLLM", "vllm_peer.py").VllmPeer(
        folder,
        args.vllm_python,
        dtype=dtype,
        device=args.device,
        threads=args.threads,
        compiled=args.vllm_compile,
    )


def asked_alike(
    runtime: Runtime, setting: Setting, strategy: StrategyName, words: PromptTemplates
) -> dict[str, Any]:
    """Arguments of a peer's `ask`: the budgets and words that `runtime` gives ours. words: of the
    checkpoint."""
    perception = runtime.perception(setting.perception(strategy))
    if perception.prompts:
        words = load_prompts(perception.prompts, base=words)
    return {
        "options": OPTIONS,
        "perception": perception,
        "clues": setting.parsed_clues,
        "max_tokens": setting.max_tokens,
        "templates": words,
    }


def words_of(folder: Path) -> PromptTemplates:
    """The words that a checkpoint brings along."""
    return prompts_from_dict(load_extras(folder).get("prompts", {}))


def theme(args: argparse.Namespace) -> str:
    """What its result is filed under; results are compared only with those of their theme."""
    if args.ablations:
        return "ablations"
    return "rounds" if args.rounds == 3 else f"rounds{args.rounds}"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the result (the JSON file's content); arguments as `--help` says."""
    strategies = strategies_of(args)
    peers = peers_of(args)
    dtypes = args.dtype.split(",") if args.dtype else ["auto"]
    for name in dtypes:
        ok = name in DTYPES or args.dtype is None
        require("bench", "dtype", name, ok, f"of {', '.join(DTYPES)}")
    for name in ("repeats", "max_tokens"):
        require("bench", name, getattr(args, name), getattr(args, name) >= 1, ">= 1")
    check_compute(args)
    folder, video, metadata = model_and_video(args)
    setting = Setting.of(args, metadata.duration_seconds)
    bench = _Bench(args, folder, video, metadata, setting, strategies, peers)
    runs = [bench.measured(dtype) for dtype in dtypes]
    flags = ["peer", "strategy", "rounds", "max_tokens", "repeats", "device", "dtype", "threads"]
    flags += ["footage", "video", "model", "parity", "draft_tokens", "ablations", "vllm_compile"]
    return {
        **heading("rounds", args, flags),
        "setting": {
            **setting.as_dict(video_name(args), metadata, bench.resolved),
            "repeats": args.repeats,
            "draft_tokens": args.draft_tokens,
            "unmeasured": "loading the models; a warm-up of one round and two tokens a side",
        },
        "vllm": bench.about_vllm,
        "runs": runs,
    }


class _Bench:
    """What is measured in every dtype: all sides on one file. resolved: the perception of the
    first strategy, with the model's own budgets; about_vllm: how vLLM ran."""

    def __init__(
        self,
        args: argparse.Namespace,
        folder: Path,
        video: Path,
        metadata: VideoMetadata,
        setting: Setting,
        strategies: list[StrategyName],
        peers: list[str],
    ) -> None:
        self._args, self._folder, self._video = args, folder, video
        self._metadata, self._setting = metadata, setting
        self._strategies, self._peers = strategies, peers
        self._words = words_of(folder)
        self.resolved = setting.perception(strategies[0]).resolve(GEOMETRY)
        self.about_vllm: dict[str, Any] | None = None

    def measured(self, dtype: str) -> dict[str, Any]:
        """Runs of all sides in one dtype ("auto": the checkpoint's own), summed up."""
        args, peers = self._args, self._peers
        with ExitStack() as stack:
            ours = list(self._ours(stack, dtype))
            runtime = ours[0].runtime
            assert runtime is not None
            self.resolved = runtime.perception(self._setting.perception(self._strategies[0]))
            kind = str(runtime.engine.model.dtype).removeprefix("torch.")
            sides = [*self._theirs(stack, runtime, kind), *ours]
            follow_up = OTHER if args.ablations else SAME
            runs = _alternate(sides, self._video, self._setting, args.repeats, follow_up)
        compared = [
            (strategy, PEERS[peer].label, PEERS[peer].same_work(strategy))
            for peer in peers
            for strategy in self._strategies
        ]
        return {
            "dtype": kind,
            "contenders": {name: summary(samples) for name, samples in runs.items()},
            "comparisons": comparisons(runs, compared),
        }

    def _ours(self, stack: ExitStack, dtype: str) -> Iterator[_Contender]:
        args = self._args
        model = load_model(self._folder, dtype=dtype, device=args.device)
        tokenizer = Tokenizer.from_pretrained(self._folder, model.chat)
        drafts = {DRAFTS: {"draft_tokens": args.draft_tokens}} if args.draft_tokens else {}
        configs: Any = EngineConfig(draft_tokens=0), RuntimeConfig(threads=args.threads)
        for name, changed in {"": {}, **(ABLATIONS if args.ablations else {}), **drafts}.items():
            engine, config = (
                replace(c, **{k: v for k, v in changed.items() if hasattr(c, k)}) for c in configs
            )
            runtime = stack.enter_context(
                Runtime(model, tokenizer, templates=self._words, engine=engine, config=config)
            )
            for strategy in self._strategies:
                yield _our_side(runtime, strategy, f"{strategy} {name}".strip())

    def _theirs(self, stack: ExitStack, runtime: Runtime, dtype: str) -> Iterator[_Contender]:
        """The peers, with the budgets and words that `runtime` gives ours."""
        args = self._args
        vllm: Any = None
        for name in self._peers:
            if name == "hf":
                loop = PublishedLoop.from_pretrained(
                    self._folder, dtype=DTYPES[dtype], device=args.device
                )
                yield self._peer(name, loop.ask, None, runtime)
                continue
            if vllm is None:
                vllm = stack.enter_context(vllm_peer(args, self._folder, dtype))
                self.about_vllm = vllm.about
            yield self._peer(name, partial(vllm.ask, metadata=self._metadata), vllm.forget, runtime)

    def _peer(
        self,
        name: str,
        asked: Callable[..., list[RoundSample]],
        forget: Callable[[], None] | None,
        runtime: Runtime,
    ) -> _Contender:
        def ask(video: Path, setting: Setting, question: str) -> list[RoundSample]:
            alike = asked_alike(runtime, setting, PEERS[name].strategy, self._words)
            return asked(video, question, **alike)

        return _Contender(PEERS[name].label, ask, forget)


# -- the sides --------------------------------------------------------------------------------

Ask = Callable[[Path, Setting, str], list[RoundSample]]


@dataclass(slots=True)
class _Contender:
    """ask: rounds of one question about a file; forget: make the next question a cold one, None
    for a side that keeps nothing; runtime: of ours."""

    name: str
    ask: Ask
    forget: Callable[[], None] | None = None
    runtime: Runtime | None = None

    def run(self, video: Path, setting: Setting, question: str = QUESTIONS[0]) -> Run:
        began = time.perf_counter()
        rounds = self.ask(video, setting, question)
        return Run(time.perf_counter() - began, rounds)


def _our_side(runtime: Runtime, strategy: StrategyName, name: str) -> _Contender:
    def ask(video: Path, setting: Setting, question: str) -> list[RoundSample]:
        answer = runtime.ask(
            str(video),
            question,
            options=OPTIONS,
            perception=setting.perception(strategy),
            sampling=setting.sampling,
            assume_clues=setting.clues,
        )
        return samples(answer)

    return _Contender(name, ask, runtime.clear_caches, runtime)


def samples(answer: Answer) -> list[RoundSample]:
    """The rounds of an answer of a Runtime."""
    return [
        RoundSample(
            r.token_ids,
            list(r.frames),
            [segment.resized_hw for segment in r.plan.segments],
            r.prompt_tokens,
            r.timings,
            r.reuse,
        )
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
        contender.run(video, replace(setting, rounds=1, max_tokens=2, clues=[]))
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
