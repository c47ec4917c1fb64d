"""Which packets of H.264 no other picture needs, told from their headers (ITU-T H.264, 7.3.1)."""

from __future__ import annotations

from typing import Any

SLICES = (1, 2, 5)  # nal_unit_type of what pictures are made of


def is_disposable(codec_context: Any, packet: Any) -> bool:
    """Whether a packet holds a picture that no other refers to. False where that is not known.

    Such a packet can be left out: FFmpeg's skip_frame=NONREF ignores the same slices, but they
    take their turn among the decoder's frame threads, and the others then wait for one of them.
    """
    if codec_context.name != "h264":
        return False
    data = memoryview(packet)
    found = False
    for start in _units(data, codec_context.extradata):
        header = data[start]
        if header & 0x1F in SLICES:
            if header & 0x60:  # nal_ref_idc
                return False
            found = True
    return found


def _units(data: memoryview, extradata: bytes | None) -> list[int]:
    """Where the NAL units of a packet begin: after their lengths (MP4), or after start codes."""
    starts, at = [], 0
    if (
        extradata and len(extradata) > 4 and extradata[0] == 1
    ):  # avcC: the length of lengths is in its fifth byte
        length = (extradata[4] & 3) + 1
        while at + length < len(data):
            starts.append(at + length)
            at += length + int.from_bytes(data[at : at + length], "big")
        return starts
    encoded = bytes(data)
    while (at := encoded.find(b"\0\0\1", at) + 3) >= 3 and at < len(encoded):
        starts.append(at)
    return starts
