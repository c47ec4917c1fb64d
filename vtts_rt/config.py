"""Frozen configuration objects and the package's environment variables.

`PerceptionConfig` says how a video is looked at (`ResolvedPerception`: with a model's own settings
filled in), `EngineConfig` how the engine spends memory, `RuntimeConfig` how videos are opened and
requests admitted.
Every default names its source.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from vtts_rt.checks import Rule, check, is_flag
from vtts_rt.types import (
    DECODERS,
    VIDEO_WRAPPERS,
    Decoder,
    Geometry,
    Parity,
    StrategyName,
    VideoWrapper,
    require,
)

QUANTIZATIONS = ("int8", "fp8")
PARITIES: tuple[Parity, ...] = ("release", "transformers")
# VideoChat-R1.5: tokens that a frame gets at least, and how many such frames a round may hold.
_MIN_TOKENS, _TOTAL_SHARE = 128, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyTraits:
    """What holds for the rounds of a strategy; perception/strategy.py says how they look.

    continues: a later round goes on behind the tokens of the one before, and shows what is new;
        otherwise every round is asked afresh.
    focuses: a later round shows what the clue points to and nothing else.
    on_grid: pairs are cells of the dyadic grid, so `finer_frames` tells where a clue leads.
    literal_clues: clues are read by the published rule (published.py, sticky_clues), not leniently.
    may_stop_early: rounds may end once an answer is stable (stop_when_stable).
    """

    continues: bool = False
    focuses: bool = False
    on_grid: bool = True
    literal_clues: bool = False
    may_stop_early: bool = True


STRATEGIES: Mapping[StrategyName, StrategyTraits] = {
    "official": StrategyTraits(on_grid=False, literal_clues=True, may_stop_early=False),
    "grid": StrategyTraits(),
    "refresh": StrategyTraits(focuses=True),
    "append": StrategyTraits(continues=True, focuses=True),
}

# fresh: a new prompt that knows nothing of earlier answers. append: a further turn. splice: frames
# go into the answer that is being written. subcontext: each look is answered by itself, and only
# that text comes back. none: the model never looks again.
Continuation = Literal["fresh", "append", "splice", "subcontext", "none"]
# Way -> the dialects (perception/dialect.py) whose rounds go on so. Those of the first two run.
DIALECTS: Mapping[Continuation, tuple[str, ...]] = {
    "fresh": ("r1.5",),
    "append": (
        *("r1.5", "longvt", "video-zoom-in", "videozoomer", "timesearch-r", "conan"),
        *("framethinker", "pixel-reasoner", "deepeyes", "mini-o3"),
    ),
    "splice": ("dynframe",),
    "subcontext": ("paravt", "ego-r1"),
    "none": ("open-o3-video", "video-thinker"),
}
RUNNING_DIALECTS = tuple(dict.fromkeys(DIALECTS["fresh"] + DIALECTS["append"]))


def strategies_of(dialect: str) -> list[StrategyName]:
    """The strategies whose rounds go on as a dialect's do; [] where its rounds do not run."""
    traits = STRATEGIES.items()
    return [n for n, s in traits if dialect in DIALECTS["append" if s.continues else "fresh"]]


# name -> what it does; the whole list of variables the installed package reads.
ENVIRONMENT_VARIABLES = {
    "VTTS_RT_BACKEND": "op=backend[,op=backend]: force an op's backend, e.g. patchify=reference",
    "VTTS_RT_CACHE_DIR": "folder of the video index cache (~/.cache/vtts_rt), or `off`",
    "VTTS_RT_LOG": "log level (debug, info, warning, error, critical) of the logger `vtts_rt`",
}


def backend_override(op: str) -> str | None:
    """The backend that VTTS_RT_BACKEND asks for `op`, or None."""
    for item in os.environ.get("VTTS_RT_BACKEND", "").split(","):
        name, _, backend = item.partition("=")
        if name.strip() == op and backend.strip():
            return backend.strip()
    return None


