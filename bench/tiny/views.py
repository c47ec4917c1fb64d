"""Single frame pairs of needle scenes with labels per merged token, for training a vision tower.

A view is what one frame pair looks like to the model: a square region of the frame resized to
VIEW_PX a side, 3x3 merged tokens. Views are drawn at the three scales at which the rounds look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from vtts_rt.data.backgrounds import Image, resize
from vtts_rt.data.needle import CARD_COLOURS, MARK_COLOURS, Card, Level, Scene, Split, make_scene
from vtts_rt.types import PixelBox

VIEW_PX = 84
GRID = 3  # merged tokens a side
TOKEN_PX = VIEW_PX // GRID
TOKENS = GRID * GRID
NUM_CARDS, NUM_MARKS = len(CARD_COLOURS), len(MARK_COLOURS)
COLOUR_INDEX = {name: i for i, name in enumerate(CARD_COLOURS)}
MARK_INDEX = {name: i for i, name in enumerate(MARK_COLOURS)}
READABLE_PX = 9.0  # a mark at least this wide in the view is to be read
MIN_MARK_PX = 5.0  # a narrower one is not to be seen; near marks have 4.9 px in the coarse view
PAIRS_PER_SCENE = 24

FloatArray = NDArray[np.float32]
NUM_ATTRIBUTES = 3 * NUM_CARDS + 4 + 4 * NUM_MARKS


@dataclass
class ViewBatch:
    """Views and labels; N pairs, 9 tokens each, 6 card colours.

    pixels: (N, 2, 84, 84, 3) uint8. centre: (N, 9, 6) a card's centre lies in the token;
    cover: (N, 9, 6) a card covers a quarter of it; card_offset: (N, 9, 2) x, y of that centre
    in the token, 0..1. mark: (N, 9, 6) the centre of a mark, large enough to be seen, on a card of
    that colour; mark_offset: (N, 9, 2); cells: (N, 9, 4) int64 colours of a readable mark, -1
    elsewhere. part: (N,) of the frame's side that the view shows.
    """

    pixels: NDArray[np.uint8]
    centre: FloatArray
    cover: FloatArray
    card_offset: FloatArray
    mark: FloatArray
    mark_offset: FloatArray
    cells: NDArray[np.int64]
    part: FloatArray

    @property
    def card_known(self) -> FloatArray:
        """(N,) 1 where cards are small enough to be placed."""
        return (self.part > 0.25).astype(np.float32)


def view_pixels(
    scene: Scene, time_seconds: float, box: PixelBox, rng: np.random.Generator | None = None
) -> Image:
    """A region as the model sees it in the encoded clip: (84, 84, 3) uint8.

    Small regions pass through 4:2:0 chroma as in video (in larger ones the resize averages it
    away); `rng` adds the noise and softness of a codec.
    """
    if box.x1 - box.x0 > 3 * VIEW_PX // 2:
        view = resize(scene.render(time_seconds, box), VIEW_PX, VIEW_PX)
    else:
        # Chroma samples sit on even pixels of the frame.
        outer = PixelBox(
            box.x0 & ~1, box.y0 & ~1, min(box.x1 + 1, scene.width) & ~1, (box.y1 + 1) & ~1
        )
        region = halve_chroma(scene.render(time_seconds, outer))
        inner = region[box.y0 - outer.y0 : box.y1 - outer.y0, box.x0 - outer.x0 : box.x1 - outer.x0]
        view = resize(inner, VIEW_PX, VIEW_PX)
    if rng is not None and rng.random() < 0.5:
        noise = rng.normal(0.0, float(rng.uniform(0.5, 5.0)), (VIEW_PX // 2, VIEW_PX // 2, 3))
        noise = noise.repeat(2, axis=0).repeat(2, axis=1)
        view = (view + noise).clip(0, 255).astype(np.uint8)
    return view


# Luma and chroma of BT.601, as swscale converts frames of this size without a colour tag.
_TO_YUV = torch.tensor(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
)
_TO_RGB = torch.linalg.inv(_TO_YUV)


def halve_chroma(image: Image) -> Image:
    """What 4:2:0 video leaves of an image of even size: (H, W, 3) uint8 -> the same."""
    height, width = image.shape[:2]
    yuv = torch.from_numpy(image).float().view(-1, 3) @ _TO_YUV.T
    planes = yuv.T.reshape(1, 3, height, width)
    chroma = F.avg_pool2d(planes[:, 1:], 2)
    chroma = F.interpolate(chroma, scale_factor=2.0, mode="bilinear", align_corners=False)
    rgb = torch.cat((planes[:, :1], chroma), dim=1).view(3, -1).T @ _TO_RGB.T
    result: Image = rgb.round_().clamp_(0, 255).byte().view(height, width, 3).numpy()
    return result


def _square(scene: Scene, x: float, y: float, side: int) -> PixelBox:
    x0 = int(np.clip(x - side / 2, 0, scene.width - side))
    y0 = int(np.clip(y - side / 2, 0, scene.height - side))
    return PixelBox(x0, y0, x0 + side, y0 + side)


def _centre(box: PixelBox) -> tuple[float, float]:
    return (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2


# How often a view of each scale is of a card of each level: as rounds meet them, and more often
# where there is something to read.
_WANTED: tuple[dict[Level, float], ...] = (
    {"glance": 3, "near": 1, "far": 1, "twin": 1},
    {"glance": 0.5, "near": 3, "far": 2, "twin": 1.5},
    {"glance": 0.1, "near": 0.3, "far": 3, "twin": 1.5},
)


def sample_view(scene: Scene, rng: np.random.Generator) -> tuple[float, float, PixelBox]:
    """Moments of the two frames (seconds) and the region of a random view of a scene."""
    scale = int(rng.choice(3, p=(0.3, 0.36, 0.34)))
    wanted = np.array([_WANTED[scale][card.level] for card in scene.all_cards])
    card = scene.all_cards[int(rng.choice(len(wanted), p=wanted / wanted.sum()))]
    gap = float(rng.choice(((1.0, 1.0, 0.5, 0.25), (0.5, 0.25), (0.25, 0.125))[scale]))
    of_mark = not card.blank and rng.random() < (0.1, 0.7, 0.85)[scale]
    near = card.mark_span if of_mark else card.span
    start = float(rng.uniform(near.start_seconds - 0.8 * gap, near.end_seconds + 0.1))
    start = float(np.clip(start, 0.0, scene.duration_seconds - gap))
    if scale == 0:
        return start, gap, PixelBox(0, 0, scene.width, scene.height)
    if scale == 1:
        side = round(scene.width * float(rng.uniform(0.38, 0.42)))
        (x, y), spread = _centre(card.box), side * 0.4
    else:
        side = round(scene.width * float(rng.uniform(0.115, 0.135)))
        (x, y), spread = _centre(card.mark_box), side * 0.42
    if rng.random() < 0.1:
        x, y = rng.uniform(0, scene.width, 2)
    dx, dy = rng.uniform(-spread, spread, 2)
    return start, gap, _square(scene, x + dx, y + dy, side)


def empty_batch(size: int, pixels: bool = True) -> ViewBatch:
    """A batch of `size` views without content; pixels: whether they will be drawn."""

    def zeros(*shape: int) -> FloatArray:
        return np.zeros((size, *shape), np.float32)

    return ViewBatch(
        np.empty((size if pixels else 0, 2, VIEW_PX, VIEW_PX, 3), np.uint8),
        centre=zeros(TOKENS, NUM_CARDS),
        cover=zeros(TOKENS, NUM_CARDS),
        card_offset=zeros(TOKENS, 2),
        mark=zeros(TOKENS, NUM_CARDS),
        mark_offset=zeros(TOKENS, 2),
        cells=np.full((size, TOKENS, 4), -1, np.int64),
        part=zeros(),
    )


def label_view(
    batch: ViewBatch, row: int, scene: Scene, times: Sequence[float], box: PixelBox
) -> None:
    """Write the labels of a view of `box` with frames at `times` (seconds) into a row."""
    batch.part[row] = (box.x1 - box.x0) / scene.width
    per_px = GRID / (box.x1 - box.x0)  # tokens a source pixel
    for card in scene.all_cards:
        if not any(card.span.start_seconds <= t < card.span.end_seconds for t in times):
            continue
        colour = COLOUR_INDEX[card.colour]
        np.maximum(cover(card, box), batch.cover[row, :, colour], out=batch.cover[row, :, colour])
        x, y = _centre(card.box)
        place = (x - box.x0) * per_px, (y - box.y0) * per_px
        _place(batch.centre, batch.card_offset, row, colour, *place)
        if any(card.mark_span.start_seconds <= t < card.mark_span.end_seconds for t in times):
            _label_mark(batch, row, card, box, per_px)


def cover(card: Card, box: PixelBox) -> FloatArray:
    """(9,) 1 for the tokens of a view of `box` of which the card covers a quarter."""
    per_px = GRID / (box.x1 - box.x0)
    edges = np.arange(GRID)
    x0, x1 = (card.box.x0 - box.x0) * per_px, (card.box.x1 - box.x0) * per_px
    y0, y1 = (card.box.y0 - box.y0) * per_px, (card.box.y1 - box.y0) * per_px
    wide = (np.minimum(x1, edges + 1) - np.maximum(x0, edges)).clip(0, 1)
    high = (np.minimum(y1, edges + 1) - np.maximum(y0, edges)).clip(0, 1)
    return (np.outer(high, wide).ravel() >= 0.25).astype(np.float32)


def _label_mark(batch: ViewBatch, row: int, card: Card, box: PixelBox, per_px: float) -> None:
    width_px = (card.mark_box.x1 - card.mark_box.x0) * per_px * TOKEN_PX
    if width_px < MIN_MARK_PX:
        return
    x, y = _centre(card.mark_box)
    x, y = (x - box.x0) * per_px, (y - box.y0) * per_px
    token = _place(batch.mark, batch.mark_offset, row, COLOUR_INDEX[card.colour], x, y)
    reach = width_px / 2 / TOKEN_PX
    inside = reach <= x <= GRID - reach and reach <= y <= GRID - reach
    if token is not None and inside and width_px >= READABLE_PX:
        batch.cells[row, token] = [MARK_INDEX[name] for name in card.pattern]


def _place(
    flags: FloatArray, offsets: FloatArray, row: int, colour: int, x: float, y: float
) -> int | None:
    """Mark the token that holds the point (x, y), in tokens; None when it is out of view."""
    if not (0 <= x < GRID and 0 <= y < GRID):
        return None
    token = int(y) * GRID + int(x)
    flags[row, token, colour] = 1
    offsets[row, token] = (x % 1, y % 1)
    return token


def attributes(labels: ViewBatch) -> FloatArray:
    """(N, 9, NUM_ATTRIBUTES): the labels as one vector a token."""
    has_mark = labels.mark.max(axis=-1, keepdims=True)
    # Row -1 of the padded identity is zero: no readable mark.
    cells = np.eye(NUM_MARKS + 1, dtype=np.float32)[labels.cells][..., :NUM_MARKS]
    parts = (
        labels.centre,
        labels.cover,
        2 * labels.card_offset,
        labels.mark,
        2 * labels.mark_offset * has_mark,
        cells.reshape(len(cells), TOKENS, 4 * NUM_MARKS),
    )
    return np.concatenate(parts, axis=-1)


def make_view_batch(seed: int, index: int, size: int, split: Split = "train") -> ViewBatch:
    """Batch `index` of random views: a function of (seed, index) alone.

    Drawn from size / PAIRS_PER_SCENE scenes that no other batch has.
    """
    rng = np.random.default_rng([seed, index, 77])
    batch = empty_batch(size)
    for row in range(size):
        if row % PAIRS_PER_SCENE == 0:
            scene = make_scene(int(rng.integers(1 << 40)), split, difficulty="graded")
        start, gap, box = sample_view(scene, rng)
        times = tuple(
            int(t * scene.source_fps + 1e-6) / scene.source_fps for t in (start, start + gap)
        )
        for i, t in enumerate(times):
            batch.pixels[row, i] = view_pixels(scene, t, box, rng)
        label_view(batch, row, scene, times, box)
    return batch
