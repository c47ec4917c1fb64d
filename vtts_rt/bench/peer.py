"""A peer: the published loop of visual test-time scaling, on transformers.

What the released code of VideoChat-R1.5 does, on a current stack and without handicap: every
round opens the file, indexes it, decodes the sampled frames, resizes, tokenises and generates
from a fresh prompt; of an earlier round only the clue travels. PyAV stands for decord, with
the same plan (index at open, then seek or read on, whichever is nearer). Which frames, at what
size and in what words is the `official` strategy's plan and prompt, so both sides see the same.
The perception's parity says whose resize and positions: those of the release, or those of the
installed transformers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtts_rt.bench.frames import ArrayReader, FileReader, resized
from vtts_rt.bench.model import allow_broken_torchvision
from vtts_rt.config import ResolvedPerception
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.perception.clue import Clue
from vtts_rt.perception.plan import RoundHistory
from vtts_rt.perception.prompts import PromptTemplates
from vtts_rt.perception.strategy import build_prompt, plan_round
from vtts_rt.types import ReuseStats, RoundTimings, Segment, VideoMetadata


def file_metadata(reader: FileReader | ArrayReader, name: str) -> VideoMetadata:
    """What planning needs to know of an opened file; times count frames at the average rate."""
    return VideoMetadata(
        video_id=name,
        num_frames=reader.num_frames,
        source_fps=reader.source_fps,
        duration_seconds=reader.num_frames / reader.source_fps,
        height=reader.height,
        width=reader.width,
        decoder="pyav",
        timestamps_seconds=np.arange(reader.num_frames) / reader.source_fps,
    )


def patch_rows(
    frames: np.ndarray | Tensor, resized_hw: tuple[int, int], *, fixed_point: bool = True
) -> Tensor:
    """(P, 1176) float32 rows of transformers' Qwen2-VL video processor from (N, H, W, 3) uint8,
    on the device of the frames.

    The same operations: antialiased bicubic resize (fixed_point: its own, else the release's),
    fused rescale and normalise, patches of 2 x 2 merged rows; an odd last frame is repeated.
    """
    video = resized(frames, resized_hw, fixed_point=fixed_point)
    mean, std = (
        (255 * torch.tensor(v).view(3, 1, 1)).to(video.device)
        for v in (GEOMETRY.mean, GEOMETRY.std)
    )
    video = video.contiguous().float().sub_(mean).div_(std)
    if len(video) % 2:
        video = torch.cat((video, video[-1:]))
    height, width = GEOMETRY.grid_hw(resized_hw)
    merge = GEOMETRY.merge
    grid, cell = (height // merge, width // merge), (merge, GEOMETRY.patch_px)
    patches = video.view(len(video) // 2, 2, 3, grid[0], *cell, grid[1], *cell)
    rows = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return rows.reshape(len(video) // 2 * height * width, -1)


@dataclass(slots=True)
class RoundSample:
    """One measured round of any side. sizes: (height, width) px of each vision segment.
    prompt_tokens: the whole context, what was reused included. reuse: our counters, or as many of
    them as a peer counts; None for the loop on transformers, which keeps nothing."""

    token_ids: list[int]
    frame_indices: list[int]
    sizes: list[tuple[int, int]]
    prompt_tokens: int
    timings: RoundTimings
    reuse: ReuseStats | None = None


class PublishedLoop:
    """Qwen2_5_VLForConditionalGeneration.generate, one fresh prompt a round, greedy.

    model, tokenizer: transformers'. Frames are resized and made into rows on the model's device.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        from transformers import GenerationConfig

        self.model, self.tokenizer = model, tokenizer
        # Every side is greedy and without penalties, whatever the checkpoint's file says. Every
        # round generates its full number of tokens, without masking the end token: that would
        # cost a pass over the logits and change what is chosen.
        self.model.generation_config = GenerationConfig(
            eos_token_id=None, pad_token_id=self.tokenizer.pad_token_id
        )
        self._clock = _ForwardClock(self.model)
        self._own_positions = self.model.model.get_rope_index

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> PublishedLoop:
        """A checkpoint, with SDPA."""
        allow_broken_torchvision()
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

        loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            model, dtype=dtype, attn_implementation="sdpa"
        ).to(device)
        return cls(loaded.eval(), AutoTokenizer.from_pretrained(model))

    def ask(
        self,
        video: str | Path | ArrayReader,
        question: str,
        *,
        perception: ResolvedPerception,
        clues: Sequence[Clue],
        max_tokens: int,
        options: Sequence[str] = (),
        templates: PromptTemplates | None = None,
    ) -> list[RoundSample]:
        """All rounds of a question; `clues` replace what the model says after each round."""
        released = perception.parity == "release"
        self.model.model.get_rope_index = (
            self._released_positions if released else self._own_positions
        )
        history: list[RoundHistory] = []
        rounds = []
        for index in range(perception.max_rounds):
            began = time.perf_counter()
            timings = RoundTimings()
            opened = video if isinstance(video, ArrayReader) else FileReader(video)
            with opened as reader:
                metadata = file_metadata(reader, "the video")
                plan = plan_round("official", perception, [metadata], history, index)
                words = templates or PromptTemplates()
                prompt = build_prompt(
                    perception, CHAT, words, plan, history, question=question, options=options
                )
                (segment,) = plan.segments
                indices = list(plan.frame_indices)
                frames = reader.frames(indices)
            decoded = time.perf_counter()
            inputs = self._inputs(CHAT.text(prompt), segment, frames, fixed_point=not released)
            prepared = time.perf_counter()
            timings.decode = 1e3 * (decoded - began)
            timings.preprocess = 1e3 * (prepared - decoded)
            token_ids = self._generate(inputs, max_tokens, timings)
            timings.total = 1e3 * (time.perf_counter() - began)
            size, num_tokens = segment.resized_hw, int(inputs["input_ids"].shape[1])
            rounds.append(RoundSample(token_ids, indices, [size], num_tokens, timings))
            if index < len(clues):
                history.append(RoundHistory(plan, clues[index], forced=True))
        return rounds

    def _released_positions(
        self, input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """transformers 5's positions of one prompt with one video, but the text behind the video
        goes on from its largest one, as it did when the release was made (4.49 to 4.51)."""
        positions, _ = self._own_positions(input_ids, *args, **kwargs)
        pads = (input_ids[0] == self.model.config.video_token_id).nonzero()
        end = int(pads[-1]) + 1
        positions[..., end:] += positions[..., :end].max() + 1 - positions[0, 0, end]
        return positions, positions.max() + 1 - torch.full_like(input_ids[:, :1], len(input_ids[0]))

    def _inputs(
        self, text: str, segment: Segment, frames: np.ndarray, *, fixed_point: bool
    ) -> dict[str, Tensor]:
        """What Qwen2_5_VLProcessor returns for one video and its text."""
        pad, device = CHAT.video_pad, self.model.device
        expanded = text.replace(pad, pad * segment.num_tokens)
        ids = torch.tensor([self.tokenizer(expanded)["input_ids"]], device=device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.model.config.video_token_id).int() * 2,
            "pixel_values_videos": patch_rows(
                torch.from_numpy(frames).to(device), segment.resized_hw, fixed_point=fixed_point
            ),
            "video_grid_thw": torch.tensor([segment.grid_thw], device=device),
            "second_per_grid_ts": torch.tensor([segment.seconds_per_grid], device=device),
        }

    def _generate(
        self, inputs: dict[str, Tensor], max_tokens: int, timings: RoundTimings
    ) -> list[int]:
        began = time.perf_counter()
        self._clock.start()
        with torch.inference_mode():
            out = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        ended = time.perf_counter()
        timings.vision = 1e3 * self._clock.vision_seconds
        timings.prefill = 1e3 * (self._clock.first_forward_ended - began) - timings.vision
        timings.generate = 1e3 * (ended - self._clock.first_forward_ended)
        timings.ttft = timings.decode + timings.preprocess + timings.vision + timings.prefill
        return [int(token) for token in out[0, inputs["input_ids"].shape[1] :]]


class _ForwardClock:
    """When the vision tower ran and when the first forward pass of a generation ended; on a GPU
    once its kernels have."""

    def __init__(self, model: Any) -> None:
        self._cuda = model.device.type == "cuda"
        self.start()
        model.model.visual.register_forward_pre_hook(self._vision_began)
        model.model.visual.register_forward_hook(self._vision_ended)
        model.register_forward_hook(self._forward_ended)

    def start(self) -> None:
        self.vision_seconds = 0.0
        self.first_forward_ended = 0.0

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _vision_began(self, *_: Any) -> None:
        self._began = self._now()

    def _vision_ended(self, *_: Any) -> None:
        self.vision_seconds += self._now() - self._began

    def _forward_ended(self, *_: Any) -> None:
        if not self.first_forward_ended:
            self.first_forward_ended = self._now()
