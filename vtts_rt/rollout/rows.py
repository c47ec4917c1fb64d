"""RolloutRow: one sequence of a rollout group, as any trainer can read it and a journal keep it.

Legend: N tokens.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple, Protocol, get_args

import numpy as np

from vtts_rt.checks import is_number, is_whole
from vtts_rt.config import PARITIES, STRATEGIES
from vtts_rt.engine.sequence import FinishReason
from vtts_rt.models.tokenizer import VisionSpan
from vtts_rt.rounds.ask import Ask
from vtts_rt.rounds.results import Answer
from vtts_rt.rounds.transcript import Transcript
from vtts_rt.sampling import rollout_sampling
from vtts_rt.types import (
    RESIZE_KERNELS,
    Geometry,
    PairRef,
    Parity,
    PixelBox,
    SamplingParams,
    Segment,
    require,
)

FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)
# Array field -> (dtype as it is written, rows of N values).
_ARRAYS = {
    "token_ids": ("<i8", 1),
    "mask": ("|b1", 1),
    "logprobs": ("<f8", 1),
    "position_ids": ("<i8", 3),
}
_SCALARS = (
    *("temperature", "group_id", "rollout_id", "round", "weights_version", "parity"),
    "finish_reason",
)
_MAX_TOKENS = 1 << 26


class Group(Protocol):
    """What rows are made of: a `vtts_rt.rounds.rollouts.RolloutGroup`."""

    @property
    def group_id(self) -> str: ...
    @property
    def ask(self) -> Ask: ...
    @property
    def members(self) -> Sequence[Answer | Exception]: ...


class Score(NamedTuple):
    """What an answer is worth: `reward`, and what it is the sum of. parts: by the name of the
    reward, each as its function gave it, without its weight."""

    reward: float
    parts: Mapping[str, float]


class VisionRef(NamedTuple):
    """A vision segment of a row: tokens [start, start + length).

    keys: one a frame pair, all of them with the same number of tokens; pairs with equal keys have
    equal features in one model. grid_thw: (pairs, patch rows, patch columns).
    """

    start: int
    length: int
    keys: tuple[str, ...]
    grid_thw: tuple[int, int, int]
    is_image: bool


@dataclass(frozen=True, slots=True, eq=False)
class RolloutRow:
    """A prompt with what the model said: of one round, or of a whole conversation of `append`.

    token_ids: (N,) int64. mask: (N,) bool, what the model said and a loss counts, end tokens
    included; what was added between its turns is not in it. logprobs: (N,) float64, natural log,
    of the tokens in the mask when they were drawn, NaN elsewhere. position_ids: (3, N) int64,
    M-RoPE. spans: the vision segments, of one geometry. temperature: of the sampling, > 0.
    group_id, rollout_id (the member), round (the last that the row holds, from 0): together they
    name the row. finish_reason: "stop" where every round that the row holds ended by itself, else
    that of the first that did not. weights_version: of the weights that said it.
    parity: of the positions. reward: NaN where nothing was scored; reward_parts: see Score.
    ValueError for fields that do not fit together.
    """

    token_ids: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    position_ids: np.ndarray
    spans: tuple[VisionSpan, ...] = ()
    temperature: float = 1.0
    group_id: str = ""
    rollout_id: int = 0
    round: int = 0
    weights_version: int = 0
    parity: Parity = "release"
    finish_reason: FinishReason = "stop"
    reward: float = math.nan
    reward_parts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def rule(name: str, ok: object, text: str) -> None:
            require("RolloutRow", name, getattr(self, name), bool(ok), text)

        num = self.token_ids.size
        for name, (dtype, rows) in _ARRAYS.items():
            array, shape = getattr(self, name), (num,) if rows == 1 else (rows, num)
            ok = array.dtype == np.dtype(dtype) and array.shape == shape
            require("RolloutRow", name, array, ok, f"of shape {shape} and dtype {np.dtype(dtype)}")
        at = 0
        for span in self.spans:
            ok = at <= span.start and span.start + span.length <= num
            ok = ok and span.length == span.segment.num_tokens > 0
            require("RolloutRow", "span", span, ok, f"in order, the segment's tokens within {num}")
            at = span.start + span.length
        same = len({span.segment.geometry for span in self.spans}) <= 1
        rule("spans", same, "of one geometry")
        heat = self.temperature
        rule("temperature", is_number(heat) and 0.0 < heat < math.inf, "a finite number > 0")
        rule("group_id", isinstance(self.group_id, str), "a text")
        for name in ("rollout_id", "round", "weights_version"):
            rule(name, is_whole(value := getattr(self, name)) and value >= 0, "a whole number >= 0")
        rule("parity", self.parity in PARITIES, f"one of {', '.join(PARITIES)}")
        rule("finish_reason", self.finish_reason in FINISH_REASONS, f"one of {FINISH_REASONS}")
        rule("reward", isinstance(self.reward, float), "a float")
        parts = self.reward_parts.items()
        ok = all(isinstance(k, str) and is_number(v) and math.isfinite(v) for k, v in parts)
        rule("reward_parts", ok, "finite numbers by name")

    @property
    def row_id(self) -> str:
        """Another for every row, however equal their tokens are."""
        return f"{self.group_id}/{self.rollout_id}/{self.round}"

    @property
    def num_prompt(self) -> int:
        """Tokens before the first that the model said."""
        return int(self.mask.argmax()) if self.mask.any() else len(self.mask)

    @property
    def vision(self) -> tuple[VisionRef, ...]:
        """The vision segments by the keys of their pairs, in order."""
        return tuple(
            VisionRef(s.start, s.length, _keys(s.segment), s.segment.grid_thw, s.segment.is_image)
            for s in self.spans
        )

    @property
    def transcript(self) -> Transcript:
        """As `Runtime.score` and `Runtime.features` take it."""
        version, positions = self.weights_version, self.position_ids
        return Transcript(
            *(self.token_ids, self.mask, self.logprobs, self.spans, positions),
            weights_version=version,
            parity=self.parity,
        )

    def as_dict(self) -> dict[str, Any]:
        """The row in plain JSON values; `from_dict` gives it back exactly. Arrays are base64 of
        zlib of little-endian values; numbers that are not finite are texts."""
        kept = asdict(self.spans[0].segment.geometry) if self.spans else {}
        geometry = {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}
        return {
            "num_tokens": len(self.token_ids),
            **{name: _packed(getattr(self, name), dtype) for name, (dtype, _) in _ARRAYS.items()},
            **{name: getattr(self, name) for name in _SCALARS},
            "reward": self.reward if math.isfinite(self.reward) else str(self.reward),
            "reward_parts": dict(self.reward_parts),
            "geometry": geometry,
            "spans": [_span_dict(span) for span in self.spans],
        }

    @classmethod
    def from_dict(cls, data: Any) -> RolloutRow:
        """The row of an `as_dict`. ValueError for anything else."""
        try:
            num = data["num_tokens"]
            ok = type(num) is int and 0 <= num <= _MAX_TOKENS
            require("RolloutRow", "num_tokens", num, ok, f"a whole number, at most {_MAX_TOKENS}")
            read: dict[str, Any] = {name: data[name] for name in _SCALARS}
            for name, layout in _ARRAYS.items():
                read[name] = _unpacked(data[name], num, *layout)
            spans: tuple[VisionSpan, ...] = ()
            if data["spans"]:
                geometry = Geometry(**data["geometry"])
                spans = tuple(_span_of(span, geometry) for span in data["spans"])
            reward = data["reward"]
            reward = float(reward) if reward in ("nan", "inf", "-inf") else reward
            parts = dict(data["reward_parts"])
            return cls(**read, spans=spans, reward=reward, reward_parts=parts)
        except (LookupError, TypeError, AttributeError, OverflowError, zlib.error) as error:
            raise ValueError(f"RolloutRow: the row is damaged: {error!r:.300}") from error


def rows_of(group: Group, scores: Sequence[Score | None] | None = None) -> list[RolloutRow]:
    """The rows of a group, member after member and round after round.

    Where rounds continue a conversation (`append`) a member is one row, with all turns of the model
    in its mask; otherwise each round is a row, and all rows of a member carry its reward. scores:
    one a member, as `rewards.score_group` gives them. A member that failed, or was out of time
    before its first round, has no rows.
    ValueError for scores of another number, and for a group that was not sampled (temperature 0).
    """
    if scores is not None:
        ok = len(scores) == len(group.members)
        require("rows_of", "scores", len(scores), ok, f"{len(group.members)}, one a member")
    sampling = rollout_sampling(group.ask.sampling or SamplingParams())
    rows: list[RolloutRow] = []
    for member, answer in enumerate(group.members):
        if isinstance(answer, Exception):
            continue
        score = (scores[member] if scores is not None else None) or Score(math.nan, {})
        whole = STRATEGIES[answer.strategy].continues
        for result in answer.rounds[-1:] if whole else answer.rounds:
            said = result.transcript
            ends = [r.finish_reason for r in (answer.rounds if whole else [result])]
            rows.append(
                RolloutRow(
                    *(said.token_ids, said.generated, said.logprobs, said.position_ids, said.spans),
                    temperature=sampling.temperature,  # type: ignore[arg-type]
                    group_id=group.group_id,
                    rollout_id=member,
                    round=result.index,
                    weights_version=said.weights_version,
                    parity=said.parity,
                    finish_reason=next((end for end in ends if end != "stop"), "stop"),
                    reward=float(score.reward),
                    reward_parts=score.parts,
                )
            )
    return rows


def _keys(segment: Segment) -> tuple[str, ...]:
    """All that decides the pixels of each pair: content, frames, box, size and resize kernel."""
    box = ",".join(map(str, segment.box))
    view = f"{box}:{'x'.join(map(str, segment.resized_hw))}:{segment.resize}"
    return tuple(f"{p.video_id}:{p.frame_a},{p.frame_b}:{view}" for p in segment.pairs)


def _packed(array: np.ndarray, dtype: str) -> str:
    return base64.b64encode(zlib.compress(array.astype(dtype).tobytes())).decode()


def _unpacked(text: str, num: int, dtype: str, rows: int) -> np.ndarray:
    size = num * rows * np.dtype(dtype).itemsize
    stream = zlib.decompressobj()
    data = stream.decompress(base64.b64decode(text, validate=True), size + 1)
    ok = len(data) == size and stream.eof
    require("RolloutRow", "array", text, ok, f"zlib of {size} bytes")
    array = np.frombuffer(data, dtype).astype(np.dtype(dtype).newbyteorder("="))
    return array if rows == 1 else array.reshape(rows, num)


def _span_dict(span: VisionSpan) -> dict[str, Any]:
    segment = span.segment
    return {
        "start": span.start,
        "length": span.length,
        "pairs": [[getattr(pair, f.name) for f in fields(PairRef)] for pair in segment.pairs],
        "box": list(segment.box),
        "resized_hw": list(segment.resized_hw),
        "seconds_per_grid": segment.seconds_per_grid,
        "is_image": segment.is_image,
        "resize": segment.resize,
    }


def _span_of(data: Any, geometry: Geometry) -> VisionSpan:
    def number(value: object) -> float:
        ok = is_number(value) and math.isfinite(value)  # type: ignore[arg-type]
        require("RolloutRow", "seconds", value, ok, "a finite number")
        return float(value)  # type: ignore[arg-type]

    def whole(values: Sequence[object], count: int, least: int = 0) -> tuple[int, ...]:
        ok = len(values) == count and all(type(v) is int and v >= least for v in values)
        require("RolloutRow", "numbers", values, ok, f"{count} whole numbers >= {least}")
        return tuple(values)  # type: ignore[arg-type]

    pairs = []
    for video, video_id, a, b, seconds, mean in data["pairs"]:
        require("RolloutRow", "video_id", video_id, isinstance(video_id, str), "a text")
        mean = None if mean is None else number(mean)
        video, a, b = whole([video, a, b], 3)
        pairs.append(PairRef(video, video_id, a, b, number(seconds), mean))
    ok = type(data["is_image"]) is bool and data["resize"] in RESIZE_KERNELS
    require("RolloutRow", "segment", (data["is_image"], data["resize"]), ok, "a segment")
    height, width = whole(data["resized_hw"], 2, 1)
    segment = Segment(
        pairs=tuple(pairs),
        box=PixelBox(*whole(data["box"], 4)),
        resized_hw=(height, width),
        geometry=geometry,
        seconds_per_grid=number(data["seconds_per_grid"]),
        is_image=data["is_image"],
        resize=data["resize"],
    )
    start, length = whole([data["start"], data["length"]], 2)
    return VisionSpan(start, length, segment)
