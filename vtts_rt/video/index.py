"""The packet index of a stream: which frame every packet holds, when it shows, where to seek.

Shape letters: N packets of the stream in file (decode) order, F frames in presentation order.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from vtts_rt.video.container import demuxed
from vtts_rt.video.frame_headers import shows_nothing
from vtts_rt.video.tables import Packets
from vtts_rt.video.timestamps import MISSING, mended_times

FALLBACK_FPS = 25.0  # ffmpeg's own rate for streams that carry neither times nor a rate
# A container's average rate is believed within this factor of what the timestamps say: beyond
# it, it is a header that lies (webcam and screen recordings say 1000 or 90000).
RATE_TOLERANCE = 1.5
MAX_FPS = 1000.0
# Packets that may fail to decode before a file counts as holding no frame at all.
PROBE_PACKETS = 512
CHECKED_PACKETS = 1 << 12  # from one `check` of `build_index` to the next


@dataclass(frozen=True, slots=True, eq=False)
class PacketIndex:
    """One entry per packet, all as numpy arrays: a 10-hour file at 60 fps takes about 100 MB.

    keys: (N,) int64, what tells packets apart after a seek (byte position, or `timed_key` of pts
        or dts, whichever is there and unique); None when nothing is.
    key_name: "pos", "pts" or "dts".
    seek_times: (N,) int64 in stream time base, the time a demuxer seeks by.
    order: (N,) int64, rank in presentation order among all packets.
    frame_of: (N,) int64, the frame index of a packet, -1 where it holds no frame that shows.
    packet_of: (F,) int64, the packet of a frame.
    keyframes: ordinals of keyframe packets, ascending, beginning with 0.
    times_seconds: (F,) float64, ascending from 0.0.
    """

    keys: np.ndarray | None
    key_name: str
    seek_times: np.ndarray
    order: np.ndarray
    frame_of: np.ndarray
    packet_of: np.ndarray
    keyframes: list[int]
    times_seconds: np.ndarray
    source_fps: float
    duration_seconds: float

    @property
    def num_packets(self) -> int:
        return len(self.order)

    @property
    def num_frames(self) -> int:
        return len(self.packet_of)

    def key_of(self, packet: Any) -> int:
        value = getattr(packet, self.key_name)
        if value is None:
            return MISSING
        return int(value if self.key_name == "pos" else timed_key(np.int64(value), packet.size))

    def ordinal_of(self, packet: Any) -> int | None:
        """The place of a packet in the file, by its key; None when it cannot be told."""
        if self.keys is None:
            return None
        hits = np.flatnonzero(self.keys == self.key_of(packet))
        return int(hits[0]) if len(hits) == 1 else None

    def start_for(self, frame: int) -> int:
        """Ordinal of the packet to decode from so that `frame` comes out whole.

        The last keyframe before it in the file *and* on screen: frames that follow a keyframe
        in the file but show before it (an open group of pictures) need the group before.
        """
        packet = int(self.packet_of[frame])
        k = bisect_right(self.keyframes, packet) - 1
        while k > 0 and self.order[self.keyframes[k]] > self.order[packet]:
            k -= 1
        return self.keyframes[k]

    def keyframe_before(self, ordinal: int) -> int | None:
        """The keyframe before the one at `ordinal`, or None at the first."""
        k = bisect_right(self.keyframes, ordinal - 1) - 1
        return self.keyframes[k] if k >= 0 else None


def timed_key(time: Any, size: Any) -> Any:
    """A key of a packet by its time (int64, which wraps) and size in bytes: some demuxers stamp
    packets otherwise after a seek."""
    return (time << 24) ^ size


def build_index(
    container: Any,
    stream: Any,
    reopen: Callable[[], tuple[Any, Any]],
    source_fps: float | None = None,
    check: Callable[[int, int], None] = lambda num_packets, num_frames: None,
    told: Callable[[Any, Any, Packets], Packets | None] | None = None,
) -> tuple[PacketIndex, Any] | None:
    """One pass over the packets of a freshly opened container; the first frame is decoded.

    Only a stream of which the container does not say when frames show (no pts although frames
    are reordered, or no times at all: raw H.264) is decoded once, to learn the order.
    reopen: gives another (container, stream) of the same content, for that one decode.
    source_fps: rate of a stream without any times; the default is the container's guess.
    check: called now and then with the numbers of packets and of frames that show; what it raises
    ends the pass.
    told: `SampleTable.packets`, which makes it a pass over the first packets where it knows all.
    Returns the index and the first frame that decodes (what only a decoder knows: size, display
    matrix); None when no packet holds a frame that shows or none decodes.
    """
    rows, hidden, keyframes = array("q"), bytearray(), array("q")
    codec = stream.codec_context.codec.canonical_name
    reorders = bool(stream.codec_context.has_b_frames)
    first: list[Any] = []
    probing = True
    shown_order: list[int] | None = None
    for packet in demuxed(container, stream):
        if packet.is_keyframe:
            keyframes.append(len(hidden))
        pts, dts, pos = packet.pts, packet.dts, packet.pos
        rows.append(MISSING if pts is None else pts)
        rows.append(MISSING if dts is None else dts)
        rows.append(MISSING if pos is None or pos < 0 else pos)
        rows.append(packet.size)
        rows.append(packet.duration or 0)
        # Edit lists mark what they cut.
        hidden.append(packet.is_discard or shows_nothing(codec, packet))
        if not len(hidden) % CHECKED_PACKETS:
            check(len(hidden), hidden.count(0))
        if probing:
            first = decode_tagged(stream, packet, len(hidden) - 1)  # overwrites the packet's times
            probing = not first and len(hidden) <= PROBE_PACKETS
        if told is not None and not probing:
            break
    else:
        told = None
    first = first or decode_tagged(stream, None, 0)
    if not first:
        return None
    columns = np.frombuffer(rows, np.int64).reshape(-1, 5)
    shows = np.frombuffer(bytes(hidden), np.uint8) == 0
    if told is not None:
        packets = told(container, stream, Packets(columns, shows, keyframes.tolist()))
        if packets is None:
            again = reopen()
            with again[0]:
                return build_index(*again, reopen, source_fps, check)
        columns, shows, keys_at = packets
        check(len(shows), int(shows.sum()))
        keyframes = array("q", keys_at)
    all_pts, all_dts, places, sizes, durations = columns.T
    times, seek_times = all_pts, all_dts
    no_pts = bool((times == MISSING).any())
    # AVI stores no presentation times, and FFmpeg's guess may just follow the file's order.
    no_pts |= container.format.name == "avi" and bool((np.diff(times) > 0).all())
    if no_pts:
        if reorders or (seek_times == MISSING).any():
            shown_order = _decoded_order(*reopen())
        times = np.where(times == MISSING, all_dts, times)
    seek_times = np.where(seek_times == MISSING, times, seek_times)
    times = mended_times(times, all_dts)
    if shown_order is None:
        ranking = np.argsort(times, kind="stable")
        packet_of = ranking[shows[ranking]]
        shown_times = times[packet_of]
    else:
        packet_of = np.array([p for p in shown_order if p < len(shows) and shows[p]], np.int64)
        ranking = np.concatenate([packet_of, np.setdiff1d(np.arange(len(times)), packet_of)])
        shown_times = np.sort(times[packet_of])
    if not len(packet_of):
        return None
    order = np.empty(len(times), np.int64)
    order[ranking] = np.arange(len(times))
    frame_of = np.full(len(times), -1, np.int64)
    frame_of[packet_of] = np.arange(len(packet_of))
    rate, last_seconds = _rate(stream.average_rate), None
    # What demuxers of raw streams give as times counts packets at a rate of their own.
    raw = bool(container.format.flags & av.format.Flags.no_timestamps.value)
    if raw or (shown_times == MISSING).any():
        rate = source_fps or _rate(stream.guessed_rate) or rate or FALLBACK_FPS
        seconds = np.arange(len(packet_of), dtype=np.float64) / rate
    else:
        seconds = (shown_times - shown_times[0]) * float(stream.time_base)
        last_seconds = float(durations[packet_of[-1]] * stream.time_base)
    fps, duration = _rate_and_duration(seconds, rate, last_seconds)
    choices = {"pos": places}
    for name, stamps in (("pts", all_pts), ("dts", all_dts)):
        choices[name] = np.where(stamps == MISSING, MISSING, timed_key(stamps, sizes))
    keys, key_name = _unique_key(choices)
    index = PacketIndex(
        keys=keys,
        key_name=key_name,
        seek_times=seek_times,
        order=order,
        frame_of=frame_of,
        packet_of=packet_of,
        keyframes=sorted({0, *keyframes}),
        times_seconds=seconds,
        source_fps=fps,
        duration_seconds=duration,
    )
    return index, first[0]


def _decoded_order(container: Any, stream: Any) -> list[int]:
    """Packet ordinals in the order in which their frames leave the decoder."""
    order: list[int] = []
    with container:
        for ordinal, packet in enumerate(demuxed(container, stream)):
            order += [f.pts for f in decode_tagged(stream, packet, ordinal)]
        return order + [f.pts for f in decode_tagged(stream, None, 0)]


def decoded(decoder: Any, packet: Any, ordinal: int) -> list[Any]:
    """The frames that come out when `packet` (None: the end) goes in; `frame.pts` is the ordinal
    of the packet that held it.

    The decoder hands a packet's pts on to its frame whatever it reorders, so writing the
    ordinal there maps frames exactly even where containers repeat or lack timestamps.
    Raises what PyAV raises for a packet that does not decode; with several threads, for one
    before it.
    """
    if packet is None:
        frames = decoder.decode(None)
    else:
        packet.pts, packet.dts = ordinal, None
        frames = decoder.decode(packet)
    return [f for f in frames if f.pts is not None]


def decode_tagged(stream: Any, packet: Any, ordinal: int) -> list[Any]:
    """As `decoded`; a packet that does not decode gives no frame."""
    try:
        return decoded(stream, packet, ordinal)
    except (av.FFmpegError, OSError):
        return []


def _unique_key(columns: dict[str, np.ndarray]) -> tuple[np.ndarray | None, str]:
    for name, values in columns.items():
        # numpy.unique takes 80 ms for 216,000 numbers, this 1 ms where they are nearly in order.
        ordered = np.sort(values, kind="stable")
        if ordered[0] != MISSING and (ordered[1:] != ordered[:-1]).all():
            return np.ascontiguousarray(values), name
    return None, "pos"


def _rate(value: Any) -> float | None:
    rate = float(value) if value else 0.0
    return rate if 0.0 < rate <= MAX_FPS else None


def _rate_and_duration(
    seconds: np.ndarray, rate: float | None, last_seconds: float | None
) -> tuple[float, float]:
    """(frames a second, seconds) from timestamps and the container's average rate.

    last_seconds: how long the last frame is on screen, as the file says; one mean step where it
    says nothing.
    """
    num_frames, span = len(seconds), float(seconds[-1])
    if last_seconds is None or not last_seconds > 0.0:
        if span <= 0.0:
            return rate or FALLBACK_FPS, num_frames / (rate or FALLBACK_FPS)
        measured = (num_frames - 1) / span
        believed = rate is not None and 1 / RATE_TOLERANCE <= rate / measured <= RATE_TOLERANCE
        last_seconds = 1.0 / (rate if rate is not None and believed else measured)
    duration = span + last_seconds
    measured = num_frames / duration
    if rate is None or not 1 / RATE_TOLERANCE <= rate / measured <= RATE_TOLERANCE:
        rate = measured
    return rate, duration
