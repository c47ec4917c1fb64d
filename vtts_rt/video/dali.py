"""Frames through NVIDIA DALI: on NVDEC, or on the CPU for VP8, VP9 and MJPEG.

DALI's decoder takes a whole encoded stream and counts frames from its start. It is given no file
but only the packets that the wanted frames need, copied into a small Matroska stream: a look into
the middle of a long file costs its groups of pictures, and frames are found by our packet index.

A packet that gives no frame would shift all later ones, and DALI leaves what it did not reach
unwritten: old memory, maybe of another file. So every stream ends in a guard, a copy of the file's
first packet, and a batch counts only if its guard shows what the first packet shows. A frame larger
than the first it writes past the end of its memory: on the CPU no packet reaches it whose header
says so. What does not pass is decoded by PyAV; whether a frame passes depends on its own packets
alone, never on what else is asked for.

Pixels: chroma is interpolated, where PyAV's conversion repeats it, and the matrix is BT.601's:
files of BT.709 and BT.2020 are corrected after decoding. docs/video.md has measured differences.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from vtts_rt import process
from vtts_rt.video.container import av_errors
from vtts_rt.video.dali_pipeline import MAX_SAMPLES, Sample, decode, muxed, num_threads
from vtts_rt.video.decoders import DALI_CPU_CODECS, DALI_NVDEC_CODECS
from vtts_rt.video.frame_headers import frame_header
from vtts_rt.video.index import PacketIndex, decode_tagged
from vtts_rt.video.packets import PacketReader
from vtts_rt.video.pixels import turns
from vtts_rt.video.pyav import PyavSource
from vtts_rt.video.source import FrameSource, derive_id, distinct_indices

logger = logging.getLogger(__name__)

DECODER = "dali"
# NVDEC's surfaces of other formats would be read as if they were these.
NVDEC_FORMATS = frozenset({"yuv420p", "yuvj420p", "nv12"})
# Frames of natural content against PyAV's, absolute, of 255: the most a value may be off, and the
# mean. Seen, on the CPU: 25 and 1.7 for 4:2:0, 17 and 1.1 for 4:2:2, none for 4:4:4.
MAX_DIFFERENCE = 40
MEAN_DIFFERENCE = 2.5
# Luma, which no chroma filter changes: a first frame further from PyAV's is another picture, range
# or matrix. Rounding alone gives less than 1, a range taken wrong about 8.
MAX_MEAN_LUMA_DIFFERENCE = 3.0
LUMA = torch.tensor([0.299, 0.587, 0.114])
# (red, blue) luma weights by AVColorSpace: 1 is BT.709, 9 is BT.2020 (ITU-R). 0 is RGB; 2, 5 and 6
# are unspecified and BT.601, which DALI takes everything for.
OTHER_MATRICES = {1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}
KNOWN_MATRICES = frozenset({0, 2, 5, 6, *OTHER_MATRICES})
FULL_RANGE = 2  # AVColorRange
MAX_BATCH_BYTES = 128 << 20  # of decoded frames


class Refused(Exception):
    """DALI does not decode this file, and why."""


class DaliSource(FrameSource):
    """A PyavSource's video with DALI decoding it. Closing it closes `source`.

    source: gives the index, and every frame that DALI cannot give. device: CUDA ordinal, whose
        frames are torch uint8 tensors there, or None: CPU, numpy arrays.
    frames_codec_decoded counts packets given to DALI, guards included, and PyAV's frames.
    frames_by_pyav: frames delivered by PyAV, for what DALI fails on.
    """

    def __init__(self, source: PyavSource, device: int | None) -> None:
        self._source = source
        self._device = device
        self._packets = PacketReader(source.media, source.index)
        self._begin()
        process.after_fork(self, DaliSource._begin)
        self._closed = False
        self._num_fed = 0
        self.frames_by_pyav = 0
        self._correction: Tensor | None = None
        self._skips_hidden = False
        try:
            self._guard_packet, first = self._first_picture()
            self._guard = self._checked_guard(first)
        except BaseException:
            self._packets.close()
            raise
        kind = "cpu" if device is None else "nvdec"
        whole = source.metadata
        self.metadata = replace(
            whole, video_id=derive_id(whole.video_id, DECODER, kind), decoder=DECODER
        )

    def _begin(self) -> None:
        self._lock = threading.Lock()

    @property
    def frames_codec_decoded(self) -> int:
        return self._num_fed + self._source.frames_codec_decoded

    @property
    def frames_substituted(self) -> int:
        return self._source.frames_substituted

    def read(
        self, frame_indices: Sequence[int], passing: Collection[int] = ()
    ) -> Iterator[tuple[int, Any]]:
        num_frames = self.metadata.num_frames
        indices = distinct_indices(frame_indices, num_frames)
        by_products = set(distinct_indices(passing, num_frames)).difference(indices)
        self._source.media.check_usable(self._closed)
        return self._deliver(indices, by_products)

    def close(self) -> None:
        self._closed = True
        self._source.close()
        # Not waited for: it may be this very thread that reads, in a garbage collection. A thread
        # that reads closes the file when done.
        if self._lock.acquire(blocking=False):
            try:
                self._packets.close()
            finally:
                self._lock.release()

    # -- reading ----------------------------------------------------------------------------

    def _deliver(self, indices: list[int], passing: set[int]) -> Iterator[tuple[int, Any]]:
        most = max(1, MAX_BATCH_BYTES // (3 * self.metadata.height * self.metadata.width))
        for at in range(0, len(indices), most):
            batch = indices[at : at + most]
            runs = [list(run) for _, run in groupby(batch, key=self._index.start_for)]
            yield from self._decode(runs, passing)

    def _decode(self, runs: list[list[int]], passing: set[int]) -> Iterator[tuple[int, Any]]:
        """Frames of runs that each start at one keyframe, and by-products of `passing`."""
        try:
            delivered = self._by_dali(runs, passing)
        except RuntimeError as error:
            self._source.media.check_usable(self._closed)
            smaller = [[run] for run in runs] if len(runs) > 1 else [[[i]] for i in runs[0]]
            if len(smaller) > 1:
                for part in smaller:
                    yield from self._decode(part, set())
                return
            if not self.frames_by_pyav:
                logger.warning("%s: PyAV decodes what DALI does not (%s)", self._name, error)
            self.frames_by_pyav += 1
            yield from self._source.read(runs[0])
            return
        passing.difference_update(i for i, _ in delivered)
        yield from delivered

    def _by_dali(self, runs: list[list[int]], passing: set[int]) -> list[tuple[int, Any]]:
        """RuntimeError where DALI fails or its guards do not show what they should."""
        num_samples = min(len(runs), num_threads(self._device), MAX_SAMPLES)
        bounds = [len(runs) * k // num_samples for k in range(num_samples + 1)]
        with self._lock:
            try:
                self._source.media.check_usable(self._closed)
                samples = [
                    self._remux(runs[a:b], passing)
                    for a, b in zip(bounds, bounds[1:], strict=False)
                ]
            finally:
                if self._closed:
                    self._packets.close()
        decoded = decode(samples, self._device)
        self._num_fed += sum(sample.num_packets for sample in samples)
        passed = all([self._passes(frames) for frames in decoded])
        found = [
            (i, self._finished(frames[k]))
            for sample, frames in zip(samples, decoded, strict=True)
            for k, i in enumerate(sample.frames, 1)
            if passed
        ]
        if self._device is not None:
            # A frame may be used on any stream, and DALI may use its memory again.
            torch.cuda.current_stream(self._device).synchronize()
        if not passed:
            raise RuntimeError("a packet gave no frame of its own")
        return found

    def _passes(self, frames: Tensor) -> bool:
        """Whether the guard is there. It is spoilt then, as DALI uses the memory again."""
        passes = frames.shape[1:] == self._guard.shape and torch.equal(frames[0], self._guard)
        frames[0].bitwise_not_()
        return passes

    def _finished(self, frame: Tensor) -> Any:
        """A frame of the right colours and the right way up, in memory of its own."""
        if self._correction is not None:
            frame = recoloured(frame, self._correction)
        swap, flip_y, flip_x = turns(self._source.matrix)
        frame = frame.transpose(0, 1) if swap else frame
        sides = [side for side, flipped in enumerate((flip_y, flip_x)) if flipped]
        frame = frame.flip(sides) if sides else frame
        if self._device is None:
            return np.array(frame.numpy(), order="C")
        return frame.clone(memory_format=torch.contiguous_format)

    def _remux(self, runs: list[list[int]], passing: set[int]) -> Sample:
        """The packets that the frames of some runs need, as a stream of their own."""
        index, reader = self._index, self._packets
        packets: list[Any] = []
        ranks: list[int] = []
        numbers: dict[int, int] = {}
        num_shown = 0
        for run in runs:
            ordinals = np.array(self._take(run, packets))
            orders = index.order[ordinals]
            ranks += (len(ranks) + np.argsort(np.argsort(orders))).tolist()
            shown = ordinals[np.argsort(orders)]
            if self._skips_hidden:
                shown = shown[index.frame_of[shown] >= 0]
            for number, i in enumerate(index.frame_of[shown].tolist(), num_shown):
                if i in passing or i in run:
                    numbers[i] = number
            num_shown += len(shown)
        packets.append(av.Packet(self._guard_packet))
        ranks.append(len(ranks))
        encoded = muxed(packets, ranks, reader.stream)
        return Sample(encoded, len(packets), num_shown, list(numbers), list(numbers.values()))

    def _take(self, run: list[int], packets: list[Any]) -> list[int]:
        """Adds the packets that a run of frames needs; their ordinals."""
        index, reader = self._index, self._packets
        start = index.start_for(run[0])
        last = max(int(index.packet_of[i]) for i in run)
        if reader.next != start:
            reader.start_at(start)
        ordinals = []
        while reader.next <= last:
            taken = reader.take()
            if taken is None:
                raise RuntimeError("packets are missing")
            ordinal, packet = taken
            # What follows a keyframe in the file but shows before it needs the group before.
            if ordinal >= start and index.order[ordinal] >= index.order[start]:
                if not self._fits(ordinal, packet):
                    raise RuntimeError("a packet does not hold one frame like the first")
                ordinals.append(ordinal)
                packets.append(packet)
        return ordinals

    def _fits(self, ordinal: int, packet: Any) -> bool:
        """Whether a packet's header tells of a frame of the first one's size and layout, shown if
        the index says so. Headers of codecs that only NVDEC decodes are not read."""
        first = self._header
        if first is None:
            return True
        header = frame_header(self._codec, bytes(packet))
        hidden = self._skips_hidden and self._index.frame_of[ordinal] < 0
        return (
            header is not None
            and header.shown == (0 if hidden else 1)
            and header.sizes <= first.sizes
            and header.layouts <= first.layouts
        )

    # -- opening ----------------------------------------------------------------------------

    def _first_picture(self) -> tuple[bytes, Any]:
        """The first packet, and the frame that PyAV decodes from it alone. `Refused` for what
        DALI cannot decode, or would show in other colours."""
        reader = self._packets
        reader.start_at(0)
        stream, taken = reader.stream, reader.take()
        self._codec = codec = stream.codec_context.codec.canonical_name
        known = DALI_CPU_CODECS if self._device is None else DALI_NVDEC_CODECS
        _refuse(codec not in known, f"codec {codec}")
        # FFmpeg's decoders give nothing for a packet that is not shown, NVDEC counts pictures.
        self._skips_hidden = codec in ("vp8", "vp9") and self._device is None
        _refuse(taken is None, "its first packet cannot be read")
        assert taken is not None
        _, packet = taken
        encoded, declared = bytes(packet), (stream.height, stream.width)
        self._header = frame_header(codec, encoded) if codec in DALI_CPU_CODECS else None
        if codec in DALI_CPU_CODECS:
            fits = self._header is not None and self._header.sizes == {declared}
            _refuse(not fits, "its first packet is not of the size that the file says")
        frames = decode_tagged(stream, packet, 0) + decode_tagged(stream, None, 0)
        reader.close()  # its decoder was drained
        _refuse(len(frames) != 1, "its first packet does not decode alone")
        first = frames[0]
        pixels, matrix = first.format.name, first.colorspace
        on_nvdec = self._device is None or pixels in NVDEC_FORMATS
        _refuse(not on_nvdec, f"pixel format {pixels}")
        hidden_range = first.color_range == FULL_RANGE and pixels.startswith("yuv4")
        _refuse(hidden_range, "full range that its pixel format does not tell")
        _refuse(matrix not in KNOWN_MATRICES, f"colour matrix {matrix}")
        if matrix in OTHER_MATRICES:
            self._correction = correction(matrix)
        return encoded, first

    def _checked_guard(self, first: Any) -> Tensor:
        """What DALI shows of the first packet, if that is what PyAV shows."""
        packets = [av.Packet(self._guard_packet)]
        self._packets.start_at(0)
        encoded = muxed(packets, [0], self._packets.stream)
        try:
            (frames,) = decode([Sample(encoded, 1, 0, [], [])], self._device)
        except RuntimeError as error:
            raise Refused(f"DALI: {error}") from None
        self._num_fed += 1
        guard = frames[0].clone()
        with av_errors(self._name):
            expected = torch.from_numpy(first.to_ndarray(format="rgb24"))
        _refuse(guard.shape != expected.shape, f"DALI gives frames of {tuple(guard.shape[:2])}")
        seen = guard if self._correction is None else recoloured(guard, self._correction)
        off = (seen.cpu().float() - expected.float()) @ LUMA
        far = float(off.abs().mean()) > MAX_MEAN_LUMA_DIFFERENCE
        _refuse(far, "DALI shows its first frame otherwise than PyAV")
        return guard

    @property
    def _index(self) -> PacketIndex:
        return self._source.index

    @property
    def _name(self) -> str:
        return self._source.media.name


def _refuse(condition: bool, reason: str) -> None:
    if condition:
        raise Refused(reason)


def correction(matrix: int) -> Tensor:
    """(3, 3) float32: RGB that was made with BT.601's matrix to RGB of the matrix meant.

    matrix: an AVColorSpace of OTHER_MATRICES.
    """

    def to_ycbcr(red: float, blue: float) -> np.ndarray:
        luma = np.array([red, 1.0 - red - blue, blue])
        cb = (np.array([0.0, 0.0, 1.0]) - luma) / (2.0 * (1.0 - blue))
        cr = (np.array([1.0, 0.0, 0.0]) - luma) / (2.0 * (1.0 - red))
        return np.stack([luma, cb, cr])

    meant = np.linalg.inv(to_ycbcr(*OTHER_MATRICES[matrix])) @ to_ycbcr(0.299, 0.114)
    return torch.from_numpy(meant.astype(np.float32))


def recoloured(frame: Tensor, matrix: Tensor) -> Tensor:
    """(H, W, 3) uint8 through a (3, 3) matrix, rounded and cut to 0..255."""
    colours = frame.float() @ matrix.T.to(frame.device)
    return colours.round_().clamp_(0, 255).byte()
