"""Processor settings of a checkpoint: mean and std count, what `patchify` cannot do is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torchvision_shim
from utils import QWEN3_VL

from vtts_rt.models.preprocessor import read_geometry, write_geometry
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.types import Geometry

# Every file with a mean of its own, so that it shows which one transformers reads.
FILES: dict[str, Any] = {
    "preprocessor_config.json": {"image_mean": [0.1] * 3},
    "video_preprocessor_config.json": {"image_mean": [0.2] * 3},
    "processor_config.json": {
        "processor_class": "Qwen2_5_VLProcessor",
        "video_processor": {"image_mean": [0.3] * 3},
        "image_processor": {"image_mean": [0.4] * 3},
    },
}


def geometry_of(folder: Path) -> Geometry:
    return read_geometry(folder, GEOMETRY)


def write(folder: Path, name: str, settings: dict[str, Any]) -> None:
    kinds = {"preprocessor_config.json": "image", "video_preprocessor_config.json": "video"}
    if name in kinds:
        settings = {f"{kinds[name]}_processor_type": f"Qwen2VL{kinds[name].title()}Processor"} | (
            settings
        )
    (folder / name).write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("names", "video", "image"),
    [
        (["preprocessor_config.json"], 0.1, 0.1),
        (["preprocessor_config.json", "video_preprocessor_config.json"], 0.2, 0.1),
        (list(FILES), 0.3, 0.4),
    ],
)
def test_the_file_that_transformers_reads_counts(
    tmp_path: Path, names: list[str], video: float, image: float
) -> None:
    torchvision_shim.install()
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    for name in names:
        write(tmp_path, name, FILES[name])
    for processor, mean in ((Qwen2VLVideoProcessor, video), (Qwen2VLImageProcessor, image)):
        assert list(processor.from_pretrained(tmp_path).image_mean) == [mean] * 3
    if video == image:
        assert geometry_of(tmp_path) == replace(GEOMETRY, mean=(video,) * 3)
        return
    message = rf"image_std must be \[{video}.* as for videos, got '\[{image}"
    with pytest.raises(ValueError, match=message):
        geometry_of(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image_std": [0.5, 0.5]},
            r"config\.json image_std must be three numbers in",
        ),
        (
            {"image_std": 0},
            r"image_std must be three numbers in \[1e-06, 1e\+06\], got \[0, 0, 0\]",
        ),
        (
            {"image_mean": "grey"},
            r"image_mean must be three numbers in \[-1e\+06, 1e\+06\], got 'grey'",
        ),
        ({"image_mean": "123"}, "image_mean must be three numbers in .*, got '123'"),
        ({"image_std": [1e-320] * 3}, "image_std must be three numbers in"),
        ({"patch_size": 16}, "patch_size must be 14, got 16"),
        ({"merge_size": 1}, "merge_size must be 2, got 1"),
        ({"temporal_patch_size": 1}, "temporal_patch_size must be 2, got 1"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor must be 0.0039.*got 0.0078"),
        ({"do_rescale": False}, "do_rescale must be True, got False"),
        ({"do_normalize": False}, "do_normalize must be True, got False"),
        ({"do_resize": False}, "do_resize must be True, got False"),
        ({"do_center_crop": True}, "do_center_crop must be False, got True"),
        ({"resample": 2}, "resample must be 3, got 2"),
        ({"resample": "bicubic"}, "resample must be 3, got 'bicubic'"),
        ({"max_pixels": "many"}, "max_pixels must be a number >= 0, got 'many'"),
    ],
)
def test_other_pixels_are_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    write(tmp_path, "preprocessor_config.json", settings)
    with pytest.raises(ValueError, match=message):
        geometry_of(tmp_path)


@pytest.mark.parametrize("mean", [0.5, [0.1, 0.2, 0.3]])
def test_mean_and_std_are_taken(tmp_path: Path, mean: Any) -> None:
    write(tmp_path, "preprocessor_config.json", {"image_mean": mean, "image_std": [0.5, 1.0, 2.0]})
    expected = (0.5,) * 3 if mean == 0.5 else tuple(mean)
    assert geometry_of(tmp_path) == replace(GEOMETRY, mean=expected, std=(0.5, 1.0, 2.0))


@pytest.mark.parametrize("num_files", range(4))
@pytest.mark.parametrize("geometry", [GEOMETRY, replace(GEOMETRY, mean=(0.7, 0.8, 0.9))])
def test_what_is_written_is_read_again_whatever_files_stand_there(
    tmp_path: Path, geometry: Geometry, num_files: int
) -> None:
    for name in list(FILES)[::-1][:num_files]:
        write(tmp_path, name, FILES[name])
    write_geometry(tmp_path, geometry, GEOMETRY)
    assert geometry_of(tmp_path) == geometry
    assert any(tmp_path.iterdir()) == (num_files > 0 or geometry != GEOMETRY)


def test_what_transformers_writes_is_taken(tmp_path: Path) -> None:
    torchvision_shim.install()
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    assert geometry_of(tmp_path) == GEOMETRY  # nothing said: the family's
    Qwen2VLVideoProcessor().save_pretrained(tmp_path / "video")
    Qwen2VLImageProcessor().save_pretrained(tmp_path / "image")
    for folder in (tmp_path / "video", tmp_path / "image"):
        assert list(folder.iterdir())
        assert geometry_of(folder) == GEOMETRY
    (tmp_path / "processor_config.json").write_text('{"video_processor": 3}')
    with pytest.raises(ValueError, match="processor_config.json video_processor must be an object"):
        geometry_of(tmp_path)


def test_bounds_may_be_of_whole_clips(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torchvision_shim.install()
    from transformers import Qwen3VLVideoProcessor

    for longest, told in ((768 * 1024, True), (24576 * 1024, False)):
        size = {"shortest_edge": 4096, "longest_edge": longest}
        Qwen3VLVideoProcessor(size=size).save_pretrained(tmp_path)
        caplog.clear()
        read = read_geometry(tmp_path, QWEN3_VL, bounds_clips=True)
        assert read == QWEN3_VL
        assert ("all frames of a video together" in caplog.text) == told


def test_bounds_on_sizes_are_reported_where_no_recipe_decides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for settings, told in (
        ({"min_pixels": 3136, "max_pixels": 12_845_056}, False),
        ({"size": {"shortest_edge": 3136, "longest_edge": 50_176}}, True),
        ({"min_pixels": 400_000}, True),
    ):
        caplog.clear()
        write(tmp_path, "preprocessor_config.json", settings)
        geometry_of(tmp_path)
        assert ("px, which is not applied" in caplog.text) == told
    caplog.clear()
    recipe = {"vtts_rt": {"perception": {"total_pixels": 100_000}}}
    (tmp_path / "config.json").write_text(json.dumps(recipe))
    geometry_of(tmp_path)
    assert not caplog.text
