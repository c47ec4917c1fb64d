"""Frames and jobs of noise, and the native core on one instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.ops.patch_jobs import PatchifyJob, mean_and_std, num_rows
from vtts_rt.types import Geometry, PixelBox, ResizeKernel

_C = pytest.importorskip("vtts_rt._C", reason="built without the native extension")
ISAS = [isa for isa in ("scalar", "avx2", "avx512", "neon") if _C.isa_supported(isa)]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def full(frame: np.ndarray) -> PixelBox:
    return PixelBox(0, 0, frame.shape[1], frame.shape[0])


def one(
    frame: Any,
    resized_hw: tuple[int, int],
    box: PixelBox | None = None,
    resize: ResizeKernel = "fixed",
) -> PatchifyJob:
    return PatchifyJob(frame, frame, box or full(frame), resized_hw, resize)


def on_isa(
    jobs: list[PatchifyJob], isa: str, num_threads: int = 1, geometry: Geometry = GEOMETRY
) -> torch.Tensor:
    """The native core on a given instruction set, which the public function does not offer."""
    out = torch.full((num_rows(jobs, geometry), geometry.row_size), torch.nan)
    mean, std = map(tuple, mean_and_std(geometry, torch.device("cpu")).tolist())
    items = [(j.frame_a, j.frame_b, tuple(j.box), j.resized_hw, j.resize) for j in jobs]
    _C.patchify(items, out.numpy(), geometry.patch_px, mean, std, isa, num_threads)
    return out
