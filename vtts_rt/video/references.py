"""What packet headers say of references: pictures that no other needs, and missing ones.

Sources: ITU-T H.264, 7.3.1 (NAL units), 7.3.2 (parameter sets), 7.3.3 (slice headers), 7.4.3
(frame_num); H.265, 7.3.1 and 7.4.2.
"""

from __future__ import annotations

from typing import Any

from vtts_rt.video.frame_headers import Bits

IDR, SPS, PPS = 5, 7, 8
SLICES = (1, 2, IDR)  # nal_unit_type of what pictures are made of
INTRA_SLICES = (2, 4)  # I and SI: slice_type modulo 5
# profile_idc whose parameter sets hold chroma and scaling lists (7.3.2.1.1).
HIGH_PROFILES = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})
HEADER_BYTES = 64  # more than a slice header has before frame_num
PARAMETER_BYTES = 1024
# Where avcC and hvcC, extradata of MP4 and Matroska, say how long the lengths of units are.
AVCC_LENGTH_AT, HVCC_LENGTH_AT = 4, 21
HEVC_VPS = 32
HEVC_UNREFERRED = frozenset(range(0, 16, 2))  # TRAIL_N, TSA_N, STSA_N, RADL_N, RASL_N, reserved
HEVC_RASL = frozenset({8, 9})


def is_disposable(codec_context: Any, packet: Any) -> bool:
    """Whether a packet holds a picture that no other refers to. False where that is not known,
    and for codecs other than H.264 and HEVC.

    Such a packet can be left out. FFmpeg's skip_frame=NONREF ignores the same pictures, but
    looks at less of a damaged one; and those of H.264 take their turn among the decoder's frame
    threads, and the others then wait for one of them.
    """
    data, extradata = memoryview(packet), codec_context.extradata
    if codec_context.name == "hevc":
        return _is_disposable_hevc(data, extradata)
    if codec_context.name != "h264":
        return False
    found = False
    for start in _units(data, extradata):
        header = data[start]
        if header & 0x1F in SLICES:
            if header & 0x60:  # nal_ref_idc
                return False
            found = True
    return found


def _is_disposable_hevc(data: memoryview, extradata: bytes | None) -> bool:
    """Pictures of the highest sub-layer that are no reference within it (7.4.2.2)."""
    layers = _hevc_layers(extradata)
    found = False
    for start in _units(data, extradata, HVCC_LENGTH_AT):
        kind, temporal_id = data[start] >> 1 & 0x3F, data[start + 1 : start + 2]
        if kind < HEVC_VPS:
            if kind not in HEVC_UNREFERRED or not temporal_id or temporal_id[0] & 7 != layers:
                return False
            found = True
    return found


def is_skipped_leading(codec_context: Any, packet: Any) -> bool:
    """Whether a packet of HEVC says that decoders skip it if they start at its keyframe (RASL)."""
    data = memoryview(packet)
    units = _units(data, codec_context.extradata, HVCC_LENGTH_AT)
    return any(data[start] >> 1 & 0x3F in HEVC_RASL for start in units)


def _hevc_layers(extradata: bytes | None) -> int:
    """How many temporal sub-layers there are; 0 where it is not known."""
    if not extradata or len(extradata) <= HVCC_LENGTH_AT:
        return 0
    if extradata[0] == 1:
        return extradata[HVCC_LENGTH_AT] >> 3 & 7
    for start in _units(memoryview(extradata), None):
        if extradata[start] >> 1 & 0x3F == HEVC_VPS and start + 3 < len(extradata):
            return (extradata[start + 3] >> 1 & 7) + 1
    return 0


