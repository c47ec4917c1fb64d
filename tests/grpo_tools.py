"""What tests of GRPO share: six questions, a recipe, a small runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torchvision_shim

from vtts_rt.data.rows import DataSet, Row, write_manifest, write_rows
from vtts_rt.types import TimeSpan

torchvision_shim.install()
from vtts_rt.train.grpo import GrpoRecipe  # noqa: E402

PATTERNS = ["red green / blue yellow", "blue red / green yellow", "green red / yellow blue"]
SIZE = 4


def write_questions(clips: list[Path]) -> Path:
    """The manifest of six questions about two clips."""
    folder = clips[0].parent
    rows = [
        Row(
            media=clip.name,
            question=f"Which pattern is on the {colour} card?",
            options=tuple(PATTERNS),
            answer="ABC"[number],
            spans=(TimeSpan(2.0 * number, 2.0 * number + 3.0),),
        )
        for clip in clips
        for number, colour in enumerate(("red", "green", "blue"))
    ]
    write_rows(folder / "rows.json", rows)
    sets = [DataSet("cards", "video", "gqa", Path(), Path("rows.json"))]
    write_manifest(folder / "manifest.json", sets)
    return folder / "manifest.json"


def recipe(manifest: Path, output: Path, /, **more: Any) -> GrpoRecipe:
    grpo = {
        "num_generations": SIZE,
        "per_device_train_batch_size": SIZE,
        "learning_rate": 1e-4,
        "gradient_checkpointing": False,
        **more.pop("grpo", {}),
    }
    given: dict[str, Any] = {
        "rewards": {"answer": 1.0, "clue_spans": 1.0, "format": 0.5},
        "perception": {"max_rounds": 2, "max_frames": 8},
        "max_tokens": 40,
        **more,
    }
    return GrpoRecipe(manifest=manifest, output=output, grpo=grpo, **given)


def steps_of(logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in logged if "loss" in entry]
