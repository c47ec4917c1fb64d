"""Parity `transformers`: tokens and log-probs are those of transformers' generate on its own
processor, over long spans and over mixes of images and videos."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_tools import WHOLE, Frames, encode, make_engine, pair, run
from transformers_tools import Clip, Generation, Image, TransformersPeer
from utils import resolved, tiny_checkpoint, tiny_qwen2_vl, tiny_qwen3_vl

from vtts_rt import PerceptionConfig
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.models.registry import load_model
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.rounds.results import RoundResult
from vtts_rt.runtime import Runtime
from vtts_rt.types import SamplingParams, Segment

MAX_TOKENS = 12
PIXEL = 28 * 28
ATOL = 2e-4  # of a log-prob: float32 sums of other orders


@pytest.fixture(scope="module")
def peer(checkpoint: Path) -> TransformersPeer:
    return TransformersPeer(checkpoint)


@pytest.fixture(scope="module")
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    with Runtime.from_pretrained(checkpoint, dtype="float32", device="cpu") as runtime:
        yield runtime


def pixels(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, (*shape, 3), dtype=np.uint8)


def equal(ours: RoundResult, theirs: Generation) -> None:
    assert ours.prompt_tokens == theirs.num_prompt_tokens
    told = [s.seconds_per_grid for s in ours.plan.segments if not s.is_image]
    if theirs.seconds_per_grid is not None:
        assert told == pytest.approx(theirs.seconds_per_grid, rel=1e-6)
    assert ours.token_ids == theirs.token_ids
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=ATOL)


# Seconds -> clues after rounds 1 and 2; in the last the number of frames differs from the nominal.
SPANS: dict[float, list[Any]] = {
    30.0: [[[4, 8]], [[5, 6]]],
    100.0: [[[10, 50]], [[20, 30], [25, 40]]],
    600.0: [[[0, 300]], []],
    1800.0: [[[900, 1000]], [[10, 11], [500, 501], [1500, 1501], [1700, 1701]]],
}


@pytest.mark.parametrize("seconds", SPANS)
def test_official_is_transformers_generate(
    peer: TransformersPeer, runtime: Runtime, seconds: float
) -> None:
    official(peer, runtime, seconds)


def official(peer: TransformersPeer, runtime: Runtime, seconds: float, **more: Any) -> None:
    num_frames, clues = 300, SPANS[seconds]
    video = pixels(np.random.default_rng(int(seconds)), num_frames, 40, 60)
    looks = PerceptionConfig(
        parity="transformers",
        max_frames=32,
        min_pixels=4 * PIXEL,
        total_pixels=96 * PIXEL,
        **more,
    )
    config = runtime.perception(looks)
    answer = runtime.ask(
        video,
        "Which pattern is on the red card?",
        source_fps=num_frames / seconds,
        options=["red green", "blue yellow"],
        perception=config,
        sampling=SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True),
        assume_clues=clues,
    )
    assert len(answer.rounds) == 3 and answer.as_dict()["parity"] == "transformers"
    for result in answer.rounds:
        num = len(result.frames)
        cap = max(min(768 * PIXEL, config.total_pixels / num * 2), int(4 * PIXEL * 1.05))
        clip = Clip(
            video[list(result.frames)],
            result.frames,
            num_frames,
            num_frames / seconds,
            (4 * PIXEL, int(cap)),
        )
        equal(result, peer.generate(result.prompt, [clip], MAX_TOKENS))
    assert len(answer.rounds[0].frames) == 32


def mix(peer: TransformersPeer, runtime: Runtime, seed: int, least_px: int = 20) -> None:
    """One question about one to four random images and videos, of sides of least_px at least."""
    rng, dice = np.random.default_rng(seed), random.Random(seed)
    looks = PerceptionConfig(
        parity="transformers",
        max_rounds=1,
        sample_fps=dice.choice([0.02, 0.1, 0.5, 2.0]),
        max_frames=dice.choice([8, 16]),
        min_pixels=2 * PIXEL if least_px == 20 else 1,
        total_pixels=768 * 32 * 32 * 32,  # every frame and image may have 768 tokens
    )
    config = runtime.perception(looks)
    source_fps = dice.choice([0.05, 0.5, 10.0, 29.97])
    videos: list[np.ndarray] = []
    for _ in range(dice.randint(1, 4)):
        height, width = dice.randint(least_px, 120), dice.randint(least_px, 120)
        if dice.random() < 0.4:
            videos.append(pixels(rng, height, width))
        else:
            videos.append(pixels(rng, dice.randint(2, 40), height, width))
    answer = runtime.ask(
        videos,
        dice.choice(["which?", "What is on the red card, and why? " * 8]),
        source_fps=source_fps,
        perception=config,
        sampling=SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True),
    )
    (result,) = answer.rounds
    size = (config.min_pixels, 768 * config.geometry.token_px**2)
    media: list[Clip | Image] = []
    for video, segment in zip(videos, result.plan.segments, strict=True):
        if segment.is_image:
            media.append(Image(video, size))
            continue
        # An odd number of frames is shown with the last one twice.
        shown = list(dict.fromkeys(segment.frame_indices))
        media.append(Clip(video[shown], shown, len(video), source_fps, size))
    equal(result, peer.generate(result.prompt, media, MAX_TOKENS))


@pytest.mark.parametrize("seed", range(6))
def test_mixes_of_images_and_videos(peer: TransformersPeer, runtime: Runtime, seed: int) -> None:
    mix(peer, runtime, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 206))
def test_many_mixes_of_images_and_videos(
    peer: TransformersPeer, runtime: Runtime, seed: int
) -> None:
    mix(peer, runtime, seed)


def test_qwen2_vl_is_transformers_generate(tmp_path: Path) -> None:
    """Its temporal positions count pairs: the same looks over any time."""
    folder = tiny_checkpoint(tmp_path, tiny_qwen2_vl)
    peer = TransformersPeer(folder)
    with Runtime.from_pretrained(folder, device="cpu") as runtime:
        official(peer, runtime, 600.0)
        for seed in range(3):
            mix(peer, runtime, seed)


def test_qwen3_vl_is_transformers_generate(tmp_path: Path) -> None:
    """Its processor writes every pair behind its time, in one of two ways."""
    folder = tiny_checkpoint(tmp_path, tiny_qwen3_vl)
    peer = TransformersPeer(folder)
    with Runtime.from_pretrained(folder, device="cpu") as runtime:
        official(peer, runtime, 600.0)
        official(peer, runtime, 100.0, video_wrapper="legacy")
        for seed in range(3):
            # Smaller ones keep their aspect there; one lower bound cannot fit clips of all lengths.
            mix(peer, runtime, seed, least_px=32)


@pytest.mark.slow
@pytest.mark.parametrize("family", [tiny_qwen2_vl, tiny_qwen3_vl])
def test_many_mixes_of_other_families(family: Any, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, family)
    peer = TransformersPeer(folder)
    with Runtime.from_pretrained(folder, device="cpu") as runtime:
        for seed in range(3, 60):
            mix(peer, runtime, seed, least_px=32)


def test_a_conversation_goes_on_as_one_sequence(checkpoint: Path, peer: TransformersPeer) -> None:
    """A prompt, an answer, another prompt: positions are those of the whole sequence, and KV of
    the answer is used again."""
    model, tokenizer = load_model(checkpoint), Tokenizer.from_pretrained(checkpoint, CHAT)
    engine = make_engine(model, tokenizer, kv_bytes=1 << 22)
    frames = Frames()
    parts, clips = [], []
    for first in (0, 20):
        pairs = [pair(first + i, first + i + 1) for i in range(0, 20, 2)]
        parts.append(Segment(tuple(pairs), WHOLE, (56, 84), GEOMETRY, seconds_per_grid=20.0))
        shown = [frames.frame(first + i) for i in range(20)]
        clips.append(Clip(np.stack(shown), range(20), 20, 0.1, (6 * PIXEL, 6 * PIXEL)))
    texts = ["look <|vision_start|><|video_pad|><|vision_end|> say"] * 2
    one = encode(tokenizer, "look ", parts[0], " say")
    first = run(engine, one, frames, parity="transformers")
    both = one.extended(first.token_ids) + encode(tokenizer, "look ", parts[1], " say")
    second = run(engine, both, frames, parity="transformers")
    inputs, more = (peer.inputs(t, [c]) for t, c in zip(texts, clips, strict=True))
    assert first.token_ids == peer.continued(inputs, 6).token_ids
    theirs = peer.continued(peer.appended(inputs, first.token_ids, more), 6)
    assert second.num_prompt_tokens == theirs.num_prompt_tokens
    assert second.token_ids == theirs.token_ids
    assert second.logprobs == pytest.approx(theirs.logprobs, abs=ATOL)
    assert second.reuse.tokens_reused == len(one) + len(first.token_ids) - 1


def test_positions_of_the_release_give_other_tokens(
    peer: TransformersPeer, runtime: Runtime
) -> None:
    """The comparison can fail: over 1,800 s the release's positions are told apart."""
    video = pixels(np.random.default_rng(0), 32, 40, 60)
    config = resolved(max_rounds=1, max_frames=32, min_pixels=4 * PIXEL)
    answer = runtime.ask(
        video,
        "which?",
        source_fps=32 / 1800,
        perception=config,
        sampling=SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True),
    )
    (result,) = answer.rounds
    clip = Clip(video, range(32), 32, 32 / 1800, (4 * PIXEL, 768 * PIXEL))
    theirs = peer.generate(result.prompt, [clip], MAX_TOKENS)
    assert result.prompt_tokens == theirs.num_prompt_tokens
    assert max(abs(a - b) for a, b in zip(result.logprobs, theirs.logprobs, strict=True)) > 1e-2
