"""The four strategies side by side: what a round keeps of the round before, and accuracy.

What is kept is a matter of planning alone: frames, frame pairs and prompts are laid out for random
videos and clues under the budgets of VideoChat-R1.5, and compared. Accuracy is that of `needle`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtts_rt.config import STRATEGIES, PerceptionConfig
from vtts_rt.evaluation import needle
from vtts_rt.models.checkpoint import base_folder
from vtts_rt.models.mrope import MropePositions, build_position_ids
from vtts_rt.models.registry import load_tokenizer, read_model_config, resolve_model
from vtts_rt.models.tokenizer import EncodedPrompt, Tokenizer, encode_prompt
from vtts_rt.perception.clue import Clue
from vtts_rt.perception.dialect import tagged
from vtts_rt.perception.plan import RoundHistory
from vtts_rt.perception.prompts import PromptTemplates
from vtts_rt.perception.region import RawSpan
from vtts_rt.perception.strategy import build_prompt, find_strategy, plan_round
from vtts_rt.runtime import Runtime
from vtts_rt.types import Geometry, Segment, StrategyName, VideoMetadata, require

ROUNDS = (1, 2, 3)
DURATIONS_SECONDS = (20, 60, 180, 600)
SOURCE_FPS = (24, 30)
HEIGHT, WIDTH = 360, 640
# A clue is one span: of 5 to 30 % of the video after round 1, half of that span after round 2.
SPAN_SHARE = (0.05, 0.30)
QUESTION = "What does the person do right after the red card has been put on the table?"
OPTIONS = ("They open the window", "They write a note", "They pour water", "They leave the room")
# Strategies that ask for the last round in the words of the others: one run gives all numbers of
# rounds (`evaluate`). The embedded model's cues are empty.
SHARED_WORDING: dict[str, tuple[StrategyName, ...]] = {"tiny": ("refresh", "append")}


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
    config = PerceptionConfig(max_rounds=len(clues) + 1).resolve(geometry)
    history: list[RoundHistory] = []
    conversation: EncodedPrompt | None = None
    contents: dict[tuple[Any, ...], int] = {}
    for index in range(config.max_rounds):
        plan = plan_round(strategy, config, [metadata], history, index)
        prompt = build_prompt(
            strategy,
            tokenizer.chat,
            PromptTemplates(),
            question=QUESTION,
            options=OPTIONS,
            context="",
            round_index=index,
            max_rounds=config.max_rounds,
            plan=plan,
            history=history,
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
    require("eval strategies", "num", num, num >= 1, ">= 1")
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


def accuracy(runtime: Runtime, *, seed: int = 0, num: int = 50) -> list[dict[str, Any]]:
    """Results of `needle.evaluate` on the same `num` held-out clips, one for each strategy."""
    results = []
    for strategy in STRATEGIES:
        result = needle.evaluate(
            runtime,
            seed=seed,
            num=num,
            rounds=ROUNDS,
            perception=PerceptionConfig(strategy=strategy),
            together=strategy in SHARED_WORDING.get(runtime.name, ()),
        )
        results.append(result)
    return results


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `vtts-rt eval strategies`."""
    parser.add_argument("--seed", type=int, default=0, help="of clues and clips (default 0)")
    parser.add_argument("--plans", type=int, default=20, help="random clues (default 20)")
    parser.add_argument("--num", type=int, default=20, help="clips (default 20; 0: plans only)")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """`vtts-rt eval strategies`; returns the exit status."""
    require("eval strategies", "num", args.num, args.num >= 0, ">= 0")
    tokenizer = load_tokenizer(args.model)
    geometry = read_model_config(base_folder(resolve_model(args.model))).geometry
    result: dict[str, Any] = {"task": "strategies", "seed": args.seed, "plans": args.plans}
    result["kept"] = kept(tokenizer, geometry, seed=args.seed, num=args.plans)
    result["accuracy"] = []
    if args.num:
        with Runtime.from_pretrained(args.model, dtype=args.dtype, device=args.device) as runtime:
            result["accuracy"] = accuracy(runtime, seed=args.seed, num=args.num)
    if args.json:
        print(json.dumps(result))
        return 0
    for name in ("kept", "accuracy"):
        lines = [
            {"strategy": outer["strategy"], **inner}
            for outer in result[name]
            for inner in outer.get("rounds", [outer])
        ]
        if lines:
            print("  ".join(f"{column:>16}" for column in lines[0]))
        for line in lines:
            print("  ".join(f"{value:>16}" for value in line.values()))
    return 0
