"""How a published loop gets its frames: open the file, index it, decode, crop, resize.

Stands alone (numpy, PyAV and torch, nothing of this package), because a peer runs it under an
interpreter of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class FileReader:
    """Random access to the frames of one video file, as decord's VideoReader: opened, indexed
    and decoded anew for each look.

    num_frames, source_fps (average rate), height, width (px): of the file.
    frames_codec_decoded: frames the codec decoded so far, those on the way included.
    """

    def __init__(self, path: str | Path) -> None:
        import av  # arrays need no decoder

        self._container = av.open(str(path))
        stream = self._stream = self._container.streams.video[0]
        stream.thread_type = "AUTO"
        packets = [p for p in self._container.demux(stream) if p.pts is not None]
        self._pts = sorted(packet.pts for packet in packets if packet.pts is not None)
        self._keys = sorted(p.pts for p in packets if p.pts is not None and p.is_keyframe)
        rate = stream.average_rate
        assert rate is not None
        self.num_frames = len(self._pts)
        self.source_fps = float(rate)
        self.height, self.width = stream.height, stream.width
        self.frames_codec_decoded = 0

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """(N, H, W, 3) uint8 RGB of frame indices, in their order."""
        wanted = [self._pts[index] for index in indices]
        found: dict[int, np.ndarray] = {}
        position = -1  # pts of the last decoded frame
        frames = None
        for pts in sorted(set(wanted)):
            key = self._keys[max(0, bisect_right(self._keys, pts) - 1)]
            if frames is None or key > position:
                self._container.seek(key, stream=self._stream)
                frames = self._container.decode(self._stream)
            for frame in frames:
                assert frame.pts is not None
                self.frames_codec_decoded += 1
                position = frame.pts
                if position >= pts:
                    found[pts] = frame.to_ndarray(format="rgb24")
                    break
        return np.stack([found[pts] for pts in wanted])

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()


class ArrayReader:
    """What FileReader is for a file, for frames in memory: (T, H, W, 3) uint8."""

    def __init__(self, array: np.ndarray, source_fps: float) -> None:
        self._array = array
        self.num_frames, self.height, self.width, _ = array.shape
        self.source_fps = source_fps

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """(N, H, W, 3) uint8 RGB of frame indices, in their order."""
        return self._array[list(indices)]

    def __enter__(self) -> ArrayReader:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def resized(frames: np.ndarray | Tensor, hw: Sequence[int], *, fixed_point: bool = False) -> Tensor:
    """(N, 3, h, w) uint8 from (N, H, W, 3) uint8, antialiased bicubic, without torchvision, which
    only forwards to it.

    In float32, rounded once, as the release does (torchvision's functional resize of version 1,
    `_functional_tensor.py`); fixed_point: as transformers 5 does on a CPU, uint8 between passes.
    """
    video = torch.as_tensor(frames).permute(0, 3, 1, 2)
    if tuple(video.shape[-2:]) == tuple(hw):
        return video
    if fixed_point:
        return F.interpolate(video, tuple(hw), mode="bicubic", antialias=True)
    video = F.interpolate(video.float(), tuple(hw), mode="bicubic", antialias=True)
    return video.clamp_(0, 255).round_().to(torch.uint8)
