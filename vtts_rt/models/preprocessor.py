"""Settings of a checkpoint's image and video processors, held against what `patchify` does."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from vtts_rt.models.checkpoint import load_extras, read_json
from vtts_rt.types import Geometry, require

logger = logging.getLogger(__name__)

# Bounds of a frame in LM tokens by default, PerceptionConfig's and the budget rule's
# (VideoChat-R1.5).
_MIN_TOKENS, _MAX_TOKENS = 128, 768
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


def _fixed(geometry: Geometry) -> dict[str, Any]:
    """What every frame goes through; names as in preprocessor_config.json."""
    return {
        "patch_size": geometry.patch_px,
        "merge_size": geometry.merge,
        "temporal_patch_size": geometry.frames_per_pair,
        "do_resize": True,
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": geometry.mean,
        "image_std": geometry.std,
        "do_center_crop": False,
        "do_pad": False,
    }


def check_preprocessor(folder: Path, geometry: Geometry) -> None:
    """ValueError, with file, setting and value, for a processor that prepares pixels otherwise
    than `patchify`.

    The files that count are those that transformers 5.24 reads: for videos processor_config.json's
    `video_processor`, else video_preprocessor_config.json, else preprocessor_config.json; for
    images processor_config.json's `image_processor`, else preprocessor_config.json. What is not
    said is the family's. Frame rates and sizes are left to the perception settings, as the
    published loop passes its own with every call; bounds on sizes that are tighter than theirs are
    reported in one warning, unless the checkpoint's recipe says `total_pixels` itself.
    """
    sized = "total_pixels" in load_extras(folder).get("perception", {})
    nested = _read(folder / "processor_config.json")
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
        for name, expected in _fixed(geometry).items():
            value = settings.get(name)
            same = value is None or _rounded(value) == _rounded(expected)
            rule = str(list(expected) if isinstance(expected, tuple) else expected)
            require("load_model", f"{file} {name}", value, same, rule)
        if kind == "video_processor" and not sized:
            _tell_bounds(file, settings, geometry.token_px**2)


def _tell_bounds(file: str, settings: dict[str, Any], token_pixels: int) -> None:
    size = settings.get("size")
    size = size if isinstance(size, dict) else {}
    low = settings.get("min_pixels") or size.get("shortest_edge") or 0
    high = settings.get("max_pixels") or size.get("longest_edge") or math.inf
    for name, value in (("min_pixels", low), ("max_pixels", high)):
        number = isinstance(value, (int, float)) and value >= 0
        require("load_model", f"{file} {name}", value, number, "a number >= 0")
    if low > _MIN_TOKENS * token_pixels or high < _MAX_TOKENS * token_pixels:
        logger.warning(
            "%s bounds frames to %s..%s px, which is not applied: min_pixels and total_pixels of "
            "PerceptionConfig decide (a recipe may set them)",
            file,
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
