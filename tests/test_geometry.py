"""The values that say how a family cuts up and normalises pictures."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from utils import QWEN3_VL

from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.types import Geometry


@pytest.mark.parametrize(
    ("geometry", "token_px", "row_size"), [(GEOMETRY, 28, 1176), (QWEN3_VL, 32, 1536)]
)
def test_derived_sizes(geometry: Geometry, token_px: int, row_size: int) -> None:
    assert (geometry.token_px, geometry.row_size) == (token_px, row_size)
    view = (3 * token_px, 5 * token_px)
    assert geometry.grid_hw(view) == (6, 10) and geometry.num_tokens(view) == 15


def test_equal_values_are_one_key() -> None:
    listed = Geometry(14, list(GEOMETRY.mean), list(GEOMETRY.std), released=True)  # type: ignore[arg-type]
    assert {GEOMETRY: 1}[listed] == 1


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"patch_px": 15}, "patch_px must be 14 or 16, got 15"),
        ({"patch_px": 14.0}, "patch_px must be 14 or 16, got 14.0"),
        ({"patch_px": [14]}, "patch_px must be 14 or 16"),
        ({"merge": 3}, "merge must be 2, got 3"),
        ({"frames_per_pair": 1}, "frames_per_pair must be 2, got 1"),
        ({"mean": (0.5, 0.5)}, "mean must be three numbers in .*, got"),
        ({"mean": 0.5}, "mean must be three numbers in .*, got"),
        ({"mean": "123"}, "mean must be three numbers in .*, got '123'"),
        ({"mean": (1e300,) * 3}, "mean must be three numbers in"),
        ({"std": (1e-320,) * 3}, "std must be three numbers in"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be three numbers in .*, got"),
        ({"std": (1.0, float("nan"), 1.0)}, "std must be three numbers in .*, got"),
    ],
)
def test_wrong_values_are_refused(change: dict[str, Any], rule: str) -> None:
    values = {"patch_px": 14, "mean": GEOMETRY.mean, "std": GEOMETRY.std}
    with pytest.raises(ValueError, match=f"Geometry: {rule}"):
        Geometry(**{**values, **change})


# Numbers of one family's geometry: px of a patch and of a token, values of a row.
_FAMILY = {14, 28, 784, 1176, 16 * 96}
# Where they mean something else, or name the sizes that are compiled.
_OTHER_MEANINGS = {
    "types.py": 1,  # PATCH_SIZES
    "video/picture_files.py": 1,  # bits of a WebP header
    "models/tokenizer.py": 1,  # a power of two
}


def test_no_number_of_a_family_outside_it() -> None:
    root = Path(__file__).resolve().parents[1] / "vtts_rt"
    found: dict[str, int] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith("bench/") or (name.startswith("models/") and name.count("/") > 1):
            continue  # a family's folder
        text = path.read_text(encoding="utf-8")
        if not re.search(rf"\b({'|'.join(map(str, _FAMILY))})\b", text):
            continue  # quick
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and type(node.value) is int and node.value in _FAMILY:
                found[name] = found.get(name, 0) + 1
    assert found == _OTHER_MEANINGS
