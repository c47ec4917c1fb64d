"""What a checkpoint's image and video processors say: mean and std, and what `patchify` fixes."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from vtts_rt.models.checkpoint import load_extras, read_json
from vtts_rt.types import Geometry, require

logger = logging.getLogger(__name__)

# Tokens by default (VideoChat-R1.5): of a frame, PerceptionConfig's least and the budget rule's
# most; of all frames of a clip, the least of the fewest (4), the most that total_pixels gives.
_FRAME_TOKENS, _CLIP_TOKENS = (128, 768), (4 * 128, 2 * 12 * 128)
_NESTED, _KINDS = "processor_config.json", ("video_processor", "image_processor")
_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", _NESTED)
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC
# What every frame goes through; names as in preprocessor_config.json.
_FIXED: dict[str, Any] = {
    "do_resize": True,
    "resample": _BICUBIC,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_center_crop": False,
    "do_pad": False,
}


def read_geometry(folder: Path, own: Geometry, *, bounds_clips: bool = False) -> Geometry:
    """`own`, the geometry of a model's config, with the mean and std that its processors say.
    bounds_clips: see VideoLM.

    The files that count are those that transformers 5.24 reads: for videos processor_config.json's
    `video_processor`, else video_preprocessor_config.json, else preprocessor_config.json; for
    images processor_config.json's `image_processor`, else preprocessor_config.json. What is not
    said is `own`'s. Frame rates and sizes are left to the perception settings, as the published
    loop passes its own with every call; bounds on sizes that are tighter than theirs are reported
    in one warning, unless the checkpoint's recipe says `total_pixels` itself. ValueError, with
    file, setting and value, for a processor that prepares pixels otherwise than `patchify`, and for
    images that are normalised otherwise than videos.
    """
    sized = "total_pixels" in load_extras(folder).get("perception", {})
    nested = _read(folder / "processor_config.json")
    fixed = {
        "patch_size": own.patch_px,
        "merge_size": own.merge,
        "temporal_patch_size": own.frames_per_pair,
        **_FIXED,
    }
    found: list[Geometry] = []
    for kind, names in (
        ("video_processor", ("video_preprocessor_config.json", "preprocessor_config.json")),
        ("image_processor", ("preprocessor_config.json",)),
    ):
        if kind in nested:
            settings, file = nested[kind], f"processor_config.json {kind}"
            got = type(settings).__name__
            require("load_model", file, got, isinstance(settings, dict), "an object")
        else:
            file = next((name for name in names if (folder / name).is_file()), names[-1])
            settings = _read(folder / file)
        for name, expected in fixed.items():
            value = settings.get(name)
            same = value is None or _rounded(value) == _rounded(expected)
            require("load_model", f"{file} {name}", value, same, str(expected))
        found.append(_normalised(file, settings, own))
        if kind == "video_processor" and not sized:
            _tell_bounds(file, settings, own.token_px**2, bounds_clips)
    videos, images = found
    rule = f"{list(videos.mean)}, {list(videos.std)} as for videos"
    got = f"{list(images.mean)}, {list(images.std)}"
    require("load_model", f"{file} image_mean, image_std", got, images == videos, rule)
    return videos


def _normalised(file: str, settings: dict[str, Any], own: Geometry) -> Geometry:
    """`own` with the mean and std of a processor; they may be one number for all channels."""
    for name in ("mean", "std"):
        value = settings.get(f"image_{name}")
        if value is None:
            continue
        each: Any = [value] * 3 if isinstance(value, (int, float)) else value
        try:
            own = replace(own, mean=each) if name == "mean" else replace(own, std=each)
        except ValueError as error:
            raise ValueError(f"load_model: {file} image_{str(error).partition(': ')[2]}") from error
    return own


def write_geometry(folder: Path, geometry: Geometry, own: Geometry) -> None:
    """Say mean and std in the processor files of a folder, beside what stands there; if they are
    not those of `own`, the family's, in a new preprocessor_config.json too."""
    said = {"image_mean": list(geometry.mean), "image_std": list(geometry.std)}
    found = {path.name: read_json(path) for name in _FILES if (path := folder / name).is_file()}
    if (geometry.mean, geometry.std) != (own.mean, own.std):
        found.setdefault(_FILES[0], {})
    for name, settings in found.items():
        if name == _NESTED:
            parts = {k: v for k, v in settings.items() if k in _KINDS and isinstance(v, dict)}
            settings |= {kind: {**part, **said} for kind, part in parts.items()}
        else:
            settings |= said
        text = json.dumps(settings, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def _tell_bounds(file: str, settings: dict[str, Any], token_area: int, of_clip: bool) -> None:
    size = settings.get("size")
    size = size if isinstance(size, dict) else {}
    low = settings.get("min_pixels") or size.get("shortest_edge") or 0
    high = settings.get("max_pixels") or size.get("longest_edge") or math.inf
    for name, value in (("min_pixels", low), ("max_pixels", high)):
        number = isinstance(value, (int, float)) and value >= 0
        require("load_model", f"{file} {name}", value, number, "a number >= 0")
    least, most = _CLIP_TOKENS if of_clip else _FRAME_TOKENS
    if low > least * token_area or high < most * token_area:
        logger.warning(
            "%s bounds %s to %s..%s px, which is not applied: min_pixels and total_pixels of "
            "PerceptionConfig decide (a recipe may set them)",
            file,
            "all frames of a video together" if of_clip else "frames",
            low,
            high,
        )


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _rounded(value: Any) -> Any:
    """Floats to seven digits, about what a float32 keeps."""
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value
