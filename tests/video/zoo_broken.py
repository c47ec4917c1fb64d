"""Files with damage in the middle, and files that hold nothing to show."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from video.zoo import FRAMES, GOP, Case, Packet, encoded, packets_of, remux
from video.zoo_sound import AV1, H264, HEVC, MJPEG, MPEG4, VP8, VP9


class Base(NamedTuple):
    """container, suffix, write options; reorders: frames refer to later ones of their group;
    intra: they refer to none; conceals: half a frame is filled up from the one before; patched:
    muxers refuse broken packets, so that they are broken in the file."""

    container: str
    suffix: str
    options: dict[str, Any]
    reorders: bool = False
    intra: bool = False
    conceals: bool = False
    patched: bool = False


# Painted frames have nothing in common: left alone, encoders would start a group at each.
X264 = {**H264, "encoder_options": {"x264-params": "scenecut=0"}}
X265 = {**HEVC, "encoder_options": {"x265-params": "log-level=none:scenecut=0:open-gop=0"}}
MPEG4_GROUPS = {**MPEG4, "encoder_options": {"sc_threshold": "1000000000"}}
BASES = {
    "vp8": Base("webm", "webm", VP8),
    "vp9": Base("webm", "webm", VP9),
    "mpeg4": Base("avi", "avi", MPEG4_GROUPS),
    "h264": Base("mp4", "mp4", X264, reorders=True),
    "hevc": Base("mp4", "mkv", X265, reorders=True),
    "av1": Base("mp4", "mp4", AV1, reorders=True, patched=True),
    "mjpeg": Base("avi", "avi", MJPEG, intra=True),
    "prores": Base("mov", "mov", {"codec": "prores_ks", "pixel_format": "yuv422p10le"}, intra=True),
    "ffv1": Base("matroska", "mkv", {"codec": "ffv1", "gop": 1}, intra=True, conceals=True),
}


def _random(data: bytes) -> bytes:
    return random.Random(len(data)).randbytes(len(data))


# What becomes of a packet; the first byte alone says of some that they hold no frame at all.
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "zeroed": lambda data: data[:1] + bytes(len(data) - 1),
    "random": lambda data: data[:1] + _random(data[1:]),
    "cut in half": lambda data: data[: len(data) // 2],
    "cut to 5 bytes": lambda data: data[:5],
    "dropped": lambda data: b"",
}
# The first frame, one that refers to it, a keyframe in the middle, one that refers to that.
PLACES = (0, 5, GOP, GOP + 5)


def damaged(base: Base, damage: str, place: int) -> Callable[[Path], None]:
    def change(packets: list[Packet]) -> list[Packet]:
        assert base.intra or [n for n, p in enumerate(packets) if p.key] == [0, GOP]
        data = DAMAGES[damage](packets[place].data)
        packets[place] = packets[place]._replace(data=data)
        return [p for p in packets if p.data]

    def write(path: Path) -> None:
        whole = encoded(base.container, **base.options)
        if not base.patched or damage == "dropped":
            remux(whole, path, change)
            return
        data = packets_of(whole)[place].data
        assert whole.count(data) == 1
        path.write_bytes(whole.replace(data, DAMAGES[damage](data).ljust(len(data), b"\0")))

    return write


def truth(base: Base, damage: str, place: int) -> Case:
    codes = list(range(FRAMES))
    if base.intra:
        part = base.conceals and damage == "cut in half"
        lost, spoilt = (set(), {place}) if part else ({place}, set())
    else:
        group = place // GOP * GOP
        lost = set()
        spoilt = set(range(group if base.reorders else place, group + GOP))
    if damage == "dropped":
        # Its frame is not there: which one is known only where file and screen order agree.
        codes.pop(place)
        lost, spoilt = set(), {i for i in spoilt if i + 1 in spoilt}
    return Case(
        damaged(base, damage, place),
        base.suffix,
        codes=codes,
        lost=frozenset(lost),
        spoilt=frozenset(spoilt),
    )


def false_keyframe(packets: list[Packet]) -> list[Packet]:
    """A VP8 frame that says that it needs no other, and one behind it that does not decode."""
    false, cut = packets[14].data, packets[20].data
    packets[14] = packets[14]._replace(data=bytes([false[0] & ~1]) + false[1:])
    packets[20] = packets[20]._replace(data=cut[:5])
    return packets


BROKEN: dict[str, Case] = {
    f"{codec}, packet {place} {damage}": truth(base, damage, place)
    for codec, base in BASES.items()
    for damage in DAMAGES
    for place in PLACES
}
BROKEN["vp8, false keyframe"] = Case(
    lambda path: remux(encoded(**VP8), path, false_keyframe),
    "webm",
    spoilt=frozenset(range(14, 24)),
)
