"""How many frames and how many pixels a view gets, and how it is resized: the rules of Qwen2.5-VL,
in tokens of the model that is shown the view.

Parity decides where the released code of VideoChat-R1.5 and transformers 5 differ.
"""

from __future__ import annotations

import math

from vtts_rt.config import ResolvedPerception
from vtts_rt.types import Parity, ResizeKernel, require

# qwen-vl-utils, VIDEO_MAX_PIXELS: no frame gets more tokens, whatever the budget.
MAX_FRAME_TOKENS = 768
# VideoChat-R1.5 (my_vision_process.py), MIN_PIXELS: an image gets at least so many tokens there.
MIN_IMAGE_TOKENS = 4
# transformers, Qwen2VLImageProcessor: larger aspect ratios are an error there.
MAX_ASPECT = 200


def resize_kernel(parity: Parity, is_image: bool) -> ResizeKernel:
    """How views become pixels: the release has torchvision v1 resize videos, PIL images."""
    if parity == "transformers":
        return "fixed"
    return "pil" if is_image else "float"


def smart_resize(
    height: int,
    width: int,
    min_pixels: int,
    max_pixels: float,
    token_px: int,
    parity: Parity = "transformers",
) -> tuple[int, int]:
    """(height, width) px of a view: multiples of token_px, aspect kept, area between the bounds.

    Equal to transformers' function of that name, or to the release's, which rounds a side up to
    token_px before it looks at the bounds; Python's half-to-even `round` included. Beyond their
    aspect limit of 200, where both raise, the longer side counts as 200 times the shorter one: the
    view is then squeezed. The bounds give way to the token_px a side.
    """
    require("smart_resize", "height, width", (height, width), min(height, width) >= 1, ">= 1")
    shorter = min(height, width)
    height, width = min(height, shorter * MAX_ASPECT), min(width, shorter * MAX_ASPECT)
    h = round(height / token_px) * token_px
    w = round(width / token_px) * token_px
    if parity == "release":
        h, w = max(h, token_px), max(w, token_px)
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h = max(token_px, math.floor(height / beta / token_px) * token_px)
        w = max(token_px, math.floor(width / beta / token_px) * token_px)
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * beta / token_px) * token_px
        w = math.ceil(width * beta / token_px) * token_px
    # Only reached with a side below half a token and a min_pixels below one.
    return max(h, token_px), max(w, token_px)


def frame_cap(config: ResolvedPerception, num_frames: int) -> float:
    """Most pixels of one of `num_frames` frames that share the budget of a round."""
    share = config.total_pixels / num_frames * 2
    most = MAX_FRAME_TOKENS * config.geometry.token_px**2
    return max(min(most, share), int(config.min_pixels * 1.05))


def view_size(
    config: ResolvedPerception,
    height: int,
    width: int,
    num_frames: int,
    most_px: float = math.inf,
) -> tuple[int, int]:
    """(height, width) px at which a view of `height` x `width` source px is shown: one of
    num_frames that share the budget of a round, of most_px at most."""
    cap = min(frame_cap(config, num_frames), most_px)
    least = min(config.min_pixels, int(cap))
    token_px = config.geometry.token_px
    return smart_resize(height, width, least, cap, token_px, config.parity)


def image_size(
    config: ResolvedPerception,
    height: int,
    width: int,
    num_images: int = 1,
    *,
    is_crop: bool = False,
) -> tuple[int, int]:
    """(height, width) px of one of `num_images` images that share the budget of a round.

    Under parity "release" a whole image gets MIN_IMAGE_TOKENS at least: 224 x 224 stays as it is. A
    crop is enlarged to config.min_pixels, as is an image under "transformers".
    """
    token_px = config.geometry.token_px
    least, most = config.min_pixels, frame_cap(config, 2 * num_images)
    if config.parity == "release" and not is_crop:
        share = config.total_pixels / num_images
        least = MIN_IMAGE_TOKENS * token_px**2
        most = max(min(MAX_FRAME_TOKENS * token_px**2, share), least)
    return smart_resize(height, width, least, most, token_px, config.parity)


def smart_nframes(config: ResolvedPerception, num_frames: int, source_fps: float) -> int:
    """Frames sampled from a video by the rule of qwen-vl-utils: even, within the bounds.

    0 for a video of one frame, which that rule does not know.
    """
    wanted = num_frames / source_fps * config.sample_fps
    within = min(max(wanted, config.min_frames), config.max_frames, num_frames)
    return math.floor(within / 2) * 2
