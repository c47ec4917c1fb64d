"""What comes out of a question: events while it runs, a result per round, the answer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

import vtts_rt
from vtts_rt.engine.sequence import Completion, FinishReason
from vtts_rt.perception.clue import Clue, clue_to_json
from vtts_rt.perception.plan import FramePlan
from vtts_rt.rounds.transcript import Transcript
from vtts_rt.types import (
    Parity,
    Region,
    ReuseStats,
    RoundTimings,
    StopReason,
    StrategyName,
    VideoMetadata,
    VideoWrapper,
)
from vtts_rt.video.store import StoreProvider

SCHEMA_VERSION = 1


@dataclass(slots=True, kw_only=True)
class Reply:
    """What the model said after one look: of `Runtime.chat`, and in each round.

    prompt: the exact text tokenised (of a round of `append`: the part that it added).
    finish_reason: "stop": the model, a stop text or a stop id ended it; "length": max_tokens
    did; "timeout". logprobs: natural log, as SamplingParams.logprobs says. plan: frames, boxes and
    sizes shown. transcript: the sequence as tokens.
    """

    prompt: str
    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    plan: FramePlan
    prompt_tokens: int
    reuse: ReuseStats
    timings: RoundTimings
    transcript: Transcript

    @property
    def frames(self) -> tuple[int, ...]:
        """Frame indices shown, in prompt order."""
        return tuple(self.plan.frame_indices)


R = TypeVar("R", bound=Reply)


def reply_of(
    kind: type[R], completion: Completion, provider: StoreProvider, began: float, **own: object
) -> R:
    """A Reply with what `provider` counted since the last one. began: `time.perf_counter()`."""
    for name, count in provider.take_counts()._asdict().items():
        setattr(completion.reuse, name, count)
    completion.timings.total = 1e3 * (time.perf_counter() - began)
    same = ("text", "token_ids", "logprobs", "finish_reason", "reuse", "timings")
    said = {name: getattr(completion, name) for name in same}
    return kind(**said, prompt_tokens=completion.num_prompt_tokens, **own)  # type: ignore[arg-type]


@dataclass(slots=True, kw_only=True)
class RoundResult(Reply):
    """One look and what the model said about it.

    answer: what stood in the answer tag, or None if the model wrote none or max_tokens cut it off;
    a text that was cut but is the letter of an option, and nothing else, is whole.
    clue: as the strategy reads what the model wrote (`official`: by the published rule), or as
    forced by `assume_clues`. regions: the clue as geometry on the whole frame. is_final: whether
    the prompt asked for the answer only, as no round was to follow.
    """

    index: int
    answer: str | None
    clue: Clue
    regions: tuple[Region, ...]
    is_final: bool = False

    @property
    def answered(self) -> str:
        """The answer of this round: what stood in the answer tag, else the whole text. A text that
        max_tokens cut off is no answer. (A request that runs out of time answers with what there
        is.)"""
        if self.answer is not None:
            return self.answer.strip()
        return "" if self.finish_reason == "length" else self.text.strip()

    def as_dict(self) -> dict[str, Any]:
        """One element of "rounds" in the JSON contract."""
        plan = self.plan
        same = ("index", "prompt", "text", "token_ids", "logprobs", "finish_reason")
        return {
            **{name: getattr(self, name) for name in same},
            "clue": clue_to_json(self.clue, self.regions),
            "frame_indices": list(plan.frame_indices),
            "timestamps_seconds": list(plan.timestamps_seconds),
            "resized_hw": list(plan.resized_hw),
            "grid_thw": [list(grid) for grid in plan.grid_thw],
            "sample_fps": plan.sample_fps,
            "segments": [
                {
                    "video": segment.pairs[0].video,
                    "frame_indices": list(segment.frame_indices),
                    "box": list(segment.box),
                    "resized_hw": list(segment.resized_hw),
                }
                for segment in plan.segments
            ],
            "notes": list(plan.notes),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(self.token_ids),
            "reuse": self.reuse.as_dict(),
            "timings_ms": self.timings.as_dict(),
        }


@dataclass(slots=True)
class RoundStarted:
    type: ClassVar[str] = "round_started"
    index: int
    plan: FramePlan


@dataclass(slots=True)
class TokenGenerated:
    type: ClassVar[str] = "token"
    index: int
    token_id: int
    logprob: float
    text: str


@dataclass(slots=True)
class ClueFound:
    """A span or box read in the stream, before the answer ends: numbers as written. `official`
    tells them once the tag closes."""

    type: ClassVar[str] = "clue"
    index: int
    kind: str
    value: tuple[float, ...]


@dataclass(slots=True)
class RoundFinished:
    type: ClassVar[str] = "round_finished"
    result: RoundResult


@dataclass(slots=True)
class Answer:
    """What a question came to.

    text: the answer as the model wrote it, of the latest round that completed one
    (`RoundResult.answered`), "" if none did; option: the letter of the chosen option ("A" is
    the first) or None; rounds: one RoundResult a look. weights_version: of the weights that gave
    it, 0 for those that were loaded (see `Runtime.update_weights`).
    """

    text: str
    option: str | None
    stop_reason: StopReason
    rounds: list[RoundResult]
    model: str
    strategy: StrategyName
    parity: Parity
    video_wrapper: VideoWrapper
    dialect: str
    seed: int
    videos: list[VideoMetadata]
    load_ms: float
    total_ms: float
    weights_version: int = 0

    @property
    def option_index(self) -> int | None:
        return None if self.option is None else ord(self.option) - ord("A")

    def as_dict(self) -> dict[str, Any]:
        """The JSON contract of `vtts-rt ask --json`."""
        same = ("option", "stop_reason", "model", "strategy", "parity", "video_wrapper", "dialect")
        video = ("num_frames", "source_fps", "duration_seconds", "height", "width", "decoder")
        return {
            "schema_version": SCHEMA_VERSION,
            "answer": self.text,
            **{name: getattr(self, name) for name in (*same, "seed", "weights_version")},
            "versions": versions(),
            "videos": [{name: getattr(v, name) for name in video} for v in self.videos],
            "rounds": [result.as_dict() for result in self.rounds],
            "timings_ms": {"load": self.load_ms, "total": self.total_ms},
        }


@dataclass(slots=True)
class AnswerReady:
    """The last event of a stream."""

    type: ClassVar[str] = "answer"
    answer: Answer


RoundEvent = RoundStarted | TokenGenerated | ClueFound | RoundFinished | AnswerReady


def versions() -> dict[str, str]:
    """Versions that results depend on."""
    import transformers

    return {
        "vtts_rt": vtts_rt.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