def index_cache_folder() -> Path | None:
    """Where video indices are cached on disk: `VTTS_RT_CACHE_DIR`, None where that is "off"; by
    default `$XDG_CACHE_HOME/vtts_rt` or `~/.cache/vtts_rt`."""
    if folder := os.environ.get("VTTS_RT_CACHE_DIR"):
        return None if folder == "off" else Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "vtts_rt")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not is_flag(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not is_flag(value)


# Switches that need another setting to be one of some -> that setting, and which.
_SCOPES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "sticky_clues": ("strategy", tuple(n for n, s in STRATEGIES.items() if s.literal_clues)),
    "stop_when_stable": ("strategy", tuple(n for n, s in STRATEGIES.items() if s.may_stop_early)),
    "constrain_clues": ("dialect", ("r1.5",)),  # the grammar knows lists of numbers
}
# Setting -> whether a value is allowed, and the rule in words.
_PERCEPTION_RULES: dict[str, Rule] = {
    "strategy": (tuple(STRATEGIES).__contains__, f"one of {', '.join(STRATEGIES)}"),
    "dialect": (
        RUNNING_DIALECTS.__contains__,
        f"one that goes on by new prompts or further turns ({', '.join(RUNNING_DIALECTS)})",
    ),
    "max_rounds": (lambda v: _is_int(v) and 1 <= v <= 64, "an integer in 1..64"),
    "sample_fps": (lambda v: _is_number(v) and 1e-6 <= v <= 1000.0, "a number in [1e-6, 1000]"),
    "min_frames": (lambda v: _is_int(v) and v >= 2 and v % 2 == 0, "an even integer >= 2"),
    "max_frames": (lambda v: _is_int(v) and v >= 2 and v % 2 == 0, "an even integer >= 2"),
    "min_pixels": (lambda v: _is_int(v) and 1 <= v < 2**63, "an integer >= 1, below 2**63"),
    "total_pixels": (lambda v: _is_int(v) and 1 <= v < 2**63, "an integer >= 1, below 2**63"),
    "key_ratio": (lambda v: _is_number(v) and 0.0 < v < 1e3, "a number in (0, 1000)"),
    "focus_frames": (lambda v: _is_int(v) and v >= 0 and v % 2 == 0, "an even integer >= 0"),
    "focus_margin_cells": (lambda v: _is_number(v) and 0.0 <= v <= 1e6, "a number in [0, 1e6]"),
    "parity": (PARITIES.__contains__, f"one of {', '.join(PARITIES)}"),
    "video_wrapper": (VIDEO_WRAPPERS.__contains__, f"one of {', '.join(VIDEO_WRAPPERS)}"),
    **dict.fromkeys(("text_first", "time_labels", *_SCOPES), (is_flag, "True or False")),
    "prompts": (lambda v: isinstance(v, str | Path), "the path of a file"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedPerception:
    """How one question looks at its video(s), every setting decided; see PerceptionConfig.

    The defaults are those of VideoChat-R1.5, and of models that bring none of their own; those of
    min_pixels and total_pixels depend on the model's geometry (`PerceptionConfig.resolve`).
    geometry: of the model that is shown the frames.
    prompts: "" is the model's own wording. ValueError names the first setting that is not allowed.
    """

    geometry: Geometry
    strategy: StrategyName = "official"
    dialect: str = "r1.5"
    max_rounds: int = 3
    sample_fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 512
    min_pixels: int
    total_pixels: int
    key_ratio: float = 1.5
    focus_frames: int = 0
    focus_margin_cells: float = 0.0
    parity: Parity = "release"
    video_wrapper: VideoWrapper = "outer"
    text_first: bool = True
    time_labels: bool = True
    sticky_clues: bool = False
    stop_when_stable: bool = False
    constrain_clues: bool = False
    prompts: str | Path = ""

    def __post_init__(self) -> None:
        check(
            "PerceptionConfig", _PERCEPTION_RULES, {n: getattr(self, n) for n in _PERCEPTION_RULES}
        )
        least, most = self.min_frames, self.max_frames
        require("PerceptionConfig", "max_frames", most, most >= least, f">= min_frames ({least})")
        strategies = strategies_of(self.dialect)
        rule = f"{' or '.join(strategies)} with dialect {self.dialect}"
        require("PerceptionConfig", "strategy", self.strategy, self.strategy in strategies, rule)
        for name, (other, values) in _SCOPES.items():
            chosen = getattr(self, other)
            ok = not getattr(self, name) or chosen in values
            rule = f"left out with {other} {chosen} (it is for {', '.join(values)})"
            require("PerceptionConfig", name, getattr(self, name), ok, rule)

    @property
    def numerics(self) -> Parity:
        """Whose arithmetic prepares pixels: transformers' where there was no release."""
        return self.parity if self.geometry.released else "transformers"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PerceptionConfig:
    """How one question looks at its video(s). None leaves a setting to the model.

    strategy: the model's own is "append" for models trained with it, "official" for all others.
    dialect: how the model writes that it wants another look, and how it is given one
        (docs/dialects.md); "r1.5" unless the model's own is another. One that goes on by further
        turns implies strategy "append".
    max_rounds: looks at the video, 1 to 64.
    sample_fps: frames sampled a second in a coarse pass (VideoChat-R1.5: 2.0).
    min_frames, max_frames: bounds on the frames of a round, even (VideoChat-R1.5: 4, 512).
    min_pixels, total_pixels: px; the budget rule of VideoChat-R1.5 / qwen-vl-utils: a frame
        gets at most max(min(768*t^2, total_pixels / num_frames * 2), 1.05 * min_pixels), a token
        of the model being t px a side (VideoChat-R1.5: 128*t^2, 12*128*t^2).
    key_ratio: how much denser key spans are sampled by `official` (VideoChat-R1.5: 1.5).
    focus_frames: most frames of a later look in `refresh` and `append`; 0 is half of the first
        look's, at least 8, so that a run costs about two looks however many rounds it has.
    focus_margin_cells: how far such a look reaches beyond the clue's spans, in time steps of
        the look that the clue is about.
    parity: whose numbers are reproduced on the same frames and prompt (docs/strategies.md):
        "release", the published code's, or "transformers", those of the installed version 5.
    video_wrapper: of families that write a video pair by pair, each behind its time: whether vision
        markers stand around all pairs ("outer", transformers' processor from 5.10 on) or not
        ("legacy", before). Others have no use for it.
    text_first: in `refresh` and `append` the question stands before the video; False puts it
        behind the first look, whose KV then serves every question about the video.
    time_labels: write `<12.0s>` before each pair in `refresh` and `append`; families that write a
        video pair by pair always do, in their own form.
    sticky_clues: in `official`, a round without a clue looks where the last clue pointed, as the
        evaluation scripts of VideoChat-R1.5 do; False samples uniformly, as its README does.
    stop_when_stable: end early when two successive rounds gave the same non-empty answer; not
        with `official`, which always runs all rounds.
    constrain_clues: let a grammar keep what the model writes inside a clue tag parseable.
    prompts: path of a file that overrides the wording of the prompts.
    ValueError names the first setting that is not allowed.
    """

    strategy: StrategyName | None = None
    dialect: str | None = None
    max_rounds: int | None = None
    sample_fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    total_pixels: int | None = None
    key_ratio: float | None = None
    focus_frames: int | None = None
    focus_margin_cells: float | None = None
    parity: Parity | None = None
    video_wrapper: VideoWrapper | None = None
    text_first: bool | None = None
    time_labels: bool | None = None
    sticky_clues: bool | None = None
    stop_when_stable: bool | None = None
    constrain_clues: bool | None = None
    prompts: str | Path | None = None

    def __post_init__(self) -> None:
        check("PerceptionConfig", _PERCEPTION_RULES, self.given())

    def __repr__(self) -> str:
        return f"PerceptionConfig({', '.join(f'{k}={v!r}' for k, v in self.given().items())})"

    @classmethod
    def of_recipe(cls, recipe: Mapping[str, Any]) -> PerceptionConfig:
        """The settings that a model brings along. ValueError for an unknown name or a value."""
        names = [f.name for f in fields(cls)]
        for name in recipe:
            require("PerceptionConfig", "setting", name, name in names, f"one of {names}")
        return cls(**recipe)

    def given(self) -> dict[str, Any]:
        """The settings that are not left to the model."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def resolve(
        self, geometry: Geometry, defaults: Mapping[str, Any] | None = None
    ) -> ResolvedPerception:
        """Every setting decided: as given here, else by `defaults` (a model's own settings), else
        as in ResolvedPerception; by default a frame has at least 128 tokens of the model's
        `geometry`, and a round 12 times as many.

        A default that is no setting of the chosen strategy is left out; one that was given is
        refused with ValueError, as are settings that contradict each other.
        """
        ok = isinstance(geometry, Geometry)
        require("PerceptionConfig", "geometry", geometry, ok, "a Geometry")
        own = self.of_recipe(defaults or {}).given()
        pixels = _MIN_TOKENS * geometry.token_px**2
        budget = {"min_pixels": pixels, "total_pixels": _TOTAL_SHARE * pixels}
        named = {"strategy": "official", "dialect": "r1.5"}
        chosen: dict[str, Any] = {**named, **budget, **own, **self.given()}
        strategies = strategies_of(chosen["dialect"])
        if self.strategy is None and chosen["strategy"] not in strategies:
            chosen["strategy"] = strategies[0]
        for name, (other, values) in _SCOPES.items():
            if chosen[other] not in values and getattr(self, name) is None:
                chosen.pop(name, None)
        return ResolvedPerception(geometry=geometry, **chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaLimits:
    """Bounds on one video or image, checked before the work that they bound.

    max_pixels: of a frame; the default is 8192 x 8192, twice an 8K frame.
    max_packets: of the video stream, and samples of all streams together that a header lists;
        the default is 19 hours of 60 packets a second.
    max_frames: that show; the default is 8 hours of 30 frames a second.
    max_bytes: of the encoded content, or of an array; the default is 64 GiB.
    max_open_seconds: from the call of `open_video` until the video is open.
    Raises ValueError for anything but positive numbers.
    """

    max_pixels: int = 1 << 26
    max_packets: int = 1 << 22
    max_frames: int = 864_000
    max_bytes: int = 1 << 36
    max_open_seconds: float = 60.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            whole = f.name != "max_open_seconds"
            number = isinstance(value, int) or (isinstance(value, float) and not whole)
            ok = number and not isinstance(value, bool) and value > 0
            require("MediaLimits", f.name, value, ok, "an integer > 0" if whole else "seconds > 0")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Memory and batching of one engine.

    page_size: tokens in a KV page. kv_bytes: budget of KV pages, 0 for a share of the memory
        that is free once the model is loaded (`engine/memory.py`).
    vision_cache_bytes, vision_host_bytes, vision_disk_bytes: budgets of the tiers of the vision
        cache: where the model runs, in host memory behind an accelerator, in files under
        `vision_disk_path`.
    max_batch_tokens: most tokens in one forward pass; longer prompts are prefilled in chunks,
        between which others decode. max_sequences: most requests in work at once.
    max_wait_steps: forward passes after which the oldest waiting request gets the place of the
        newest running one, which goes on later from where it was.
    draft_tokens: most tokens drafted from earlier rounds and verified in one forward pass, 0
        for none; never changes what is generated. With the one that is certain 15 are the rows
        that the CPU's decoding kernels take at once. prefix_cache: reuse KV between requests.
    cuda_graphs: decode as CUDA graphs, the next step launched before the tokens of the last are
        seen; None where the model runs on CUDA. Never changes what is generated.
    """

    page_size: int = 16
    kv_bytes: int = 0
    vision_cache_bytes: int = 512 << 20
    vision_host_bytes: int = 0
    vision_disk_bytes: int = 0
    vision_disk_path: str = ""
    max_batch_tokens: int = 4096
    max_sequences: int = 64
    max_wait_steps: int = 256
    draft_tokens: int = 15
    prefix_cache: bool = True
    cuda_graphs: bool | None = None

    def __post_init__(self) -> None:
        _check_numbers(self, least_1=("page_size", "max_sequences", "max_wait_steps"))
        # Every running request decodes in every pass, and one more token must move a prefill.
        low = self.max_sequences + 1
        tokens = self.max_batch_tokens
        require("EngineConfig", "max_batch_tokens", tokens, tokens >= low, f">= {low}")
        graphs = self.cuda_graphs
        known = graphs is None or isinstance(graphs, bool)
        require("EngineConfig", "cuda_graphs", graphs, known, "True, False or None")
        path, disk = self.vision_disk_path, self.vision_disk_bytes
        ok = isinstance(path, str | Path) and (bool(path) or not disk)
        require("EngineConfig", "vision_disk_path", path, ok, "the path of a folder")


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """How a runtime opens videos, keeps frames and admits requests.

    decoder: of video files, as `open_video`: "auto" is DALI where the model's GPU has NVDEC and
        DALI is installed, else PyAV; "pyav"; "dali".
    media_limits: bounds on every video and image; `limits=` of a question takes their place.
    frame_store_bytes: budget of decoded frames in host memory. device_frame_store_bytes: budget
        of those that a decoder leaves on an accelerator; the default holds 97 frames of 1280x720.
    speculative_fetch: fetch the frames of a clue while the answer that holds it goes on, and keep
        those that lie beside frames decoded anyway.
    max_queued_requests: most that wait beside those in work (`EngineConfig.max_sequences`), their
        videos open; one more is refused as `errors.Overloaded`.
    threads: CPU threads for torch and patchify (0: leave as they are).
    """

    decoder: Decoder = "auto"
    media_limits: MediaLimits = field(default_factory=MediaLimits)
    frame_store_bytes: int = 1 << 30
    device_frame_store_bytes: int = 256 << 20
    speculative_fetch: bool = True
    max_queued_requests: int = 4096
    threads: int = 0

    def __post_init__(self) -> None:
        _check_numbers(self)
        known, limits = self.decoder in DECODERS, self.media_limits
        require("RuntimeConfig", "decoder", self.decoder, known, f"one of {', '.join(DECODERS)}")
        ok = isinstance(limits, MediaLimits)
        require("RuntimeConfig", "media_limits", limits, ok, "a MediaLimits")


def _check_numbers(config: EngineConfig | RuntimeConfig, least_1: tuple[str, ...] = ()) -> None:
    """ValueError for a whole number that is negative (0 where it must be 1), or no flag."""
    name = type(config).__name__
    for f in fields(config):
        value = getattr(config, f.name)
        if f.type == "int":
            low = int(f.name in least_1)
            ok = _is_int(value) and low <= value < 2**63
            require(name, f.name, value, ok, f"an integer >= {low}")
        elif f.type == "bool":
            require(name, f.name, value, is_flag(value), "True or False")
