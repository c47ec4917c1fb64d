"""Random access to the frames of a file, ours and peers' under one face, for `bench decode`.

Peers are run as their documentation says, with the threads they take by themselves, and are told
whole lists of frames where they can be. All give RGB.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from vtts_rt.types import Decoder
from vtts_rt.video import open_video
from vtts_rt.video.decoders import dali_refusal
from vtts_rt.video.store import FrameStore

INDEX_CACHE = "VTTS_RT_CACHE_DIR"  # a folder, or "off"
STORE_BYTES = 1 << 30  # 64 frames of 1280x720 take 0.18 GB
# Grabbing on is what OpenCV's users do for near frames: a seek decodes from the keyframe on.
OPENCV_GRABS = 32


class Reader(Protocol):
    """An opened file."""

    def frames(self, indices: Sequence[int]) -> Any:
        """A sequence of (H, W, 3) uint8 RGB of each index, in their order: numpy, or torch on
        a GPU."""
        ...

    def close(self) -> None: ...


class NotHere(Exception):
    """This decoder does not decode this file, and why."""


@dataclass(frozen=True, slots=True)
class Contender:
    """name; open: RuntimeError or another error of its own where it fails. ours: not a peer.

    index_cache: it may use the index of an earlier opening, so it is given the same file again.
    """

    name: str
    open: Callable[[Path], Reader]
    ours: bool = False
    index_cache: bool = False


def contenders(index_cache: Path, device: str = "cuda") -> tuple[list[Contender], dict[str, str]]:
    """Who takes part on this machine, ours first; and of the others, why not.

    index_cache: folder for the index cache of the contender that uses it. device: "cpu" leaves out
    what decodes on a GPU.
    """

    def ours(
        name: str, decoder: Decoder, device: int | None = None, cache: Path | None = None
    ) -> Contender:
        def opened(path: Path) -> Reader:
            with _environment(INDEX_CACHE, "off" if cache is None else str(cache)):
                return _Ours(path, decoder, device)

        return Contender(name, opened, ours=True, index_cache=cache is not None)

    found = [ours("pyav", "pyav"), ours("pyav, indexed before", "pyav", cache=index_cache)]
    devices, absent = dali_devices()
    if device == "cpu" and devices.pop("dali-nvdec", None) is not None:
        absent["dali-nvdec"] = "the device is the CPU"
    found += [ours(name, "dali", place) for name, place in devices.items()]
    for name, peer in (("decord", _Decord), ("opencv", _OpenCv), ("torchcodec", _TorchCodec)):
        try:
            peer.load()
        except Exception as error:  # whatever a library that does not fit this machine raises
            lines = f"{type(error).__name__}: {error}".strip().splitlines()
            absent[name] = lines[0][:200]
        else:
            found.append(Contender(name, peer))
    return found, absent


def dali_devices() -> tuple[dict[str, int | None], dict[str, str]]:
    """Where DALI decodes on this machine: name -> device of open_video; and why not elsewhere."""
    there: dict[str, int | None] = {}
    absent: dict[str, str] = {}
    for name, device in (("dali-cpu", None), ("dali-nvdec", 0)):
        reason = dali_refusal(device)
        if reason is None and device is not None and not torch.cuda.is_available():
            reason = "no CUDA device visible to torch"
        if reason is None:
            there[name] = device
        else:
            absent[name] = reason
    return there, absent


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _Ours:
    """open_video and a store of its own, so that frames asked for again come from there."""

    def __init__(self, path: Path, decoder: Decoder, device: int | None) -> None:
        self._source = open_video(path, decoder=decoder, device=device)
        decodes = self._source.metadata.decoder
        if decodes != decoder:
            self._source.close()
            raise NotHere(f"{decodes} decodes such files in its place")
        self._store = FrameStore(STORE_BYTES)

    def frames(self, indices: Sequence[int]) -> Any:
        return self._store.frames(self._source, indices)

    def close(self) -> None:
        self._store.close()
        self._source.close()


class _Decord:
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


class _OpenCv:
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


class _TorchCodec:
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
