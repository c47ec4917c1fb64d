"""transformers' own generation on its own processor, for the frames, images and text of a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision_shim


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
        )

        loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.model = loaded.eval()
        self.model.generation_config.eos_token_id = None  # always the full number of tokens
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model.generation_config.pad_token_id = tokenizer.pad_token_id
        processors = {"qwen2_5_vl": Qwen2_5_VLProcessor, "qwen2_vl": Qwen2VLProcessor}
        self.processor = processors[self.model.config.model_type](
            image_processor=Qwen2VLImageProcessor(),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(cap_pixels_per_frame=False),
        )

    def inputs(self, text: str, media: Sequence[Clip | Image]) -> Any:
        """What the processor makes of a text with one pad an item; all images share one size
        rule, all clips another."""
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

    @staticmethod
    def _resize(items: Sequence[Clip | Image]) -> dict[str, Any]:
        (size,) = {item.size for item in items}
        if size is None:
            return {"do_resize": False}
        return {"size": {"shortest_edge": size[0], "longest_edge": size[1]}}
