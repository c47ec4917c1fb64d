"""`official` with the positions of transformers 5 is, token for token, the published loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torchvision_shim

from vtts_rt.bench.model import moving_frames
from vtts_rt.bench.peer import PublishedLoop, RoundSample
from vtts_rt.config import PARITIES, ResolvedPerception
from vtts_rt.perception.clue import clue_from_json
from vtts_rt.perception.plan import RoundHistory
from vtts_rt.perception.sizing import smart_nframes
from vtts_rt.perception.strategy import plan_round
from vtts_rt.runtime import Answer, Runtime
from vtts_rt.types import SamplingParams
from vtts_rt.video import open_video
from vtts_rt.video.writer import write_video

torchvision_shim.install()

QUESTION = "Which pattern is on the red card?"
OPTIONS = ("red green", "blue yellow")
MAX_TOKENS = 12
# Clues after rounds 1 and 2, and what differs from `perception` below.
CASES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "narrowing": ([[[4, 8]], [[5, 6]]], {}),
    "overlapping": ([[[0, 1], [0.5, 3]], [[2, 3], [1, 2], [3, 4]]], {}),
    "dense": ([[[1, 2], [2, 3], [3, 4]], []], {"sample_fps": 3.0}),
    "beyond the end": ([[[11.5, 30]], [[5, 5.2]]], {"sample_fps": 0.3}),
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12.1 s at 10 frames a second, large enough to be resized down."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, moving_frames(121, (100, 150)), source_fps=10)
    return path


@pytest.fixture(scope="module")
def loop(checkpoint: Path) -> PublishedLoop:
    return PublishedLoop.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    with Runtime.from_pretrained(checkpoint, dtype="float32", device="cpu") as runtime:
        yield runtime


def perception(**overrides: Any) -> ResolvedPerception:
    settings: dict[str, Any] = {
        "strategy": "official",
        "max_rounds": 3,
        "sample_fps": 2.0,
        "min_pixels": 4 * 28 * 28,
        "total_pixels": 96 * 28 * 28,
        "parity": "transformers",
    }
    return ResolvedPerception(**{**settings, **overrides})


def both(
    loop: PublishedLoop, runtime: Runtime, clip: Path, clues: list[Any], config: ResolvedPerception
) -> tuple[list[RoundSample], Answer]:
    theirs = loop.ask(
        clip,
        QUESTION,
        options=OPTIONS,
        perception=config,
        clues=[clue_from_json(clue) for clue in clues],
        max_tokens=MAX_TOKENS,
    )
    ours = runtime.ask(
        str(clip),
        QUESTION,
        options=OPTIONS,
        perception=config,
        sampling=SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True),
        assume_clues=clues,
    )
    return theirs, ours


@pytest.mark.parametrize(("clues", "overrides"), CASES.values(), ids=CASES)
def test_tokens_are_those_of_the_loop(
    loop: PublishedLoop,
    runtime: Runtime,
    clip: Path,
    clues: list[Any],
    overrides: dict[str, Any],
) -> None:
    theirs, ours = both(loop, runtime, clip, clues, perception(**overrides))
    assert len(theirs) == len(ours.rounds) == 3
    for their, our in zip(theirs, ours.rounds, strict=True):
        assert list(our.frames) == their.frame_indices
        assert our.prompt_tokens == their.prompt_tokens
        assert our.token_ids == their.token_ids


def test_the_cases_have_odd_even_and_deduplicated_frame_counts(clip: Path) -> None:
    nominal, sampled = [], []
    with open_video(str(clip)) as source:
        for clues, overrides in CASES.values():
            config, history = perception(**overrides), list[RoundHistory]()
            for clue in (*clues, None):
                plan = plan_round("official", config, [source.metadata], history, len(history))
                history.append(RoundHistory(plan, clue_from_json(clue), forced=True))
                nominal.append(smart_nframes(config, 121, 10.0))
                sampled.append(len(plan.frame_indices))
    assert {n % 2 for n in sampled} == {0, 1}
    assert any(n < wanted for n, wanted in zip(sampled, nominal, strict=True))


def test_each_parity_is_the_loop_and_gives_tokens_of_its_own(
    loop: PublishedLoop, runtime: Runtime, clip: Path
) -> None:
    found = []
    for parity in PARITIES:
        config = perception(parity=parity)
        theirs, ours = both(loop, runtime, clip, [[[4, 8]], [[5, 6]]], config)
        found.append([look.token_ids for look in ours.rounds])
        assert [look.token_ids for look in theirs] == found[-1]
    assert found[0] != found[1], "the comparison can fail"
