"""What the header of a VP8, VP9 or MJPEG packet says: shown or hidden, size and pixel layout.

A decoder that trusts a stream's first header writes past its buffers where a later frame is
larger, and counts wrongly where a packet shows nothing; a few bytes a packet tell before it is
fed. Only headers are read: whether the rest decodes is not known here.

Formats: VP8 RFC 6386, 9.1; VP9 bitstream specification 0.6, 6.2 and annex B; JPEG ITU T.81, B.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Codes of JPEG markers: start and end of image, start of scan, and those without a length.
SOI, EOI, SOS = 0xD8, 0xD9, 0xDA
BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD8)})
# Baseline, extended and progressive frames; C4, C8 and CC are no frame headers.
FRAME_MARKERS = frozenset({0xC0, 0xC1, 0xC2})
ANY_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Behind the first scan: a second field, or a stray header, whose size a decoder would take.
ANOTHER_IMAGE = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xd8]")
VP9_SYNC_CODE = 0x498342
VP9_RGB = 7  # color_space of RGB, which carries no subsampling


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """shown: frames of the packet that come on screen.
    sizes: every (height, width) in px that its frames state themselves; a frame that states
        none has the size of frames before it. layouts: likewise their pixel layouts, to be
        compared for equality only.
    """

    shown: int
    sizes: frozenset[tuple[int, int]]
    layouts: frozenset[tuple[int, ...]] = frozenset()


def frame_header(codec_name: str, packet: bytes) -> FrameHeader | None:
    """The header of a packet; None where it is not understood, as of any other codec.

    codec_name: as FFmpeg calls the decoder ("vp8", "vp9", "mjpeg").
    """
    parse = _PARSERS.get(codec_name)
    try:
        return None if parse is None else parse(packet)
    except IndexError:  # it ends within its header
        return None


def shows_nothing(codec_name: str, packet: Any) -> bool:
    """Whether a packet (anything with a buffer, not empty) is one of VP8 or VP9 whose frames are
    only for others to refer to. Made for millions of packets: mostly one byte is looked at."""
    first = memoryview(packet)[0]
    if codec_name == "vp8":
        return not first & 0x10
    # Shown frames of VP9 have one of these bits; in profile 3 they stand a place further.
    if codec_name != "vp9" or (first & 0x0A and first & 0x30 != 0x30):
        return False
    header = frame_header(codec_name, bytes(packet))
    return header is not None and header.shown == 0


def _vp8(packet: bytes) -> FrameHeader | None:
    tag = packet[0]
    shown = tag >> 4 & 1
    if tag & 1:
        return FrameHeader(shown, frozenset())
    if packet[3:6] != b"\x9d\x01\x2a":
        return None
    # 14 bits each; the two above are a scale for display that decoders ignore.
    width = (packet[6] | packet[7] << 8) & 0x3FFF
    height = (packet[8] | packet[9] << 8) & 0x3FFF
    return FrameHeader(shown, frozenset({(height, width)}))


def _vp9(packet: bytes) -> FrameHeader | None:
    frames = vp9_frames(packet)
    headers = [_vp9_frame(frame) for frame in frames]
    known = [h for h in headers if h is not None]
    if not known or len(known) < len(headers):
        return None
    return FrameHeader(
        sum(h.shown for h in known),
        frozenset().union(*(h.sizes for h in known)),
        frozenset().union(*(h.layouts for h in known)),
    )


def vp9_frames(packet: bytes) -> list[bytes]:
    """The frames of a superframe; a packet without an index at its end is one frame."""
    marker = packet[-1]
    if marker & 0xE0 != 0xC0:
        return [packet]
    count, width = (marker & 7) + 1, (marker >> 3 & 3) + 1
    start = len(packet) - 2 - count * width
    if start < 0 or packet[start] != marker:
        return [packet]
    frames, at = [], 0
    for n in range(count):
        field = start + 1 + n * width
        size = int.from_bytes(packet[field : field + width], "little")
        if size == 0 or at + size > start:
            return []
        frames.append(packet[at : at + size])
        at += size
    return frames


class Bits:
    """Reads bits, the highest of a byte first; IndexError past the end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def __call__(self, count: int) -> int:
        value = 0
        for _ in range(count):
            value = value << 1 | self._data[self._at >> 3] >> (7 - (self._at & 7)) & 1
            self._at += 1
        return value

    def exp_golomb(self) -> int:
        """An unsigned number of H.264 (9.1); IndexError for one of more than 32 bits."""
        zeros = 0
        while not self(1):
            zeros += 1
            if zeros > 32:
                raise IndexError
        return (1 << zeros) - 1 + self(zeros)


def _vp9_frame(frame: bytes) -> FrameHeader | None:
    bits = Bits(frame)
    if bits(2) != 2:
        return None
    profile = bits(1) | bits(1) << 1
    if profile == 3 and bits(1):
        return None
    if bits(1):  # shows a frame that was decoded before
        return FrameHeader(1, frozenset())
    inter, shown, resilient = bits(1), bits(1), bits(1)
    layout: frozenset[tuple[int, ...]] = frozenset()
    if inter:
        intra_only = 0 if shown else bits(1)
        bits(0 if resilient else 2)  # reset_frame_context
        if not intra_only:
            bits(8 + 3 * 4)  # the slots that it refreshes and refers to
            if any(bits(1) for _ in range(3)):
                return FrameHeader(shown, frozenset())  # the size of a frame it refers to
            return FrameHeader(shown, frozenset({_vp9_size(bits)}))
    if bits(24) != VP9_SYNC_CODE:
        return None
    if not inter or profile > 0:
        layout = frozenset({_vp9_layout(bits, profile)})
    if inter:
        bits(8)  # the slots that it refreshes
    return FrameHeader(shown, frozenset({_vp9_size(bits)}), layout)


def _vp9_size(bits: Callable[[int], int]) -> tuple[int, int]:
    width = bits(16) + 1
    return bits(16) + 1, width


def _vp9_layout(bits: Callable[[int], int], profile: int) -> tuple[int, ...]:
    depth = bits(1) if profile >= 2 else 0
    space = bits(3)
    odd = profile & 1
    if space == VP9_RGB:
        return profile, depth, space, bits(1) if odd else 0
    full_range = bits(1)
    return profile, depth, space, full_range, bits(3) if odd else 0


def _mjpeg(packet: bytes) -> FrameHeader | None:
    if packet[:2] != bytes((0xFF, SOI)):
        return None
    at, size, layout = 2, None, None
    while True:
        if packet[at] != 0xFF:
            return None
        marker, at = packet[at + 1], at + 1
        if marker == 0xFF:  # fill
            continue
        at += 1
        if marker == SOS:
            break
        if marker in BARE_MARKERS:
            continue
        length = packet[at] << 8 | packet[at + 1]
        if marker in (0, SOI, EOI) or length < 2:
            return None
        if marker in ANY_FRAME_MARKERS:
            if size is not None or marker not in FRAME_MARKERS:
                return None
            size = (packet[at + 3] << 8 | packet[at + 4], packet[at + 5] << 8 | packet[at + 6])
            components = packet[at + 7]
            sampling = (packet[at + 9 + 3 * n] for n in range(components))
            layout = (packet[at + 2], *sampling)
        at += length
    if size is None or layout is None or ANOTHER_IMAGE.search(packet, at):
        return None
    return FrameHeader(1, frozenset({size}), frozenset({layout}))


_PARSERS: dict[str, Callable[[bytes], FrameHeader | None]] = {
    "vp8": _vp8,
    "vp9": _vp9,
    "mjpeg": _mjpeg,
}
