"""Peers of our decoders: as `vtts_rt.bench.readers.Reader`, with `load` for whether they are here.

They are run as their documentation says, with the threads they take by themselves, and are told
whole lists of frames where they can be. All give RGB.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtts_rt.bench.readers import NotHere

# Grabbing on is what OpenCV's users do for near frames: a seek decodes from the keyframe on.
OPENCV_GRABS = 32


class Decord:
    @staticmethod
    def load() -> None:
        import decord

        decord.logging.set_level(decord.logging.FATAL)

    def __init__(self, path: Path) -> None:
        import decord

        self._reader = decord.VideoReader(str(path))

    def frames(self, indices: Sequence[int]) -> Any:
        return self._reader.get_batch(list(indices)).asnumpy()

    def close(self) -> None:
        del self._reader


class OpenCv:
    @staticmethod
    def load() -> None:
        import cv2  # noqa: F401

    def __init__(self, path: Path) -> None:
        import cv2

        self._cv2 = cv2
        self._capture = cv2.VideoCapture(str(path))
        self._next = 0

    def frames(self, indices: Sequence[int]) -> Any:
        return [self._frame(index) for index in indices]

    def _frame(self, index: int) -> Any:
        if not 0 <= index - self._next <= OPENCV_GRABS:
            self._capture.set(self._cv2.CAP_PROP_POS_FRAMES, index)
            self._next = index
        while self._next < index:
            self._capture.grab()
            self._next += 1
        ok, frame = self._capture.read()
        self._next += 1
        if not ok:
            raise NotHere(f"frame {index} cannot be read")
        return self._cv2.cvtColor(frame, self._cv2.COLOR_BGR2RGB)

    def close(self) -> None:
        self._capture.release()


class TorchCodec:
    @staticmethod
    def load() -> None:
        import torchcodec.decoders  # noqa: F401

    def __init__(self, path: Path) -> None:
        from torchcodec.decoders import VideoDecoder

        self._decoder = VideoDecoder(str(path), dimension_order="NHWC")

    def frames(self, indices: Sequence[int]) -> Any:
        return self._decoder.get_frames_at(list(indices)).data.numpy()

    def close(self) -> None:
        del self._decoder


PEERS = {"decord": Decord, "opencv": OpenCv, "torchcodec": TorchCodec}
