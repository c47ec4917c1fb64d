"""Frozen configuration objects and the package's environment variables.

`PerceptionConfig` says how a video is looked at, `EngineConfig` how the engine spends memory.
Every default names its source.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vtts_rt.types import DECODERS, Decoder, MropeMode, SamplingParams, Strategy, require

QUANTIZATIONS = ("int8", "fp8")
STRATEGIES: tuple[Strategy, ...] = ("official", "grid", "refresh", "append")
MROPE_MODES: tuple[MropeMode, ...] = ("qwen", "hf5")

# name -> what it does; the whole list of variables the installed package reads.
ENVIRONMENT_VARIABLES = {
    "VTTS_RT_BACKEND": "op=backend[,op=backend]: force an op's backend, e.g. patchify=reference",
    "VTTS_RT_CACHE_DIR": "folder of the video index cache (~/.cache/vtts_rt), or `off`",
    "VTTS_RT_LOG": "log level of the `vtts_rt` logger (debug, info, warning, error)",
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
    folder = os.environ.get("VTTS_RT_CACHE_DIR")
    if folder == "off":
        return None
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "vtts_rt")


@dataclass(frozen=True, slots=True, kw_only=True)
class PerceptionConfig:
    """How one question looks at its video(s). What is not passed is left to the model.

    strategy: None takes the model's own default ("append" for models trained with it,
        "official" otherwise). max_rounds: looks at the video, at least 1.
    sample_fps: frames sampled a second in a coarse pass (VideoChat-R1.5: 2.0).
    min_frames, max_frames: bounds on the frames of a round, even (VideoChat-R1.5: 4, 512).
    min_pixels, total_pixels: px; the budget rule of VideoChat-R1.5 / qwen-vl-utils: a frame
        gets at most max(min(768*28^2, total_pixels / num_frames * 2), 1.05 * min_pixels).
    key_ratio: how much denser key spans are sampled by `official` (VideoChat-R1.5: 1.5).
    focus_frames: most frames of a later look in `refresh` and `append`; 0 is half of the first
        look's, at least 8, so that a run costs about two looks however many rounds it has.
    focus_margin_cells: how far such a look reaches beyond the clue's spans, in time steps of
        the look that the clue is about.
    mrope: "qwen" = positions of the original release and of vLLM, "hf5" = transformers 5.23.
    text_first: in `refresh` and `append` the question stands before the video; False puts it
        behind the first look, whose KV then serves every question about the video.
    time_labels: write `<12.0s>` before each pair in `refresh` and `append`.
    stop_when_stable: end early when two successive rounds gave the same non-empty answer.
    constrain_clues: let a grammar keep what the model writes inside a clue tag parseable.
    prompts: path of a file that overrides the wording of the prompts.
    """

    strategy: Strategy | None = None
    max_rounds: int = 3
    sample_fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 512
    min_pixels: int = 128 * 28 * 28
    total_pixels: int = 128 * 12 * 28 * 28
    key_ratio: float = 1.5
    focus_frames: int = 0
    focus_margin_cells: float = 0.0
    mrope: MropeMode = "qwen"
    text_first: bool = True
    time_labels: bool = True
    stop_when_stable: bool = False
    constrain_clues: bool = False
    prompts: str | None = None
    # Names that were passed: a model's own defaults fill the others (`with_defaults`).
    explicit: frozenset[str] = field(init=False, repr=False, compare=False)

    def __new__(cls, **passed: Any) -> PerceptionConfig:
        self = object.__new__(cls)
        object.__setattr__(self, "explicit", frozenset(passed))
        return self

    def __post_init__(self) -> None:
        def check(argument: str, ok: bool, rule: str) -> None:
            require("PerceptionConfig", argument, getattr(self, argument), ok, rule)

        check(
            "strategy",
            self.strategy is None or self.strategy in STRATEGIES,
            f"one of {', '.join(STRATEGIES)}",
        )
        check("max_rounds", 1 <= self.max_rounds <= 64, "in 1..64")
        check("sample_fps", 0.0 < self.sample_fps <= 1000.0, "in (0, 1000]")
        check("min_frames", self.min_frames >= 2 and self.min_frames % 2 == 0, "even and >= 2")
        check(
            "max_frames",
            self.max_frames >= self.min_frames and self.max_frames % 2 == 0,
            "even and >= min_frames",
        )
        check("min_pixels", self.min_pixels >= 1, ">= 1")
        check("total_pixels", self.total_pixels >= 1, ">= 1")
        check("key_ratio", 0.0 < self.key_ratio < 1e3, "in (0, 1000)")
        check(
            "focus_frames", self.focus_frames >= 0 and self.focus_frames % 2 == 0, "even and >= 0"
        )
        check("focus_margin_cells", 0.0 <= self.focus_margin_cells <= 1e6, "in [0, 1e6]")
        check("mrope", self.mrope in MROPE_MODES, f"one of {', '.join(MROPE_MODES)}")

    def with_defaults(self, defaults: dict[str, Any]) -> PerceptionConfig:
        """A copy in which `defaults` (a model's own settings) fill every field not passed."""
        names = {f.name for f in fields(self) if f.init}
        for name in defaults:
            require("PerceptionConfig", "setting", name, name in names, f"one of {sorted(names)}")
        passed = {name: getattr(self, name) for name in self.explicit}
        return PerceptionConfig(**{**defaults, **passed})


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Memory, batching and threads of one engine.

    page_size: tokens in a KV page. kv_bytes: budget of KV pages, 0 for a share of the memory
        that is free once the model is loaded (`engine/memory.py`).
    vision_cache_bytes, vision_host_bytes, vision_disk_bytes: budgets of the tiers of the vision
        cache: where the model runs, in host memory behind an accelerator, in files under
        `vision_disk_path`. frame_store_bytes: budget of decoded frames in host memory.
    device_frame_store_bytes: budget of those that a decoder leaves on an accelerator; the default
        holds 97 frames of 1280x720.
    max_batch_tokens: most tokens in one forward pass; longer prompts are prefilled in chunks,
        between which others decode. max_sequences: most requests in work at once.
    max_wait_steps: forward passes after which the oldest waiting request gets the place of the
        newest running one, which goes on later from where it was.
    draft_tokens: most tokens drafted from earlier rounds and verified in one forward pass, 0
        for none; never changes what is generated. With the one that is certain 15 are the rows
        that the CPU's decoding kernels take at once. prefix_cache: reuse KV between requests.
    speculative_fetch: fetch the frames of a clue while the answer that holds it goes on, and keep
        those that lie beside frames decoded anyway.
    cuda_graphs: decode as CUDA graphs, the next step launched before the tokens of the last are
        seen; None where the model runs on CUDA. Never changes what is generated.
    threads: CPU threads for torch and patchify (0: leave as they are).
    decoder: of video files, as `open_video`: "auto" is DALI where the model's GPU has NVDEC and
        DALI is installed, else PyAV; "pyav"; "dali".
    """

    page_size: int = 16
    kv_bytes: int = 0
    vision_cache_bytes: int = 512 << 20
    vision_host_bytes: int = 0
    vision_disk_bytes: int = 0
    vision_disk_path: str = ""
    frame_store_bytes: int = 1 << 30
    device_frame_store_bytes: int = 256 << 20
    max_batch_tokens: int = 4096
    max_sequences: int = 64
    max_wait_steps: int = 256
    draft_tokens: int = 15
    prefix_cache: bool = True
    speculative_fetch: bool = True
    cuda_graphs: bool | None = None
    threads: int = 0
    decoder: Decoder = "auto"

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, int) and not isinstance(value, bool):
                low = int(f.name in ("page_size", "max_sequences", "max_wait_steps"))
                require("EngineConfig", f.name, value, value >= low, f">= {low}")
        # Every running request decodes in every pass, and one more token must move a prefill.
        low = self.max_sequences + 1
        tokens = self.max_batch_tokens
        require("EngineConfig", "max_batch_tokens", tokens, tokens >= low, f">= {low}")
        graphs = self.cuda_graphs
        known = graphs is None or isinstance(graphs, bool)
        require("EngineConfig", "cuda_graphs", graphs, known, "True, False or None")
        names = ", ".join(DECODERS)
        require(
            "EngineConfig", "decoder", self.decoder, self.decoder in DECODERS, f"one of {names}"
        )
        path, disk = self.vision_disk_path, self.vision_disk_bytes
        require("EngineConfig", "vision_disk_path", path, bool(path) or not disk, "a folder")


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Shape of a Qwen2.5-VL vision tower; names follow transformers' `vision_config`."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = ()
    tokens_per_second: float = 2.0
    rms_norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class LanguageConfig:
    """Shape of a Qwen2.5-VL language model; names follow transformers' `text_config`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole model: towers, special token ids, stop tokens, default perception settings and what
    the checkpoint says of sampling."""

    vision: VisionConfig
    language: LanguageConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]
    perception: dict[str, Any] = field(default_factory=dict, hash=False)
    sampling: SamplingParams = SamplingParams()