class FrameNumbers:
    """Whether pictures of H.264 follow one another without a gap, told from their frame_num.

    Every reference picture has the next number (modulo a power of two), others that of the
    reference picture to come. FFmpeg fills gaps with copies of what it has, without an error.
    A parameter set that changes counts as a gap too, as decoders keep such sets over a seek.
    is_intra: whether the first slice of the latest picture refers to no other picture.
    """

    def __init__(self, extradata: bytes | None) -> None:
        self._extradata = extradata
        self._units: dict[tuple[int, int], bytes] = {}  # parameter sets, by kind and id
        self._sizes: dict[int, tuple[int, bool]] = {}  # SPS: bits of frame_num, colour planes
        self._sps_of: dict[int, int] = {}
        self._last: int | None = None
        self.is_intra = True
        if extradata and extradata[0] == 1:
            self._read_avcc(extradata)
        elif extradata:
            self.follows(extradata)

    def follows(self, packet: Any) -> bool:
        """False if the first picture of a packet cannot follow that of the packet before."""
        data = memoryview(packet)
        starts = _units(data, self._extradata)
        for start in starts:
            kind = data[start] & 0x1F
            try:
                if kind in (SPS, PPS):
                    end = next((at for at in starts if at > start), len(data) + 3)
                    if not self._parameters(kind, data[start + 1 : end - 3]):
                        return False
                elif kind in SLICES:
                    return self._picture(kind, data[start] & 0x60 > 0, data[start + 1 :])
            except IndexError:  # it ends within its header
                return False
        return True

    def _picture(self, kind: int, referred: bool, slice_: memoryview) -> bool:
        bits = Bits(unescaped(slice_[:HEADER_BYTES]))
        bits.exp_golomb()  # first_mb_in_slice
        self.is_intra = bits.exp_golomb() % 5 in INTRA_SLICES
        size = self._sizes.get(self._sps_of.get(bits.exp_golomb(), -1))
        if size is None:
            return False
        num_bits, planes = size
        bits(2 if planes else 0)
        number, last = bits(num_bits), self._last
        if referred or last is None:
            self._last = number
        if kind == IDR:
            return number == 0
        return last is None or (number - last) % (1 << num_bits) <= 1

    def _read_avcc(self, data: bytes) -> None:
        at = 5  # version, profile, compatibility, level, length of lengths
        try:
            for kind, mask in ((SPS, 0x1F), (PPS, 0xFF)):
                count, at = data[at] & mask, at + 1
                for _ in range(count):
                    length = int.from_bytes(data[at : at + 2], "big")
                    self._parameters(kind, memoryview(data)[at + 3 : at + 2 + length])
                    at += 2 + length
        except IndexError:
            return

    def _parameters(self, kind: int, unit: memoryview) -> bool:
        """Whether it is new or as it was before."""
        whole = bytes(unit).rstrip(b"\0")
        bits = Bits(unescaped(unit[:PARAMETER_BYTES]))
        if kind == PPS:
            pps = bits.exp_golomb()
            self._sps_of[pps] = bits.exp_golomb()
            return self._units.setdefault((kind, pps), whole) == whole
        profile = bits(24) >> 16
        sps, planes = bits.exp_golomb(), False
        if profile in HIGH_PROFILES:
            chroma = bits.exp_golomb()
            planes = chroma == 3 and bits(1) == 1
            bits.exp_golomb(), bits.exp_golomb(), bits(1)  # depths, transform bypass
            if bits(1):
                for n in range(12 if chroma == 3 else 8):
                    if bits(1):
                        _skip_scaling_list(bits, 16 if n < 6 else 64)
        self._sizes[sps] = (bits.exp_golomb() + 4, planes)
        return self._units.setdefault((kind, sps), whole) == whole


def _skip_scaling_list(bits: Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            code = bits.exp_golomb()
            following = (last + (code + 1 >> 1) * (1 if code & 1 else -1)) % 256
        last = following or last


def unescaped(unit: bytes | memoryview) -> bytes:
    """Without the bytes that keep start codes from showing up within a unit."""
    return bytes(unit).replace(b"\0\0\3", b"\0\0")


def _units(data: memoryview, extradata: bytes | None, length_at: int = AVCC_LENGTH_AT) -> list[int]:
    """Where the NAL units of a packet begin: after their lengths (MP4), or after start codes."""
    starts, at = [], 0
    if extradata and len(extradata) > length_at and extradata[0] == 1:
        length = (extradata[length_at] & 3) + 1
        while at + length < len(data):
            starts.append(at + length)
            at += length + int.from_bytes(data[at : at + length], "big")
        return starts
    encoded = bytes(data)
    while (at := encoded.find(b"\0\0\1", at) + 3) >= 3 and at < len(encoded):
        starts.append(at)
    return starts
