"""How far decoders' pixels are apart: the same frames of needle clips, codec by codec."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vtts_rt.bench.encodings import ENCODINGS, encode
from vtts_rt.bench.readers import absolute, dali_devices, host
from vtts_rt.types import Decoder
from vtts_rt.video import open_video

FRAMES_PER_CLIP = 8
STEP_SECONDS = 1.7  # between them in the scene: other cards and another background


def measured(num_clips: int, folder: Path) -> list[dict[str, Any]]:
    """Rows {"decoder", "codec", "num_frames", "max", "p999", "mean"}: absolute differences from
    PyAV's RGB, of 255, over all values; p999: 99.9 % are at most that.

    A decoder that leaves a codec to PyAV has no row for it.
    """
    there, _ = dali_devices()
    counts = {(name, codec): np.zeros(256, np.int64) for codec in ENCODINGS for name in there}
    frames = dict.fromkeys(counts, 0)
    for codec, encoding in ENCODINGS.items():
        for seed in range(num_clips):
            path = folder / f"pixels-{seed}"
            path = encode(path, _scene(seed), codec, source_fps=12, crf=encoding.crf)
            expected = _read(path, "pyav", None)
            for name, device in there.items():
                for a, b in zip(expected, _read(path, "dali", device), strict=False):
                    counts[name, codec] += np.bincount(absolute(a, b).ravel(), minlength=256)
                    frames[name, codec] += 1
            path.unlink()
    return [
        {"decoder": name, "codec": codec, "num_frames": frames[name, codec], **_summary(count)}
        for (name, codec), count in counts.items()
        if frames[name, codec]
    ]


def _scene(seed: int) -> Iterator[np.ndarray]:
    from vtts_rt.data.needle import make_scene  # its clips are written by PyAV

    scene = make_scene(seed, "held_out")
    for k in range(FRAMES_PER_CLIP):
        yield scene.render(k * STEP_SECONDS)


def _read(path: Path, decoder: Decoder, device: int | None) -> list[np.ndarray]:
    """All frames on the host; none if another decoder takes the file."""
    with open_video(path, decoder=decoder, device=device) as source:
        if source.metadata.decoder != decoder:
            return []
        frames: dict[int, Any] = dict(source.read(range(source.metadata.num_frames)))
    return [host(frames[k]) for k in sorted(frames)]


def _summary(counts: np.ndarray) -> dict[str, Any]:
    """Of (256,) numbers of values by difference."""
    levels, total = np.arange(256), counts.sum()
    return {
        "max": int(levels[counts > 0].max()),
        "p999": int(np.searchsorted(np.cumsum(counts), 0.999 * total)),
        "mean": float((levels * counts).sum() / total),
    }
