"""The four strategies side by side: what a round keeps of the round before, and accuracy; filed.

python bench/bench_strategies.py [--model M] [--seed S] [--plans N] [--num N] [--device D]
[--dtype D] [--threads N] [--result-dir DIR]

What is kept is a matter of planning alone: frames, frame pairs and prompts are laid out for random
videos and clues under the budgets of VideoChat-R1.5, and compared. Accuracy is that of `needle`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtts_rt.bench.model import qwen_tokenizer
from vtts_rt.bench.setting import (
    add_compute_flags,
    check_compute,
    dtype_of,
    origin,
    results_name,
    write_result,
)
from vtts_rt.config import STRATEGIES, PerceptionConfig, RuntimeConfig
from vtts_rt.evaluation import needle
from vtts_rt.models.checkpoint import base_folder
from vtts_rt.models.mrope import MropePositions, build_position_ids
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.models.registry import (
    load_extras,
    load_tokenizer,
    read_model_config,
    resolve_model,
)
from vtts_rt.models.tokenizer import EncodedPrompt, Tokenizer, encode_prompt
from vtts_rt.perception.clue import Clue
from vtts_rt.perception.dialect import tagged
from vtts_rt.perception.layout import labelled_pairs
from vtts_rt.perception.plan import RoundHistory
from vtts_rt.perception.prompts import PromptTemplates, prompts_from_dict
from vtts_rt.perception.region import RawSpan
from vtts_rt.perception.strategy import build_prompt, find_strategy, plan_round
from vtts_rt.runtime import Runtime
from vtts_rt.types import Geometry, Segment, StrategyName, VideoMetadata, require

RESULTS = Path(__file__).resolve().parent / "results"

ROUNDS = (1, 2, 3)
DURATIONS_SECONDS = (20, 60, 180, 600)
SOURCE_FPS = (24, 30)
HEIGHT, WIDTH = 360, 640
# A clue is one span: of 5 to 30 % of the video after round 1, half of that span after round 2.
SPAN_SHARE = (0.05, 0.30)
QUESTION = "What does the person do right after the red card has been put on the table?"
OPTIONS = ("They open the window", "They write a note", "They pour water", "They leave the room")


@dataclass(frozen=True, slots=True)
class _Context:
    """All that the model has before it in one round.

    frames, pairs: what it sees, pairs with box and size. tokens: (N, 5) int64, for each token of
    the prompt and the answer its id, the content of a visual token (0 for text) and its M-RoPE
    position. num_prompt: tokens of the prompt.
    """

    frames: frozenset[int]
    pairs: frozenset[tuple[Any, ...]]
    tokens: NDArray[np.int64]
    num_prompt: int


def _contexts(
    strategy: StrategyName,
    metadata: VideoMetadata,
    clues: Sequence[RawSpan],
    tokenizer: Tokenizer,
    geometry: Geometry,
) -> Iterator[_Context]:
    """One context a round; the answer of every round is its clue."""
    config = PerceptionConfig(strategy=strategy, max_rounds=len(clues) + 1).resolve(geometry)
    history: list[RoundHistory] = []
    conversation: EncodedPrompt | None = None
    contents: dict[tuple[Any, ...], int] = {}
    for index in range(config.max_rounds):
        plan = plan_round(strategy, config, [metadata], history, index)
        words = PromptTemplates()
        prompt = build_prompt(
            config, tokenizer.chat, words, plan, history, question=QUESTION, options=OPTIONS
        )
        encoded = encode_prompt(tokenizer, prompt)
        if conversation is not None:
            encoded = conversation + encoded
        answer = ""
        if index < len(clues):
            start, end = clues[index]
            clue = tagged("glue", f"[({start:.1f}, {end:.1f})]")
            answer = tagged("think", "") + tagged("answer", "A") + clue
            history.append(RoundHistory(plan, Clue(answer, spans=(clues[index],))))
        answered = encoded.extended(tokenizer.encode(answer))
        segments = [span.segment for span in encoded.spans]
        yield _Context(
            frozenset(frame for segment in segments for frame in segment.frame_indices),
            frozenset(key for segment in segments for key in _keys(segment)),
            _tokens(answered, contents),
            len(encoded),
        )
        if find_strategy(strategy).continues:
            conversation = answered


def _keys(segment: Segment) -> list[tuple[Any, ...]]:
    """What the features of a frame pair are cached under, within one video."""
    return [(p.frame_a, p.frame_b, segment.box, segment.resized_hw) for p in segment.pairs]


def _tokens(encoded: EncodedPrompt, contents: dict[tuple[Any, ...], int]) -> NDArray[np.int64]:
    tokens = np.zeros((len(encoded), 5), np.int64)
    tokens[:, 0] = encoded.token_ids
    for span in encoded.spans:
        per_pair = span.segment.tokens_per_pair
        numbers = [contents.setdefault(key, len(contents) + 1) for key in _keys(span.segment)]
        place = slice(span.start, span.start + span.length)
        tokens[place, 1] = np.repeat(numbers, per_pair) * per_pair + np.tile(
            np.arange(per_pair), len(numbers)
        )
    tokens[:, 2:] = build_position_ids(encoded, MropePositions("release", 2.0)).numpy().T
    return tokens


def _common_prefix(before: NDArray[np.int64], now: NDArray[np.int64]) -> int:
    shorter = min(len(before), len(now))
    differs = (before[:shorter] != now[:shorter]).any(axis=1)
    return int(differs.argmax()) if differs.any() else shorter


def kept(
    tokenizer: Tokenizer, geometry: Geometry, *, seed: int = 0, num: int = 10
) -> list[dict[str, Any]]:
    """What each later round keeps of the round before, by strategy and duration.

    geometry: of the model whose tokens are counted.
    num: random clues for each duration and source rate, the same for every strategy.
    Returns a list of {"strategy", "duration_seconds", "round", "frames", "pairs", "prefix",
    "tokens"}: means over clues and rates of the share of source frames, of frame pairs with box
    and size, and of leading prompt tokens with equal id, picture and position; and of the number
    of prompt tokens. A prompt of `append` holds all earlier rounds with their answers.
    """
    require("bench_strategies", "plans", num, num >= 1, ">= 1")
    rows = []
    for strategy in STRATEGIES:
        for duration in DURATIONS_SECONDS:
            shares = np.array(
                [
                    _shares(list(_contexts(strategy, video, clues, tokenizer, geometry)))
                    for video in _videos(duration)
                    for clues in _clues(np.random.default_rng([seed, duration]), duration, num)
                ]
            ).mean(axis=0)
            for index, (frames, pairs, prefix, tokens) in enumerate(shares.tolist()):
                rows.append(
                    {
                        "strategy": strategy,
                        "duration_seconds": duration,
                        "round": index + 2,
                        "frames": round(frames, 4),
                        "pairs": round(pairs, 4),
                        "prefix": round(prefix, 4),
                        "tokens": round(tokens, 1),
                    }
                )
    return rows


def _shares(contexts: Sequence[_Context]) -> list[tuple[float, float, float, int]]:
    """(frames, pairs, prefix, tokens) of every round after the first."""
    return [
        (
            len(now.frames & before.frames) / len(now.frames),
            len(now.pairs & before.pairs) / len(now.pairs),
            _common_prefix(before.tokens, now.tokens[: now.num_prompt]) / now.num_prompt,
            now.num_prompt,
        )
        for before, now in zip(contexts, contexts[1:], strict=False)
    ]


def _videos(duration: int) -> list[VideoMetadata]:
    return [
        VideoMetadata("random", duration * fps, float(fps), float(duration), HEIGHT, WIDTH, "none")
        for fps in SOURCE_FPS
    ]


def _clues(rng: np.random.Generator, duration: int, num: int) -> list[list[RawSpan]]:
    """`num` times a span, and half of it."""
    clues = []
    for _ in range(num):
        length = duration * rng.uniform(*SPAN_SHARE)
        start = rng.uniform(0.0, duration - length)
        inner = start + rng.uniform(0.0, length / 2)
        clues.append([(start, start + length), (inner, inner + length / 2)])
    return clues


def one_run_is_enough(strategy: StrategyName, templates: PromptTemplates) -> bool:
    """Whether a run of most rounds gives the result of fewer (`together` of `needle.evaluate`): the
    layout ends with a cue, and that of the last round says what the others say."""
    same_cue = templates.cue_look == templates.cue_final
    return same_cue and find_strategy(strategy).lay_out is labelled_pairs


def accuracy(
    runtime: Runtime, templates: PromptTemplates, *, seed: int = 0, num: int = 50
) -> list[dict[str, Any]]:
    """Results of `needle.evaluate` on the same `num` held-out clips, one for each strategy.
    templates: the model's wording."""
    return [
        needle.evaluate(
            runtime,
            seed=seed,
            num=num,
            rounds=ROUNDS,
            perception=PerceptionConfig(strategy=strategy),
            together=one_run_is_enough(strategy, templates),
        )
        for strategy in STRATEGIES
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="tiny, a directory, or a hub id")
    parser.add_argument("--seed", type=int, default=30000, help="of clues and clips")
    parser.add_argument("--plans", type=int, default=50, help="random clues")
    parser.add_argument("--num", type=int, default=80, help="clips; 0: plans only")
    parser.add_argument("--result-dir", type=Path, default=RESULTS)
    add_compute_flags(parser, threads=1)
    args = parser.parse_args()
    check_compute(args)
    require("bench_strategies", "num", args.num, args.num >= 0, ">= 0")
    folder = resolve_model(args.model)
    if args.model == "tiny":  # with the tokenizer of the models whose budgets these are
        tokenizer = Tokenizer(qwen_tokenizer(), CHAT)
    else:
        tokenizer = load_tokenizer(args.model)
    geometry = read_model_config(base_folder(folder)).geometry
    dtype = dtype_of(args, args.model)
    result = {
        **origin(args.threads),
        "dtype": dtype,
        "task": "strategies",
        "seed": args.seed,
        "plans": args.plans,
        "num": args.num,
        "kept": kept(tokenizer, geometry, seed=args.seed, num=args.plans),
        "accuracy": [],
    }
    if args.num:
        templates = prompts_from_dict(load_extras(folder).get("prompts", {}))
        with Runtime.from_pretrained(
            args.model,
            dtype=dtype,
            device=args.device,
            config=RuntimeConfig(threads=args.threads),
        ) as runtime:
            result["accuracy"] = accuracy(runtime, templates, seed=args.seed, num=args.num)
    write_result(args.result_dir / results_name("strategies"), result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
