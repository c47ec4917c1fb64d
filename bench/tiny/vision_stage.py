"""Stage `vision`: the tower and merger alone, on single frame pairs with token-level labels.

Linear heads read the merged features: which card's centre lies in a token, which cards cover
it, where in the token, whether a mark is there, and the four colours of a readable mark. What
a linear head can read, the language model can read; the heads are thrown away afterwards.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tiny.views import (
    NUM_CARDS,
    NUM_MARKS,
    TOKEN_PX,
    TOKENS,
    VIEW_PX,
    FloatArray,
    ViewBatch,
    attributes,
)
from vtts_rt.models.base import VideoLM
from vtts_rt.ops.patchify import PatchifyJob, patchify
from vtts_rt.types import PixelBox


class SketchHeads(nn.Module):
    """Fixed linear read-outs of merged features: (N * 9, C) -> named logits, (N, 9, k) each.

    The pseudo-inverse of the sketch matrix takes features back to attributes. Nothing in it is
    learned, so the tower has to write what the language model was taught to read.
    """

    SIZES = {
        "centre": NUM_CARDS,
        "cover": NUM_CARDS,
        "card_offset": 2,
        "mark": NUM_CARDS,
        "mark_offset": 2,
        "cells": 4 * NUM_MARKS,
    }
    _SHARPNESS = 8.0  # logits of attribute 0 and 1 are -4 and 4

    read: Tensor

    def __init__(self, matrix: FloatArray) -> None:
        super().__init__()
        self.register_buffer("read", torch.linalg.pinv(torch.from_numpy(matrix)))

    def attributes(self, features: Tensor) -> Tensor:
        """(N, 9, NUM_ATTRIBUTES) as in `features.attributes`."""
        return (features @ self.read).view(-1, TOKENS, self.read.shape[1])

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        parts = torch.split(self.attributes(features), list(self.SIZES.values()), dim=-1)
        out = dict(zip(self.SIZES, parts, strict=True))
        for name in out:
            offset = name.endswith("offset")
            out[name] = out[name] / 2 if offset else self._SHARPNESS * (out[name] - 0.5)
        return out


def vision_loss(out: dict[str, Tensor], batch: ViewBatch) -> tuple[Tensor, dict[str, float]]:
    """Loss of a batch and its accuracies by skill (fractions; what is absent is left out)."""
    centre, cover, mark = (torch.from_numpy(x) for x in (batch.centre, batch.cover, batch.mark))
    placed = torch.from_numpy(batch.card_known)[:, None, None].expand_as(mark)
    cells = torch.from_numpy(batch.cells)
    has_card, has_mark = (centre * placed).amax(-1), mark.amax(-1)
    card_error = (out["card_offset"] - torch.from_numpy(batch.card_offset)).square().sum(-1)
    mark_error = (out["mark_offset"] - torch.from_numpy(batch.mark_offset)).square().sum(-1)
    readable = cells[..., 0] >= 0
    bce = F.binary_cross_entropy_with_logits
    loss = 4 * bce(out["centre"], centre, weight=placed) + bce(out["cover"], cover)
    loss = loss + 4 * bce(out["mark"], mark)
    loss = loss + 2 * (card_error * has_card).sum() / has_card.sum().clamp(min=1)
    loss = loss + 2 * (mark_error * has_mark).sum() / has_mark.sum().clamp(min=1)
    skills = {
        "centre": _hit(out["centre"] + 1e3 * (placed - 1), centre * placed),
        "mark": _hit(out["mark"], mark),
        "card_px": _rms_px(card_error, has_card),
        "mark_px": _rms_px(mark_error, has_mark),
    }
    if readable.any():
        logits = out["cells"][readable].view(-1, NUM_MARKS)
        truth = cells[readable].view(-1)
        loss = loss + 2 * F.cross_entropy(logits, truth)
        right = (logits.argmax(-1) == truth).view(-1, 4)
        skills["cell"] = float(right.float().mean())
        part = torch.from_numpy(batch.part)[:, None].expand(readable.shape)[readable]
        whole = right.all(-1).float()
        for name, low, high in (("frame", 0.8, 1.0), ("card", 0.25, 0.8), ("mark", 0.0, 0.25)):
            of_scale = (low < part) & (part <= high)
            if of_scale.any():
                skills[f"read_{name}"] = float(whole[of_scale].mean())
    return loss, skills


def sketch_loss(
    heads: SketchHeads, features: Tensor, batch: ViewBatch
) -> tuple[Tensor, dict[str, float]]:
    """`vision_loss`, plus the squared distance of the features' attributes from the labels'."""
    loss, skills = vision_loss(heads(features), batch)
    error = (heads.attributes(features) - torch.from_numpy(attributes(batch))).square()
    # Where cards fill the view their centre cannot be known.
    placed = torch.from_numpy(batch.card_known)[:, None]
    distance = error[..., NUM_CARDS:].sum(-1).mean()
    distance = distance + (error[..., :NUM_CARDS].sum(-1) * placed).mean()
    skills["distance"] = float(distance.detach())
    return loss + 2 * distance, skills


def _rms_px(squares: Tensor, flags: Tensor) -> float:
    """Root mean square of offsets where flagged, in px of the view; NaN where nothing is."""
    return float((squares.detach() * flags).sum().div(flags.sum()).sqrt() * TOKEN_PX)


def _hit(logits: Tensor, truth: Tensor) -> float:
    """F1 of the thresholded flags."""
    said, true = logits > 0, truth > 0.5
    both = (said & true).sum().item()
    return 2 * both / max(1, int(said.sum() + true.sum()))


def forward_views(model: VideoLM, pixels: NDArray[np.uint8]) -> Tensor:
    """(N * 9, C) features of views (N, 2, VIEW_PX, VIEW_PX, 3), which are shown as they are."""
    view = PixelBox(0, 0, VIEW_PX, VIEW_PX), (VIEW_PX, VIEW_PX)
    jobs = [PatchifyJob(a, b, *view) for a, b in pixels]
    return model.encode(jobs, patchify(jobs, model.geometry))
