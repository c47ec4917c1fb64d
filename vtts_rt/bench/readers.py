"""Random access to the frames of a file, ours and peers' through one interface, all RGB."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from vtts_rt.checkout import source_module
from vtts_rt.types import Decoder
from vtts_rt.video import open_video
from vtts_rt.video.decoders import dali_refusal
from vtts_rt.video.store import FrameStore

INDEX_CACHE = "VTTS_RT_CACHE_DIR"  # a folder, or "off"
STORE_BYTES = 1 << 30  # 64 frames of 1280x720 take 0.18 GB


def absolute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b| of two uint8 arrays, without wrapping."""
    found: np.ndarray = np.maximum(a, b) - np.minimum(a, b)
    return found


def host(frame: Any) -> np.ndarray:
    """A frame as numpy, from a GPU too."""
    return np.asarray(frame.cpu() if hasattr(frame, "cpu") else frame)


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
    """The readers of this machine, ours first; and of the others, why they are left out.

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
    try:
        peers = source_module("the peers of the decoders", "decoder_peers.py").PEERS
    except RuntimeError as error:  # in an installed wheel
        return found, {**absent, "peers": str(error)}
    for name, peer in peers.items():
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
