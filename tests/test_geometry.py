"""The values that say how a family cuts up and normalises pictures."""

from __future__ import annotations

from typing import Any

import pytest

from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.types import Geometry

# transformers, Qwen3VLVideoProcessor.
QWEN3_VL = Geometry(patch_px=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("geometry", "token_px", "row_size"), [(GEOMETRY, 28, 1176), (QWEN3_VL, 32, 1536)]
)
def test_derived_sizes(geometry: Geometry, token_px: int, row_size: int) -> None:
    assert (geometry.token_px, geometry.row_size) == (token_px, row_size)
    view = (3 * token_px, 5 * token_px)
    assert geometry.grid_hw(view) == (6, 10) and geometry.num_tokens(view) == 15


def test_equal_values_are_one_key() -> None:
    listed = Geometry(14, list(GEOMETRY.mean), list(GEOMETRY.std))  # type: ignore[arg-type]
    assert {GEOMETRY: 1}[listed] == 1


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"patch_px": 15}, "patch_px must be 14 or 16, got 15"),
        ({"patch_px": 14.0}, "patch_px must be 14 or 16, got 14.0"),
        ({"patch_px": [14]}, "patch_px must be 14 or 16"),
        ({"merge": 3}, "merge must be 2, got 3"),
        ({"frames_per_pair": 1}, "frames_per_pair must be 2, got 1"),
        ({"mean": (0.5, 0.5)}, "mean must be three finite numbers, got"),
        ({"mean": 0.5}, "mean must be three finite numbers, got"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be three finite numbers > 0, got"),
        ({"std": (1.0, float("nan"), 1.0)}, "std must be three finite numbers > 0, got"),
    ],
)
def test_wrong_values_are_refused(change: dict[str, Any], rule: str) -> None:
    values = {"patch_px": 14, "mean": GEOMETRY.mean, "std": GEOMETRY.std}
    with pytest.raises(ValueError, match=f"Geometry: {rule}"):
        Geometry(**{**values, **change})
