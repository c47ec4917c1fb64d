"""`VideoFacts` as bytes and back; what comes back is whole and consistent or not there at all.

Layout: the length of a JSON header (4 bytes, little-endian), the header, and the zlib-compressed
differences of five arrays of 8-byte little-endian numbers. What follows from them is not stored.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np

from vtts_rt.video.facts import VideoFacts
from vtts_rt.video.index import PacketIndex, all_differ

MAX_PACKETS = 1 << 26  # 13 days of 60 fps; a header that says more is broken
MAX_SIDE = 1 << 16
KEY_NAMES = ("pos", "pts", "dts")
_INT, _FLOAT = np.dtype("<i8"), np.dtype("<f8")


def facts_to_bytes(facts: VideoFacts) -> bytes:
    """Everything but `content_id`, by which the bytes are found."""
    index = facts.index
    header = {
        "codec": facts.codec,
        "stored_hw": facts.stored_hw,
        "matrix": facts.matrix,
        "key_name": index.key_name,
        "source_fps": index.source_fps,
        "duration_seconds": index.duration_seconds,
        "packets": index.num_packets,
        "frames": index.num_frames,
        "keyframes": len(index.keyframes),
        "keys": 0 if index.keys is None else index.num_packets,
    }
    arrays = [
        np.zeros(0, _INT) if index.keys is None else index.keys,
        index.seek_times,
        # An order and whether the packet shows, in one number.
        index.order * 2 + (index.frame_of >= 0),
        np.array(index.keyframes),
        index.times_seconds.astype(_FLOAT).view(_INT),
    ]
    # Differences are small and repeat; int64 wraps, and a cumulative sum wraps back.
    body = b"".join(np.diff(a.astype(_INT), prepend=_INT.type(0)).tobytes() for a in arrays)
    head = json.dumps(header).encode()
    return len(head).to_bytes(4, "little") + head + zlib.compress(body, 1)


def facts_from_bytes(content_id: str, data: bytes) -> VideoFacts | None:
    """None for bytes that `facts_to_bytes` did not write, or whose values contradict each other."""
    try:
        return _parsed(content_id, data)
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError, zlib.error):
        return None


def _parsed(content_id: str, data: bytes) -> VideoFacts | None:
    start = 4 + int.from_bytes(data[:4], "little")
    header: dict[str, Any] = json.loads(data[4:start])
    packets, frames = _count(header["packets"], 1), _count(header["frames"], 1)
    counts = [_count(header["keys"]), packets, packets, _count(header["keyframes"], 1), frames]
    unpacker = zlib.decompressobj()
    size = 8 * sum(counts)
    body = unpacker.decompress(data[start:], size + 1)
    if len(body) != size or not unpacker.eof or counts[0] not in (0, packets):
        return None
    parts = np.split(np.frombuffer(body, _INT), np.cumsum(counts)[:-1])
    columns = [np.cumsum(part, dtype=np.int64) for part in parts]
    keys, seek_times, ranks, keyframes, bits = columns
    times = bits.view(_FLOAT)
    order, shows = ranks >> 1, (ranks & 1).astype(bool)
    if not (
        order.min() >= 0
        and order.max() < packets
        and (np.bincount(order, minlength=packets) == 1).all()
        and int(shows.sum()) == frames
        and (counts[0] == 0 or all_differ(keys))
        and keyframes[0] == 0
        and (np.diff(keyframes) > 0).all()
        and keyframes[-1] < packets
        and times[0] == 0.0
        and np.isfinite(times).all()
        and (np.diff(times) >= 0.0).all()
    ):
        return None
    ranking = np.empty(packets, np.int64)
    ranking[order] = np.arange(packets)
    packet_of = ranking[shows[ranking]]
    frame_of = np.full(packets, -1, np.int64)
    frame_of[packet_of] = np.arange(frames)
    return VideoFacts(
        content_id=content_id,
        codec=_text(header["codec"]),
        stored_hw=_numbers(header["stored_hw"], 2, 1, MAX_SIDE),
        matrix=_numbers(header["matrix"], 4, -(1 << 31), 1 << 31),
        index=PacketIndex(
            keys=keys if counts[0] else None,
            key_name=KEY_NAMES[KEY_NAMES.index(header["key_name"])],
            seek_times=seek_times,
            order=order,
            frame_of=frame_of,
            packet_of=packet_of,
            keyframes=keyframes.tolist(),
            times_seconds=times,
            source_fps=_positive(header["source_fps"]),
            duration_seconds=_positive(header["duration_seconds"]),
        ),
    )


def _count(value: Any, least: int = 0) -> int:
    return int(_numbers([value], 1, least, MAX_PACKETS)[0])


def _numbers(values: Any, length: int, least: int, most: int) -> Any:
    ok = len(values) == length and all(type(v) is int and least <= v <= most for v in values)
    if not ok:
        raise ValueError(values)
    return tuple(values)


def _positive(value: Any) -> float:
    if type(value) is not float or not 0.0 < value < float("inf"):
        raise ValueError(value)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value
