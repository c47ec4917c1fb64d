"""Leaf value types shared by every layer, and the two protocols that decouple layers.

Nothing here knows about files, models or text formats. Units stand in the names:
`_seconds`, `_px`, `num_`, `_fps`; spans are half-open `[start, end)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

from vtts_rt.errors import BadRequest
from vtts_rt.sampling_rules import SAMPLING_RULES

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# Pixels of one frame: (H, W, 3) uint8 RGB; a tensor where the decoder left them on a device.
Frame: TypeAlias = "np.ndarray[Any, Any] | Tensor"

# Of every family: patches a side that become one LM token, and frames that make a frame pair.
MERGE_SIZE = 2
FRAMES_PER_PAIR = 2

# Whose numbers a run reproduces: the code that was released with VideoChat-R1.5, or transformers 5.
Parity = Literal["release", "transformers"]
# How a crop becomes the pixels of its view, always antialiased bicubic (vtts_rt.ops.bicubic):
# "fixed" as torchvision v2 and transformers 5 on a CPU, "float" as torchvision v1, "pil" as PIL.
ResizeKernel = Literal["fixed", "float", "pil"]
RESIZE_KERNELS: tuple[ResizeKernel, ...] = ("fixed", "float", "pil")
# How a family that writes a video pair by pair brackets the pairs: with vision markers around all
# of them (transformers from 5.10 on), or not (before).
VideoWrapper = Literal["outer", "legacy"]
VIDEO_WRAPPERS: tuple[VideoWrapper, ...] = ("outer", "legacy")
# What they do: perception/strategy.py.
StrategyName = Literal["official", "grid", "refresh", "append"]
Decoder = Literal["auto", "pyav", "dali"]
DECODERS: tuple[Decoder, ...] = ("auto", "pyav", "dali")
StopReason = Literal["max_rounds", "answer_stable", "no_clue", "token_budget", "timeout"]


# Patch sizes that the kernels and the C++ core are compiled for: Qwen2-VL and Qwen2.5-VL, Qwen3-VL.
PATCH_SIZES = (14, 16)


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a family's vision tower cuts up and normalises what it is shown.

    patch_px: px a side of a patch, one of PATCH_SIZES. mean, std: of the values 0..1 of a channel
        (red, green, blue); a pixel becomes (value / 255 - mean) / std. merge: patches a side that
        become one LM token. frames_per_pair: frames of a temporal cell (`temporal_patch_size`).
    released: whether VideoChat-R1.5 was released for the family. Where not, parity `release` is
        its sampler and its sizes under transformers' numerics.
    Raises ValueError for a patch size that nothing is compiled for, for a merge or frames_per_pair
    other than 2, and for a mean or std that is not three numbers whose quotients float32 holds.
    """

    patch_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    merge: int = MERGE_SIZE
    frames_per_pair: int = FRAMES_PER_PAIR
    released: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("patch_px", PATCH_SIZES),
            ("merge", (MERGE_SIZE,)),
            ("frames_per_pair", (FRAMES_PER_PAIR,)),
        ):
            value, rule = getattr(self, name), " or ".join(map(str, allowed))
            require("Geometry", name, value, type(value) is int and value in allowed, rule)
        for name, least in (("mean", -1e6), ("std", 1e-6)):
            given = getattr(self, name)
            try:
                values = tuple(float(value) for value in given)
                ok = len(values) == 3 and all(least <= value <= 1e6 for value in values)
            except (TypeError, ValueError, OverflowError):
                values, ok = (), False
            ok = ok and not isinstance(given, str)
            require("Geometry", name, given, ok, f"three numbers in [{least:g}, 1e+06]")
            object.__setattr__(self, name, values)

    @property
    def token_px(self) -> int:
        """px a side of one LM token; sizes of views are multiples of it."""
        return self.patch_px * self.merge

    @property
    def patches_per_token(self) -> int:
        return self.merge * self.merge

    @property
    def row_size(self) -> int:
        """Values of a patch row: RGB of every pixel of a patch in every frame of a pair."""
        return 3 * self.frames_per_pair * self.patch_px * self.patch_px

    def grid_hw(self, resized_hw: tuple[int, int]) -> tuple[int, int]:
        """(patch rows, patch columns) of a view of (height, width) px."""
        return resized_hw[0] // self.patch_px, resized_hw[1] // self.patch_px

    def num_tokens(self, resized_hw: tuple[int, int]) -> int:
        """LM tokens of one pair, or image, of (height, width) px."""
        return (resized_hw[0] // self.token_px) * (resized_hw[1] // self.token_px)


class PixelBox(NamedTuple):
    """Integer source pixels, half-open: columns [x0, x1), rows [y0, y1)."""

    x0: int
    y0: int
    x1: int
    y1: int


@dataclass(frozen=True, slots=True)
class TimeSpan:
    """Seconds from the start of the video, half-open [start_seconds, end_seconds)."""

    start_seconds: float
    end_seconds: float


@dataclass(frozen=True, slots=True)
class Box:
    """Normalised xyxy of the whole source frame, each in [0, 1]."""

    x0: float
    y0: float
    x1: float
    y1: float


FULL_BOX = Box(0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Region:
    """Where evidence is: a time span of one video, and a box in its frames.

    video: index into the request's list of videos.
    """

    span: TimeSpan
    box: Box = FULL_BOX
    video: int = 0


@dataclass(frozen=True, slots=True)
class VideoMetadata:
    """What is known of an opened video before any frame of it is delivered.

    video_id: hash of the whole content and of the clip range and rotation that change pixels.
    num_frames: frames that can be asked for; frame indices are 0 .. num_frames-1 in
        presentation order.
    source_fps: average rate, num_frames / duration_seconds unless the container knows better.
    height, width: px of a delivered frame, after rotation.
    decoder: name of the source that decodes ("pyav", "array", "image", ...).
    timestamps_seconds: (num_frames,) float64, presentation time of each frame, ascending,
        relative to the first delivered frame's nominal start (frame 0 is at 0.0).
    """

    video_id: str
    num_frames: int
    source_fps: float
    duration_seconds: float
    height: int
    width: int
    decoder: str
    is_image: bool = False
    timestamps_seconds: np.ndarray | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class PairRef:
    """One frame pair: the unit of every visual cache.

    video: index into the request's list of videos; video_id: its content hash.
    frame_a, frame_b: frame indices (equal for an image, or where the grid is finer than
        the source). time_seconds: nominal time of the pair; mean_seconds: of its two frames, None
        where that is the same. Time labels print the one or the other (`ChatFormat.per_pair`).
    """

    video: int
    video_id: str
    frame_a: int
    frame_b: int
    time_seconds: float
    mean_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """One vision item of a prompt: pads, one a token, between the markers of its chat format.

    pairs: frame pairs in order, all seen through the same `box` and resized to `resized_hw`
        (px, multiples of the geometry's token_px). geometry: of the model that is shown them.
        seconds_per_grid: seconds between two pairs, for M-RoPE
        (ignored for a single pair). is_image: pads are the image's, not the video's. resize: the
        kernel that makes the pixels of the view.
    """

    pairs: tuple[PairRef, ...]
    box: PixelBox
    resized_hw: tuple[int, int]
    geometry: Geometry
    seconds_per_grid: float = 1.0
    is_image: bool = False
    resize: ResizeKernel = "fixed"

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """(pairs, patch rows, patch columns), as transformers' `video_grid_thw`."""
        return (len(self.pairs), *self.geometry.grid_hw(self.resized_hw))

    @property
    def tokens_per_pair(self) -> int:
        return self.geometry.num_tokens(self.resized_hw)

    @property
    def num_tokens(self) -> int:
        return len(self.pairs) * self.tokens_per_pair

    @property
    def frame_indices(self) -> tuple[int, ...]:
        return tuple(f for pair in self.pairs for f in (pair.frame_a, pair.frame_b))


@dataclass(frozen=True, slots=True)
class TimeLabel:
    """The time of the next vision segment written into the prompt as text.

    A type of its own so that `text_tokens_prefilled` can leave labels out.
    """

    text: str


@dataclass(frozen=True, slots=True)
class Marker:
    """A vision marker of the chat format that stands by itself."""

    text: str


PromptPart = str | TimeLabel | Marker | Segment


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text runs, time labels and vision in prompt order, markers of turns included.

    Markers of segments are not part of the text runs (`perception.chat.ChatFormat.text` has both).
    """

    parts: tuple[PromptPart, ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(p for p in self.parts if isinstance(p, Segment))


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. None: what the checkpoint's generation_config.json says, else neutral
    (`sampling.resolve`). ops/logits.py says in which order all of this applies.

    temperature: 0 is greedy (neutral); above, Gumbel-max with counter-based noise keyed by
        (seed, member, round, position), so batching and preemption never change the noise; what
        stands beside a row in a pass changes sums by rounding (float32: some 1e-6 of a log-prob).
    top_k: 0 keeps all; top_p: 1.0 keeps all. seed: 0 if unset.
    max_tokens: per round; unset, 2,048 cut to what the model's positions and the KV pool hold.
    stop: a text or texts that end a round when generated; kept out of the text.
    ignore_eos: generate max_tokens whatever the model says (benches): end tokens, `stop` and
        `stop_token_ids` end nothing.
    repetition_penalty: divides positive logits, multiplies negative ones, of all tokens that stand
        in the prompt (markers and frame pads too) or the answer so far (transformers).
    presence_penalty, frequency_penalty: subtracted from the logits of the tokens of the answer so
        far, once, and by count (OpenAI, vLLM).
    min_tokens: of these no end token or stop id is one, and no stop text ends before them.
    stop_token_ids: token ids that end a round; kept out of the text, like end tokens.
    logit_bias: token id, or its decimal text, to what its logit is raised by (OpenAI).
    no_repeat_ngram_size: no run of so many tokens comes twice, in the prompt or after it; 0: off.
    suppress_tokens, begin_suppress_tokens: ids that never come, that do not come first.
    bad_words_ids: runs of token ids that never come (all of these as in transformers).
    logprobs: of which distribution: "processed", that which was sampled from, or "raw", the
        model's own.
    Raises ValueError for values that `sampling_rules` does not allow.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    ignore_eos: bool | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Sequence[int] | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    no_repeat_ngram_size: int | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    logprobs: Literal["processed", "raw"] | None = None

    def __post_init__(self) -> None:
        for name, (rule, convert, fits) in SAMPLING_RULES.items():
            given = getattr(self, name)
            if given is None:
                continue
            try:
                value = convert(given)
                ok = bool(fits(value))
            except (TypeError, ValueError, OverflowError):
                value, ok = None, False
            require("SamplingParams", name, given, ok, rule)
            object.__setattr__(self, name, value)


def require(what: str, argument: str, value: object, ok: bool, rule: str) -> None:
    """The one shape of a bad-argument message: `<what>: <argument> must be <rule>, got <value>`."""
    if not ok:
        raise BadRequest(f"{what}: {argument} must be {rule}, got {_shown(value)}")


def _shown(value: object) -> str:
    """`repr`, cut off: a value may be a whole file, or have no repr (an int of 5,000 digits)."""
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 300 else f"{text[:300]}..."


@dataclass(slots=True)
class ReuseStats:
    """What one round paid for and what it found already done. All are counts.

    frames_decoded: frames delivered to the store by a decoder (each at most once);
    frames_codec_decoded: frames the codec had to decode to get there (keyframe seeks);
    frames_reused: frames served by the store; frames_guessed: frames fetched on a guess before the
    round began; frames_guessed_used: those of them that it asked for. pairs_encoded: frame pairs
    through the ViT; pairs_reused: pairs whose features or KV were found. tokens_prefilled,
    tokens_reused: prompt tokens whose KV was computed, found. text_tokens_prefilled: prefilled
    tokens outside vision segments and time labels. tokens_drafted, tokens_accepted: tokens that
    were guessed from earlier answers, and those of them that turned out right.
    """

    frames_decoded: int = 0
    frames_codec_decoded: int = 0
    frames_reused: int = 0
    frames_guessed: int = 0
    frames_guessed_used: int = 0
    pairs_encoded: int = 0
    pairs_reused: int = 0
    tokens_prefilled: int = 0
    tokens_reused: int = 0
    text_tokens_prefilled: int = 0
    tokens_drafted: int = 0
    tokens_accepted: int = 0

    def __add__(self, other: ReuseStats) -> ReuseStats:
        return ReuseStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(slots=True)
class RoundTimings:
    """Wall-clock milliseconds of one round by phase, as its request saw them.

    A pass that works for several requests counts in full for each of them. queue: before the
    first pass; ttft: from the start of the round to its first token, other phases included.
    """

    decode: float = 0.0
    preprocess: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    generate: float = 0.0
    total: float = 0.0
    queue: float = 0.0
    ttft: float = 0.0

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class FrameProvider(Protocol):
    """Where the engine gets pixels from: lazy and, in `prefetch`, non-blocking."""

    def prefetch(self, video: int, frame_indices: Sequence[int]) -> None:
        """Say which frames will be wanted soon; returns at once."""
        ...

    def ready(self, video: int, frame_indices: Sequence[int]) -> bool:
        """Whether none of the frames is still on its way from a `prefetch`."""
        ...

    def frames(self, video: int, frame_indices: Sequence[int]) -> list[Frame]:
        """Frames in the order asked for, each (H, W, 3) uint8 RGB; repeated indices allowed."""
        ...
