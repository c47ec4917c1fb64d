"""transformers' own generation on its own processor, for the frames, images and text of a round."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision_shim

_PAIRS = re.compile(r"(<\d+\.\d seconds><\|vision_start\|><\|video_pad\|><\|vision_end\|>)+")


@dataclass
class Clip:
    """What the processor is told of one video: the frames shown, and the whole it comes from.

    frames: (T, H, W, 3) uint8. size: fewest and most pixels of a frame; None where they have their
    size already.
    """

    frames: np.ndarray
    frame_indices: Sequence[int]
    num_frames: int
    source_fps: float
    size: tuple[int, int] | None


@dataclass
class Image:
    """pixels: (H, W, 3) uint8. size: as of a Clip."""

    pixels: np.ndarray
    size: tuple[int, int] | None


@dataclass
class Generation:
    """logprobs: natural log, of the chosen tokens. seconds_per_grid: of each video; None where the
    family does without."""

    token_ids: list[int]
    logprobs: list[float]
    num_prompt_tokens: int
    seconds_per_grid: list[float] | None


class TransformersPeer:
    """transformers' model and processor over one checkpoint folder, float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        torchvision_shim.install()
        from transformers import (
            AutoModelForImageTextToText,
            AutoTokenizer,
            Qwen2_5_VLProcessor,
            Qwen2VLImageProcessor,
            Qwen2VLProcessor,
            Qwen2VLVideoProcessor,
            Qwen3VLProcessor,
            Qwen3VLVideoProcessor,
        )

        loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.model = loaded.eval()
        self.model.generation_config.eos_token_id = None  # always the full number of tokens
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model.generation_config.pad_token_id = tokenizer.pad_token_id
        processors = {
            "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
            "qwen2_vl": (Qwen2VLProcessor, Qwen2VLVideoProcessor),
            "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
        }
        whole, of_videos = processors[self.model.config.model_type]
        self._by_pair = of_videos is Qwen3VLVideoProcessor
        names = ("patch_size", "image_mean", "image_std")
        self.processor = whole(
            image_processor=Qwen2VLImageProcessor(**{n: getattr(of_videos, n) for n in names}),
            tokenizer=tokenizer,
            video_processor=of_videos(cap_pixels_per_frame=False),
        )

    def inputs(self, text: str, media: Sequence[Clip | Image]) -> Any:
        """What the processor makes of a text with one pad an item, or of pairs behind their times
        where it writes those itself; all images share one size rule, all clips another."""
        if self._by_pair:
            text = _PAIRS.sub("<|video_pad|>", text)
        clips = [item for item in media if isinstance(item, Clip)]
        images = [item for item in media if isinstance(item, Image)]
        more: dict[str, Any] = {}
        if clips:
            more["videos"] = [torch.from_numpy(c.frames).permute(0, 3, 1, 2) for c in clips]
            more["videos_kwargs"] = {
                **self._resize(clips),
                "do_sample_frames": False,
                "video_metadata": [
                    {
                        "fps": clip.source_fps,
                        "total_num_frames": clip.num_frames,
                        "frames_indices": list(clip.frame_indices),
                    }
                    for clip in clips
                ],
            }
        if images:
            more["images"] = [torch.from_numpy(i.pixels).permute(2, 0, 1) for i in images]
            more["images_kwargs"] = self._resize(images)
        return self.processor(text=[text], return_tensors="pt", **more)

    def generate(self, text: str, media: Sequence[Clip | Image], max_tokens: int) -> Generation:
        """Greedy tokens after a text."""
        return self.continued(self.inputs(text, media), max_tokens)

    def appended(self, inputs: Any, token_ids: Sequence[int], more: Any) -> dict[str, Any]:
        """Inputs of a conversation: a prompt, what was generated, and the prompt after it, both
        with videos."""
        said = torch.tensor([list(token_ids)])
        text = {
            "input_ids": said,
            "attention_mask": torch.ones_like(said),
            "mm_token_type_ids": torch.zeros_like(said),
        }
        joined = {k: torch.cat((inputs[k], v, more[k]), dim=1) for k, v in text.items()}
        for name in ("pixel_values_videos", "video_grid_thw"):
            joined[name] = torch.cat((inputs[name], more[name]))
        joined["second_per_grid_ts"] = [*inputs["second_per_grid_ts"], *more["second_per_grid_ts"]]
        return joined

    def continued(self, inputs: Any, max_tokens: int, **more: Any) -> Generation:
        """Greedy tokens after inputs; `more` goes to generate, e.g. other position ids."""
        timed = hasattr(self.model.config.vision_config, "tokens_per_second")
        seconds = [float(s) for s in inputs.get("second_per_grid_ts", [])] if timed else None
        with torch.inference_mode():
            out = self.model.generate(
                **inputs,
                **more,
                max_new_tokens=max_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        num_prompt = inputs["input_ids"].shape[1]
        token_ids = out.sequences[0, num_prompt:].tolist()
        rows = torch.log_softmax(torch.cat(out.logits).double(), dim=-1)
        logprobs = [float(row[token]) for row, token in zip(rows, token_ids, strict=True)]
        return Generation(token_ids, logprobs, num_prompt, seconds)

    def _resize(self, items: Sequence[Clip | Image]) -> dict[str, Any]:
        (size,) = {item.size for item in items}
        if size is None:
            return {"do_resize": False}
        nums = [1]  # bounds are a frame's, or of all frames of a clip
        if self._by_pair:
            nums = [len(item.frames) if isinstance(item, Clip) else 1 for item in items]
        return {"size": {"shortest_edge": min(nums) * size[0], "longest_edge": max(nums) * size[1]}}
