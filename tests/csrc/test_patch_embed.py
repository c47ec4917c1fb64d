"""The binding of patch_embed: the bits of patchify and linear, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

_C = pytest.importorskip("vtts_rt._C")
MEAN, STD = (122.77, 116.75, 104.09), (68.5, 66.63, 70.32)


def jobs(resize: str = "fixed", side: int = 28) -> list[Any]:
    random = np.random.default_rng(0)
    a, b = random.integers(0, 256, (2, 61, 80, 3), dtype=np.uint8)
    whole = (0, 0, side, side), (side, side)
    return [(a, b, (3, 1, 80, 60), (2 * side, 3 * side), resize), (b, b, *whole, "fixed")]


@pytest.mark.parametrize("patch_px", [14, 16])
@pytest.mark.parametrize("resize", ["fixed", "float", "pil"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_same_bits_as_patchify_and_linear(patch_px: int, resize: str, with_bias: bool) -> None:
    random, size = np.random.default_rng(1), 6 * patch_px**2
    items = jobs(resize, 2 * patch_px)
    weight = random.standard_normal((5, size)).astype(np.float32)
    bias = random.standard_normal(5).astype(np.float32) if with_bias else None
    rows = np.empty((28, size), np.float32)
    _C.patchify(items, rows, patch_px, MEAN, STD)
    expected = np.empty((28, 5), np.float32)
    address = bias.ctypes.data if bias is not None else 0
    _C.linear(
        *(rows.ctypes.data, size, weight.ctypes.data, 0, address, expected.ctypes.data),
        *(28, size, 5, "float32", "float32", False, 1, "auto"),
    )
    out = np.full((28, 5), np.nan, np.float32)
    _C.patch_embed(items, weight, bias, out, patch_px, MEAN, STD, num_threads=2)
    assert np.array_equal(out.view(np.int32), expected.view(np.int32))


def test_refusals() -> None:
    weight, out = np.zeros((5, 1176), np.float32), np.empty((28, 5), np.float32)

    def refuse(message: str, **changed: Any) -> None:
        arguments = {"jobs": jobs(), "weight": weight, "bias": None, "out": out, "patch_px": 14}
        with pytest.raises(ValueError, match=message):
            _C.patch_embed(**{**arguments, **changed}, mean=MEAN, std=STD)

    refuse(r"patch_embed: weight must be contiguous \(5, 1176\)", weight=weight[:, :-1])
    refuse(r"patch_embed: weight must be contiguous", weight=np.asfortranarray(weight))
    refuse(r"patch_embed: resized_hw must be positive multiples of 32 px", patch_px=16)
    refuse(r"patch_embed: patch_px must be 14 or 16, got 15", patch_px=15)
    refuse(r"patch_embed: bias must be contiguous \(5\)", bias=np.zeros(4, np.float32))
    refuse(r"patch_embed: out must be contiguous \(28, 5\)", out=out[:-1])
    frame = jobs()[0][0]
    outside = [(frame, frame, (0, 0, 81, 60), (28, 28), "fixed")]
    refuse(r"patch_embed: box must be non-empty and inside", jobs=outside)
    unknown = [(frame, frame, (0, 0, 80, 60), (28, 28), "cubic")]
    refuse(r"patch_embed: resize must be fixed, float or pil, got cubic", jobs=unknown)
    with pytest.raises(TypeError):  # nothing is converted
        _C.patch_embed(jobs(), weight.astype(np.float64), None, out, 14, MEAN, STD)
